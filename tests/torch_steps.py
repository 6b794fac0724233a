"""PyTorch steps of small models, and what they have to give: one example at a time, in float64."""

import copy

import hf
import numpy as np
import torch
from torch.utils._pytree import tree_map

from dpsgd import METHODS, PrivacyConfig, reference

P = 4
OURS = ["torch-bookkeeping", "torch-ghost"]


def privacy(clip_norm):
    """Without noise."""
    return PrivacyConfig(
        num_examples=1000, sample_rate=0.01, noise_multiplier=0.0, clip_norm=clip_norm, steps=10
    )


def build(model, loss=hf.loss, clip_norm=1.0, method="torch-bookkeeping", **options):
    """A step of plain SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return METHODS[method].build(
        model, optimizer, privacy(clip_norm), loss=loss, physical_batch_size=P, **options
    )


def gradients(model, inputs, targets, loss=hf.loss, dtype=torch.float64):
    """One gradient per example, in float64 or under bf16 autocast."""
    model = copy.deepcopy(model)
    if dtype == torch.float64:
        model.double()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def one(array, i):
        part = torch.as_tensor(array[i : i + 1])
        return part.to(next(model.parameters()).dtype) if part.is_floating_point() else part

    for i in range(len(targets)):
        x, y = tree_map(lambda a, i=i: one(a, i), (inputs, targets))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(model, x, y)[0]
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        yield {
            n: np.zeros(p.shape) if g is None else g.numpy()
            for (n, p), g in zip(named.items(), found, strict=True)
        }


def assert_right(step, model, inputs, targets, mask, loss=hf.loss, tolerance=1e-5, **dtype):
    """Norms and clipped sum, C being such that some examples are clipped and some are not."""
    rows = list(gradients(model, inputs, targets, loss, **dtype))
    lengths = np.array([reference.norm(row) for row in rows])
    step.privacy = privacy(float(np.median(lengths)))
    want = reference.clipped_sum(rows, mask, step.privacy.clip_norm)
    placed = step.put(inputs, targets, mask)
    np.testing.assert_allclose(step.norms(*placed), lengths * mask, rtol=tolerance, atol=1e-7)
    got = step.clipped_sum(*placed)
    assert got.keys() == want.keys()
    scale = max(np.minimum(lengths, step.privacy.clip_norm)[mask].sum(), 1e-6)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=tolerance * scale)


def each(model, inputs, targets):
    """A loss [P] of any output."""
    return model(inputs).flatten(1).square().mul(torch.arange(1, 4)[:1]).sum(1)
