"""
Gaussian noise for the flat sum of a logical batch: s ← (s + std·N(0, I)) / L, in place.

On a CPU, PyTorch draws normals in one thread, which for a large model takes longer than the
optimizer. Here fixed slices have a Mersenne Twister each, and a block that is still in the cache
gets its noise. On a GPU it is one draw of Philox.

Guarantees: the streams are keyed from the operating system's entropy through NumPy's SeedSequence
(128 bits) unless a seed is asked for. Neither generator is cryptographic; normals are float32 by
Box-Muller, so their tails and their grid are those of float32.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

STREAMS = 8  # fixed, so that a seed gives the same noise whatever the number of threads
BLOCK = 1 << 18


class Noise:
    """Streams that no two steps share; ``seed`` is for tests and benchmarks."""

    def __init__(self, device: torch.device, seed: int | None = None) -> None:
        keys = np.random.SeedSequence(seed).spawn(STREAMS)
        if device.type == "cpu":
            self.generators = [_keyed(key) for key in keys]
        else:
            whole = int(keys[0].generate_state(1, np.uint64)[0] >> 1)
            self.generators = [torch.Generator(device).manual_seed(whole)]

    @torch.no_grad()
    def add(self, flat: Tensor, std: float, divisor: float) -> None:
        """``flat`` [n] ← (``flat`` + std·N(0, I)) / ``divisor``."""
        slices = flat.tensor_split(len(self.generators))
        if len(slices) == 1:
            return _fill(self.generators[0], flat, std, divisor, flat.numel())
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            tasks = [
                pool.submit(_fill, generator, part, std, divisor, BLOCK)
                for generator, part in zip(self.generators, slices, strict=True)
            ]
        for task in tasks:
            task.result()
        return None


def _fill(generator, part: Tensor, std: float, divisor: float, block: int) -> None:
    buffer = part.new_empty(min(block, part.numel()))
    for piece in part.split(block):
        noise = buffer[: piece.numel()].normal_(std=std, generator=generator)
        piece.add_(noise).div_(divisor)


def _keyed(key: np.random.SeedSequence) -> torch.Generator:
    # manual_seed would use 32 bits; the state of the Mersenne Twister has 624 words.
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    words = state.numpy().view(np.uint64)  # seed, counters, position, 624 words in 64 bits each
    words[3 : 3 + 624] = key.generate_state(624, np.uint32)
    return generator.set_state(state)
