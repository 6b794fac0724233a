"""
Gaussian noise for the flat sum of a logical batch: s ← (s + std·N(0, I)) / L, in place.

On a CPU, PyTorch draws normals in one thread, which for a large model takes longer than the
optimizer. Here fixed slices have a Mersenne Twister each, as many as their length is worth, and a
block that is still in the cache gets its noise. On a GPU it is one draw of Philox.

Guarantees: the noise of step t is a function of (key, rank, t), so that an interrupted step can be
repeated with its own noise and with no other's. The key is 128 bits of the operating system's
entropy unless a seed is asked for; NumPy's SeedSequence and Philox make the states of the streams.
None of the generators is cryptographic; normals are float32 by Box-Muller, so their tails and their
grid are those of float32.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

STREAMS = 8  # at most, whatever the number of threads, so that a seed gives the same noise
BLOCK = 1 << 18
SLICE = 1 << 17  # numbers that are worth a thread


class Noise:
    """
    Streams that no two steps share.

    Args:
        device: of the tensors that get noise.
        seed: a key to come back to (tests, benchmarks, a resumed run); None draws a fresh one.
        rank: ranks that were given one seed have different noise all the same.
        streams: on a CPU; threads at most.
    """

    def __init__(
        self,
        device: torch.device,
        seed: int | None = None,
        rank: int = 0,
        streams: int = STREAMS,
    ) -> None:
        self._entropy, self._rank = np.random.SeedSequence(seed).entropy, rank
        streams = streams if device.type == "cpu" else 1
        self.generators = [torch.Generator(device) for _ in range(streams)]

    def at(self, step: int, size: int = 1) -> list[torch.Generator]:
        """The generators for ``size`` numbers, at the beginning of ``step``."""
        generators = self.generators[: max(1, size // SLICE)]
        key = np.random.SeedSequence(self._entropy, spawn_key=(self._rank, step))
        words = np.random.Philox(key).random_raw(len(generators) * 312)
        for generator, own in zip(generators, np.split(words, len(generators)), strict=True):
            _rekey(generator, own)
        return generators

    @torch.no_grad()
    def add(self, flat: Tensor, std: float, divisor: float, step: int) -> None:
        """``flat`` [n] ← (``flat`` + std·N(0, I)) / ``divisor``, with the noise of ``step``."""
        generators = self.at(step, flat.numel())
        slices = flat.tensor_split(len(generators))
        if len(slices) == 1:
            block = BLOCK if flat.device.type == "cpu" else flat.numel()
            return _fill(generators[0], flat, std, divisor, block)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            tasks = [
                pool.submit(_fill, generator, part, std, divisor, BLOCK)
                for generator, part in zip(generators, slices, strict=True)
            ]
        for task in tasks:
            task.result()
        return None


def _fill(generator, part: Tensor, std: float, divisor: float, block: int) -> None:
    buffer = part.new_empty(min(block, part.numel()))
    for piece in part.split(block):
        noise = buffer[: piece.numel()].normal_(std=std, generator=generator)
        piece.add_(noise).div_(divisor)


def _rekey(generator: torch.Generator, words: np.ndarray) -> None:
    # Begin the stream of ``words``, uint64 [312].
    if generator.device.type != "cpu":
        generator.manual_seed(int(words[0] >> 1))
        return
    # manual_seed would use 32 bits; the state of the Mersenne Twister has 624 words of them.
    generator.manual_seed(0)
    state = generator.get_state()
    held = state.numpy().view(np.uint64)  # seed, counters, position, 624 words in 64 bits each
    held[3 : 3 + 624] = words.view(np.uint32)
    generator.set_state(state)
