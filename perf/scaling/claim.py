"""
Which link would give a claimed efficiency: the claim is inverted, one input at a time.

A claim that needs different links for SGD and for DP-SGD is not explained by communication alone.
"""

from dataclasses import dataclass, replace

from perf.scaling.model import Load, Method, Values, efficiency, step


@dataclass(frozen=True, kw_only=True)
class Needed:
    """
    What would give the efficiency, all else as it is; None where nothing does.

    Attributes:
        overhead_s: seconds per logical batch beyond ideal that the claim means.
        bytes_per_s: β.
        alpha_s: α, seconds.
    """

    overhead_s: float
    bytes_per_s: float | None
    alpha_s: float | None


def _solve(function, low: float, high: float) -> float | None:
    """The root on a logarithmic scale, None if the ends have one sign."""
    import numpy as np
    from scipy.optimize import brentq

    if function(low) * function(high) > 0:
        return None
    return float(np.exp(brentq(lambda x: function(np.exp(x)), np.log(low), np.log(high))))


def needed(load: Load, method: Method, world: int, values: Values, wanted: float) -> Needed:
    """
    Invert ``efficiency(W) = wanted``.

    Args:
        load: what is trained on.
        method: how; its slowdown is in ``values`` already.
        world: W of the claim.
        values: likely inputs, numbers.
        wanted: claimed efficiency, 0 to 1.
    """

    def with_(**changes):
        return efficiency(load, method, world, replace(values, **changes)) - wanted

    alone = step(load, method, 1, values).seconds / world
    return Needed(
        overhead_s=float(alone / wanted - alone),
        bytes_per_s=_solve(lambda beta: with_(bytes_per_s=beta), 1e5, 1e13),
        alpha_s=_solve(lambda alpha: with_(alpha_s=alpha), 1e-9, 1e3),
    )


def slowdown_for(
    load: Load, method: Method, world: int, values: Values, wanted: float
) -> float | None:
    """How many times t_pb must be longer to reach the efficiency with these links."""

    def with_(times):
        longer = replace(values, batch_s=values.batch_s * times)
        return efficiency(load, method, world, longer) - wanted

    return _solve(with_, 1e-3, 1e4)
