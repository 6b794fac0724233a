"""
The very step that is timed is checked first: a wrong method fails; it does not win.

The reference takes one example at a time through plain autograd of the same framework, in the
precision fp32; the tolerance is relative to the length of the reference sum.

A deep network of ReLUs may answer a rounding error with another gradient: units that were about to
switch do. How far, the reference itself tells, when all weights move by the last bit of a float32.
"""

import copy
import time
from functools import cache
from typing import Any

import numpy as np

from dpsgd import reference
from dpsgd.tree import take, tree_map

REAL = 3  # rows of the checked batch; the rest is padding
# fp32: float32 rounding; tf32 and bf16 have 10 and 7 bits of mantissa, through some 50 layers.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 1e-1}
SWAY = 5  # how often as far as the reference moves; other orders of sums round more than once
LOOSEST = 5e-2  # nothing beyond it is accepted in fp32, whatever the reference does
_CACHE: dict[Any, list[list[dict[str, np.ndarray]]]] = {}


class Reference:
    """
    What the clipped sum of the first rows has to be; their gradients are kept for a model.

    ``tolerance`` is what the step checked last was held to.
    """

    def __init__(self, case, model, loss, prepared) -> None:
        self.case, self.privacy = case, prepared.privacy
        rows = min(REAL, case.physical_batch)
        self.mask = np.arange(case.physical_batch) < rows
        self.inputs, self.targets = take(prepared.inputs, 0), prepared.targets[0]
        clip_norm = self.privacy.clip_norm if case.row.private else np.inf
        key = (case.row.framework, case.model, case.physical_batch)
        if key not in _CACHE:
            _CACHE.clear()
            own = take(self.inputs, slice(rows)), self.targets[:rows]
            _CACHE[key] = _gradients(case.row.framework)(model, loss, *own)
        self.want, moved = (
            reference.clipped_sum(gradients, [True] * rows, clip_norm) for gradients in _CACHE[key]
        )
        sway = _length({n: moved[n] - self.want[n] for n in moved}) / _length(self.want)
        self._usual = self.tolerance = TOLERANCE[case.precision]
        self._loosest = max(self._usual, min(SWAY * sway, LOOSEST))
        if case.row.ours:
            other = take(prepared.inputs, 1)
            self.inputs = tree_map(self._with_padding, self.inputs, other)

    def _with_padding(self, real: np.ndarray, other: np.ndarray) -> np.ndarray:
        # Padding must contribute 0 whatever it holds: NaN, or the ids of other examples.
        mask = self.mask.reshape(-1, *[1] * (real.ndim - 1))
        floating = np.issubdtype(real.dtype, np.floating)
        return np.where(mask, real, np.array(np.nan, real.dtype) if floating else other)

    def problem(self, step, clock=time.perf_counter) -> tuple[str, float]:
        """
        What is wrong with ``step``, in words, empty if nothing is; and its first step's seconds.

        Those are of three physical batches and one update, compilation included.
        """
        placed = step.put(self.inputs, self.targets, self.mask)
        start = clock()
        got = step.clipped_sum(*placed)
        seconds = clock() - start

        def two_batches():
            nonlocal seconds
            start = clock()
            step.accumulate(*placed)
            step.accumulate(*placed)
            step.update()
            step.synchronize()
            seconds += clock() - start

        direction = _direction(self.case.row.framework)(step, two_batches)
        return self._sum_problem(got) or self._noise_problem(direction, got), seconds

    def _sum_problem(self, got) -> str:
        if got.keys() != self.want.keys():
            return f"parameters left out: {sorted(self.want.keys() ^ got.keys())}"
        scale = _length(self.want)
        off = _length({n: got[n] - self.want[n] for n in got}) / scale
        if not off <= self._loosest:
            return (
                f"the clipped sum is {off:.2g} of its length away from the reference; "
                f"{self._loosest:.2g} would do"
            )
        self.tolerance = self._usual if off <= self._usual else self._loosest
        return ""

    def _noise_problem(self, direction, got) -> str:
        if not self.case.row.private:
            return ""
        size = self.privacy.expected_batch_size
        noise = np.concatenate([(direction[n] * size - 2 * got[n]).ravel() for n in got])
        want = self.privacy.noise_multiplier * self.privacy.clip_norm
        bound = 5 / np.sqrt(2 * noise.size)  # five standard errors of a Gaussian's std
        off = np.sqrt(np.mean(np.square(noise, dtype=np.float64))) / want - 1
        # A bf16 sum is not the same twice at this resolution; its error adds to the noise.
        bound += 1e-3 + (TOLERANCE[self.case.precision] if self.case.precision != "fp32" else 0)
        return "" if abs(off) < bound else f"the noise std is off by {off:+.2%} (±{bound:.2%})"


