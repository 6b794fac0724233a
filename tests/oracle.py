"""
Per-example gradients the slow, obvious way: torch float64, one example at a time.

Both frameworks are checked against these through ``dpsgd.reference``.
"""

import copy

import numpy as np
import torch

import dpsgd.torch.models
from dpsgd.models import ModelSpec
from dpsgd.tree import take, tree_map


def per_example_gradients(
    spec_or_model: ModelSpec | torch.nn.Module,
    inputs: np.ndarray | dict[str, np.ndarray],
    targets: np.ndarray,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """
    One float64 gradient per example of ``inputs`` [P, …] (or a dict of them) and ``targets`` [P].

    A spec is built with ``seed``; a model is copied, not changed. Names and layouts are torch's.
    """
    model = spec_or_model
    if isinstance(model, ModelSpec):
        model = dpsgd.torch.models.build(model, seed=seed)
    model = copy.deepcopy(model).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for n, target in enumerate(targets):
        x = tree_map(_double, take(inputs, slice(n, n + 1)))
        y = torch.tensor([int(target)])
        (loss,) = dpsgd.torch.models.cross_entropy(model, x, y)
        found = torch.autograd.grad(loss, list(parameters.values()))
        gradients.append(dict(zip(parameters, (g.numpy() for g in found), strict=True)))
    return gradients


def _double(array: np.ndarray) -> torch.Tensor:
    floating = np.issubdtype(array.dtype, np.floating)
    return torch.from_numpy(array.astype(np.float64) if floating else array)
