"""
Amdahl's and the universal scalability law, fitted to measured throughput X(W).

- Amdahl: X(W) = λW / (1 + σ(W−1)), parallel part 1−σ;
- USL: X(W) = λW / (1 + σ(W−1) + κW(W−1)), κ the cost of agreement between pairs.

Both are linear in W/X = a + b(W−1) + cW(W−1), σ=b/a, κ=c/a: weighted least squares on relative
residuals. Intervals: 95 %, by the delta method and Student's t; none without degrees of freedom.
Reference: Gunther, "Guerrilla Capacity Planning", 2007, chapters 4 to 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Law:
    """
    A fitted law.

    Attributes:
        one: λ, examples a second of one rank.
        sigma: contention σ.
        kappa: κ; 0 in Amdahl's law.
        intervals: of (σ, κ), 95 %; None without degrees of freedom.
    """

    name: str
    one: float
    sigma: float
    kappa: float
    intervals: tuple[tuple[float, float], tuple[float, float]] | None

    def examples_per_s(self, world: float) -> float:
        """X(W)."""
        loss = self.sigma * (world - 1) + self.kappa * world * (world - 1)
        return self.one * world / (1 + loss)


def law(worlds: Sequence[float], rates: Sequence[float], *, usl: bool) -> Law:
    """
    Fit one law; a world may come several times, once for each round.

    Args:
        worlds: [n] W of each measurement.
        rates: [n] examples a second.
        usl: the universal law instead of Amdahl's.

    Raises:
        ValueError: fewer different worlds than coefficients.
    """
    from scipy.optimize import nnls
    from scipy.stats import t

    world, rate = np.array(worlds, float), np.array(rates, float)
    table = np.stack([np.ones_like(world), world - 1, world * (world - 1)][: 2 + usl], 1)
    count = table.shape[1]
    if len(set(worlds)) < count:
        raise ValueError(f"worlds {sorted(set(worlds))}: this law needs {count} different ones")
    table = table * (rate / world)[:, None]
    found = nnls(table, np.ones(len(rate)))[0]
    one, ratios = 1 / found[0], found[1:] / found[0]
    free, intervals = len(rate) - count, None
    if free > 0:
        residual = table @ found - 1
        covariance = np.linalg.inv(table.T @ table) * (residual @ residual) / free
        slopes = np.eye(count)[1:] / found[0]  # of b/a, then of c/a
        slopes[:, 0] = -ratios / found[0]
        half = t.ppf(0.975, free) * np.sqrt(np.diag(slopes @ covariance @ slopes.T))
        ends = [(max(0.0, r - h), r + h) for r, h in zip(ratios, half, strict=True)]
        intervals = (ends[0], ends[1] if usl else (0.0, 0.0))
    return Law(
        name="USL" if usl else "Amdahl",
        one=float(one),
        sigma=float(ratios[0]),
        kappa=float(ratios[1]) if usl else 0.0,
        intervals=intervals,
    )