def _length(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in tree.values())))


@cache
def _gradients(framework: str):
    return {"torch": _torch_gradients, "jax": _jax_gradients}[framework]


@cache
def _direction(framework: str):
    return {"torch": _torch_direction, "jax": _jax_direction}[framework]


def _nudge(value, seed: int):
    """``value`` off by up to the last bit of its mantissa, by chance; NumPy float32."""
    value = np.asarray(value)
    off = np.random.default_rng(seed).uniform(-1, 1, value.shape)
    return (value * (1 + np.finfo(np.float32).eps * off)).astype(value.dtype)


def _torch_gradients(model, loss, inputs, targets):
    """One gradient per example; and once more of the nudged model."""
    import torch

    def gradients(model):
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        device = next(iter(named.values())).device
        for n in range(len(targets)):
            x = tree_map(lambda a, n=n: torch.as_tensor(a[n : n + 1]).to(device), inputs)
            y = torch.as_tensor(targets[n : n + 1]).to(device)
            found = torch.autograd.grad(loss(model, x, y)[0], list(named.values()))
            yield {n: g.cpu().numpy() for n, g in zip(named, found, strict=True)}

    nudged = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in enumerate(nudged.parameters()):
            p.copy_(torch.from_numpy(_nudge(p.cpu(), n)))
    return [list(gradients(model)), list(gradients(nudged))]


def _torch_direction(step, run) -> dict[str, np.ndarray]:
    captured: dict[str, np.ndarray] = {}

    def capture(*_):
        for name, p in zip(step.names, step.params, strict=True):
            captured[name] = p.grad.detach().cpu().numpy().copy()

    handle = step.optimizer.register_step_pre_hook(capture)
    run()
    handle.remove()
    return captured


def _jax_gradients(model, loss, inputs, targets):
    """As in torch."""
    import jax
    from flax import nnx

    from dpsgd.jax import weights

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    nudged = jax.tree.unflatten(tree, [_nudge(a, n) for n, a in enumerate(leaves)])

    @jax.jit
    def gradient(params, x, y):
        with jax.default_matmul_precision("highest"):
            return jax.grad(lambda p: loss(nnx.merge(graph, p, rest), x, y)[0])(params)

    def placed(array):
        if array.ndim == 4:
            return array.transpose(0, 2, 3, 1)
        return array.astype(np.int32) if array.dtype == np.int64 else array

    ones = [
        (tree_map(placed, take(inputs, slice(n, n + 1))), placed(targets[n : n + 1]))
        for n in range(len(targets))
    ]
    return [[weights.dump(gradient(p, *one)) for one in ones] for p in (params, nudged)]


def _jax_direction(step, run) -> dict[str, np.ndarray]:
    # Adam's first moment is b1·m + (1-b1)·g, so two of its values give g back.
    import jax

    from dpsgd.jax import weights

    decay = 0.9
    before = jax.tree.map(np.array, step.opt_state[0].mu)
    run()
    after = jax.tree.map(np.array, step.opt_state[0].mu)
    return weights.dump(jax.tree.map(lambda a, b: (a - decay * b) / (1 - decay), after, before))
