"""One Poisson draw at qN = 1,000: ours is O(qN), Opacus' sampler O(N)."""

import numpy as np
import pytest

from dpsgd import sampling

SIZES = [10**n for n in range(4, 10)]


def _opacus(size):
    opacus = pytest.importorskip("opacus.utils.uniform_sampler")
    import torch

    sampler = opacus.UniformWithReplacementSampler(
        num_samples=size, sample_rate=1000 / size, generator=torch.Generator().manual_seed(0)
    )
    return lambda: next(iter(sampler))


def _ours(size):
    rng = np.random.default_rng(0)
    return lambda: sampling.draw(rng, size, 1000 / size)


@pytest.mark.parametrize(
    ("sampler", "size"),
    [*(("dpsgd", n) for n in SIZES), *(("opacus", n) for n in SIZES if n <= 10**7)],
)
def test_draw(sampler, size, measure_call):
    draw = {"dpsgd": _ours, "opacus": _opacus}[sampler](size)
    measure_call("draw", sampler, f"N={size:.0e}", draw, iterations=1 if size > 10**5 else 20)
