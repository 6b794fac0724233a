"""
Between flax.nnx and torch names and layouts; for models whose attributes mirror the torch names.

``kernel`` and ``scale`` are torch's ``weight``. Linear kernels are [in, out] here and [out, in] in
torch; convolution kernels HWIO here and OIHW in torch. Kernels of other ranks have no torch twin,
and stay as they are.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


def _entries(state: nnx.State) -> Iterator[tuple[str, str, nnx.Variable]]:
    for path, variable in nnx.to_flat_state(state):
        *parents, leaf = map(str, path)
        yield ".".join([*parents, _LEAVES.get(leaf, leaf)]), leaf, variable


def dump(state: nnx.State) -> dict[str, np.ndarray]:
    """{torch parameter name: NumPy array in torch's layout} of a state of parameters."""
    result = {}
    for name, leaf, variable in _entries(state):
        value = np.asarray(variable[...])
        order = _TO_TORCH.get(value.ndim) if leaf == "kernel" else None
        result[name] = value.transpose(order) if order else value
    return result


def shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """{torch parameter name: torch shape}, of an abstract state too."""
    result = {}
    for name, leaf, variable in _entries(state):
        shape = variable.get_value().shape
        order = _TO_TORCH[len(shape)] if leaf == "kernel" else range(len(shape))
        result[name] = tuple(shape[axis] for axis in order)
    return result


def fill(state: nnx.State, values: Mapping[str, Any]) -> None:
    """Set every parameter of ``state`` from {torch parameter name: array in torch's layout}."""
    for name, leaf, variable in _entries(state):
        value = np.asarray(values[name])
        if leaf == "kernel":
            value = value.transpose(_FROM_TORCH[value.ndim])
        variable.set_value(jnp.asarray(value))
