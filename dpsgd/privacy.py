"""
The public configuration of one DP-SGD run, and ε ↔ σ through dp-accounting.

The mechanism is T compositions of the Poisson-subsampled Gaussian. The reported ε is by privacy
loss distributions (PLD, value_discretization_interval=1e-4, pessimistic); RDP is a cross-check.
Every ε belongs to a neighbouring relation: ``add_remove`` (zero-out of one example, N public) or
``replace_one``. The world size never enters. Source: Koskela et al. 2020, arXiv:1906.03049.
"""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Literal

Neighbours = Literal["add_remove", "replace_one"]


def _check(**values: float) -> None:
    rules = {
        "num_examples": (lambda v: v >= 1, "at least 1"),
        "sample_rate": (lambda v: 0 < v <= 1, "in (0, 1]"),
        "noise_multiplier": (lambda v: 0 <= v < math.inf, "finite and not negative"),
        "clip_norm": (lambda v: 0 < v < math.inf, "finite and above 0"),
        "steps": (lambda v: v >= 1, "at least 1"),
        "delta": (lambda v: 0 < v < 1, "in (0, 1), and below 1/N to mean anything"),
        "epsilon": (lambda v: 0 < v < math.inf, "finite and above 0"),
    }
    for name, value in values.items():
        holds, words = rules[name]
        if not holds(value):
            raise ValueError(f"{name} is {value}; it must be {words}")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """
    What is public about one run.

    Attributes:
        num_examples: N.
        sample_rate: q, inclusion probability of each example in each step.
        noise_multiplier: σ; the noise std on the clipped sum is σC.
        clip_norm: C, bound on each example's whole-gradient L2 norm.
        steps: T, logical steps, each charged, empty draws included.
        delta: δ.
        neighbours: the relation ε is stated for.

    Raises:
        ValueError: a value is out of range or NaN.
    """

    num_examples: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    delta: float = 1e-5
    neighbours: Neighbours = "add_remove"

    def __post_init__(self) -> None:
        _check(
            num_examples=self.num_examples,
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm,
            steps=self.steps,
            delta=self.delta,
        )
        _relation(self.neighbours)
        if self.delta >= 1 / self.num_examples:
            warnings.warn(
                f"delta={self.delta} is not below 1/N={1 / self.num_examples:.2g}: such an ε "
                "allows publishing a whole example now and then; choose a smaller delta",
                stacklevel=3,
            )

    @property
    def expected_batch_size(self) -> float:
        """L = qN, the constant every update is divided by."""
        return self.sample_rate * self.num_examples

    def epsilon(self, steps: int | None = None) -> float:
        """ε at δ after ``steps`` (None: all T), by PLD, for ``neighbours``; inf at σ = 0."""
        if steps == 0:
            return 0.0
        return epsilon(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps if steps is None else steps,
            delta=self.delta,
            neighbours=self.neighbours,
        )

    @classmethod
    def for_epsilon(
        cls,
        target: float,
        *,
        num_examples: int,
        sample_rate: float,
        clip_norm: float,
        steps: int,
        delta: float = 1e-5,
        neighbours: Neighbours = "add_remove",
    ) -> "PrivacyConfig":
        """The configuration with the smallest σ (to 1e-3) that spends at most ε = ``target``."""
        sigma = noise_multiplier(
            target, sample_rate=sample_rate, steps=steps, delta=delta, neighbours=neighbours
        )
        return cls(
            num_examples=num_examples,
            sample_rate=sample_rate,
            noise_multiplier=sigma,
            clip_norm=clip_norm,
            steps=steps,
            delta=delta,
            neighbours=neighbours,
        )


def _relation(neighbours: str):
    names = {"add_remove": "ADD_OR_REMOVE_ONE", "replace_one": "REPLACE_ONE"}
    if neighbours not in names:
        raise ValueError(f"neighbours is {neighbours!r}; use one of {', '.join(names)}")
    return names[neighbours]


def epsilon(
    *,
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    neighbours: Neighbours = "add_remove",
    accountant: Literal["pld", "rdp"] = "pld",
) -> float:
    """
    ε(δ) of T Poisson-subsampled Gaussians.

    Returns:
        An upper bound on ε, inf at σ = 0.
    """
    _check(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps, delta=delta)
    if noise_multiplier == 0:
        return math.inf
    import dp_accounting

    relation = getattr(dp_accounting.NeighboringRelation, _relation(neighbours))
    if accountant == "pld":
        from dp_accounting.pld import PLDAccountant

        ledger = PLDAccountant(relation, value_discretization_interval=1e-4)
    elif accountant == "rdp":
        from dp_accounting.rdp import RdpAccountant

        ledger = RdpAccountant(neighboring_relation=relation)
    else:
        raise ValueError(f"accountant is {accountant!r}; use 'pld' or 'rdp'")
    return _spend(ledger, sample_rate, noise_multiplier, steps, delta)


def _spend(ledger, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    import dp_accounting

    event = dp_accounting.PoissonSampledDpEvent(
        sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    ledger.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    return float(ledger.get_epsilon(delta))


def noise_multiplier(
    target_epsilon: float,
    *,
    sample_rate: float,
    steps: int,
    delta: float,
    neighbours: Neighbours = "add_remove",
    tolerance: float = 1e-3,
) -> float:
    """
    The smallest σ, to ``tolerance``, with ε(σ) ≤ ``target_epsilon``, by Brent's method.

    Raises:
        ValueError: no σ up to 10⁴ reaches it.
    """
    _check(epsilon=target_epsilon, sample_rate=sample_rate, steps=steps, delta=delta)

    @functools.cache
    def excess(sigma: float) -> float:
        spent = epsilon(
            sample_rate=sample_rate,
            noise_multiplier=sigma,
            steps=steps,
            delta=delta,
            neighbours=neighbours,
        )
        return math.log(max(spent, 1e-300) / target_epsilon)  # 0 where qT is below δ

    from dp_accounting.rdp import RdpAccountant

    # RDP is loose, but takes milliseconds: it finds where to begin. A fractional order that does
    # not converge would be logged, so there are whole ones only.
    high, orders = 1.0, [*range(2, 64), 128, 256, 512, 1024]
    while high < 1e4 and _spend(RdpAccountant(orders), sample_rate, high, steps, delta) > (
        target_epsilon
    ):
        high *= 2
    while excess(high) > 0:
        high *= 2
        if high > 1e4:
            raise ValueError(
                f"epsilon={target_epsilon} is out of reach at sample_rate={sample_rate}, "
                f"steps={steps}, delta={delta}: lower the steps or the rate, or raise epsilon"
            )
    low = high / 2
    while excess(low) <= 0:
        low, high = low / 2, low
        if low < 0.2:  # such an ε is no protection, and the accountant takes minutes there
            return high
    from scipy.optimize import brentq

    # The root is known to within half the tolerance; adding that half keeps ε on the safe side.
    return float(brentq(excess, low, high, xtol=tolerance / 2)) + tolerance / 2
