"""
Recover α, β, t_pb and what is paid once from measured steps and bare all-reduces.

T is linear in (t_pb of each method, α, 1/β, seconds paid once by each method): non-negative least
squares on relative residuals, Σ (prediction/measured − 1)². No starting values, one optimum.
A bare all-reduce is one more equation. Hold-out: fit on small worlds, predict the larger ones.

A CPU rank whose neighbours idle is faster than one of a full machine, with which it shares caches
and memory: where there are worlds that fill the cores, only those are fitted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perf import saved
from perf.scaling.model import FLOAT32, all_reduce_s
from perf.scaling.trips import PLACEMENTS, trips

Row = dict[str, Any]
NEEDED = (
    *("world_size", "method", "sync", "scaling", "physical_batch", "expected_batch"),
    *("seconds_per_step", "examples_per_s", "parameters"),
)


def rows(run: Row) -> list[Row]:
    """
    The measured rows of a run that the model can use.

    ``contention`` is how many CPU ranks share a core, at least 1: each is that much slower.
    ``idle`` is whether cores had none.

    Raises:
        saved.Unusable: there are none, or one lacks a field.
    """
    found = [r for r in run["rows"] if "seconds_per_step" in r and r.get("status", "ok") == "ok"]
    if not found:
        raise saved.Unusable("no row has seconds_per_step: give a run of several world sizes")
    for row in found:
        if lacking := [name for name in NEEDED if name not in row]:
            raise saved.Unusable(f"{row.get('case', 'a row')} lacks {', '.join(lacking)}")
    info = run.get("machine_info", {})
    cores = info.get("threads", np.inf) if info.get("device") == "cpu" else np.inf
    shares = [row["world_size"] / row.get("nodes", 1) / cores for row in found]
    return [
        row | {"contention": max(1.0, share), "idle": 0 < share < 1}
        for row, share in zip(found, shares, strict=True)
    ]


def telling(measured: Sequence[Row]) -> list[Row]:
    """The rows to fit: of worlds that fill the cores, if there are any."""
    return [row for row in measured if not row.get("idle")] or list(measured)


def key(row: Row) -> tuple:
    """What shares one t_pb and one cost paid once."""
    names = ("framework", "model", "method", "precision", "compile", "physical_batch")
    return tuple(row.get(name) for name in names)


def slowest_trips(row: Row) -> float:
    """Physical batches of the slowest rank: as measured, else as expected."""
    if "trips_max" in row:
        return row["trips_max"]
    placement = row.get("placement")
    examples = row.get("num_examples", 50_000)
    return trips(
        examples,
        row["expected_batch"] / examples,
        row["world_size"],
        row["physical_batch"],
        placement if placement in PLACEMENTS else "round-robin",
    ).slowest


@dataclass(frozen=True, kw_only=True)
class Fit:
    """
    What was recovered.

    Attributes:
        alpha_s: α, seconds a hop; 0 where one size of message alone cannot tell it from β.
        bytes_per_s: β; infinite where nothing was communicated.
        batch_s: t_pb of each :func:`key`, seconds.
        once_s: seconds paid once per logical batch.
        relative_error: root mean square of the relative residuals of the steps.
        identified: whether α and β could be told apart.
    """

    alpha_s: float
    bytes_per_s: float
    batch_s: dict[tuple, float]
    once_s: dict[tuple, float]
    relative_error: float
    identified: bool

    def seconds(self, row: Row) -> float:
        """Predicted seconds of a logical batch of that row's setting."""
        slowest, size = slowest_trips(row), FLOAT32 * row["parameters"]
        reductions = slowest if row["sync"] == "every" else 1.0
        local = slowest * self.batch_s[key(row)] + self.once_s[key(row)]
        one = all_reduce_s(row["world_size"], size, self.alpha_s, self.bytes_per_s)
        return local * row["contention"] + reductions * one


def _link(world: int, size_bytes: float) -> tuple[float, float]:
    """Factors of α and 1/β in one all-reduce."""
    return all_reduce_s(world, size_bytes, 1.0, np.inf), all_reduce_s(world, size_bytes, 0.0, 1.0)


def _separable(pairs: Iterable[tuple[float, float]]) -> bool:
    """Whether the factors of α and 1/β point in two directions that rounding does not hide."""
    ratios = [beta / alpha for alpha, beta in pairs if alpha]
    return bool(ratios) and max(ratios) > 2 * min(ratios)


def fit(
    measured: Sequence[Row], all_reduces: Sequence[Row] = (), *, steps_alone: bool = False
) -> Fit:
    """
    Fit rows and bare all-reduces together.

    Where there are bare all-reduces, they alone give α and β, unless ``steps_alone``.

    Raises:
        saved.Unusable: nothing to fit.
    """
    from scipy.optimize import nnls

    if not measured:
        raise saved.Unusable("no measured row to fit: measure at W=1 and larger")
    measured = telling(measured)
    bare = [
        (*_link(one["world_size"], one["bytes"]), float(np.median(one["seconds"])))
        for one in all_reduces
        if one["world_size"] > 1 and not steps_alone
    ]
    keys = list(dict.fromkeys(map(key, measured)))
    lines, links = [], []
    for row in measured:
        slowest = slowest_trips(row)
        line = np.zeros(2 + 2 * len(keys))
        link = _link(row["world_size"], FLOAT32 * row["parameters"])
        line[:2] = np.array(link) * (slowest if row["sync"] == "every" else 1)
        line[2 + 2 * keys.index(key(row))] = slowest * row["contention"]
        line[3 + 2 * keys.index(key(row))] = row["contention"]
        lines.append(line / row["seconds_per_step"])
        links.append(link)
    table, target = np.array(lines), np.ones(len(lines))
    identified = _separable([pair[:2] for pair in bare] or links)
    if bare:
        factors = np.array([[alpha / s, beta / s] for alpha, beta, s in bare])
        found = nnls(factors * [identified, 1], np.ones(len(bare)))[0]
        rest = nnls(table[:, 2:], np.clip(target - table[:, :2] @ found, 0, None))[0]
        found = np.concatenate([found, rest])
    else:
        table[:, 0] *= identified
        scale = np.where(table.any(0), np.abs(table).max(0), 1)  # 1/β is of another order than t_pb
        found = nnls(table / scale, target)[0] / scale
    residual = table @ found - target
    alpha, inverse, *local = map(float, found)
    return Fit(
        alpha_s=alpha if identified else 0.0,
        bytes_per_s=1 / inverse if inverse else np.inf,
        batch_s=dict(zip(keys, local[::2], strict=True)),
        once_s=dict(zip(keys, local[1::2], strict=True)),
        relative_error=float(np.sqrt(np.mean(residual**2))),
        identified=identified,
    )


@dataclass(frozen=True, kw_only=True)
class Held:
    """A row that the fit did not see; ``error`` is predicted/measured − 1."""

    row: Row
    predicted_s: float
    error: float


def hold_out(
    measured: Sequence[Row], all_reduces: Sequence[Row] = (), seen: int | None = None
) -> tuple[Fit, list[Held]]:
    """
    Fit on worlds up to ``seen`` and predict the larger ones.

    Args:
        measured: from :func:`rows`.
        all_reduces: of the run; those of larger worlds are held out too.
        seen: the largest world of the fit; default: the largest but one.

    Raises:
        saved.Unusable: no smaller world that communicates, unless ``seen`` says otherwise.
    """
    measured = telling(measured)
    worlds = sorted({row["world_size"] for row in measured})
    if seen is None:
        if worlds[-2:-1] in ([], [1]):
            raise saved.Unusable(
                f"worlds {worlds}: a hold-out needs one that communicates and a larger one, "
                "as of 1, 2 and 4"
            )
        seen = worlds[-2]
    fitted = fit(
        [row for row in measured if row["world_size"] <= seen],
        [one for one in all_reduces if one["world_size"] <= seen],
    )
    held = []
    for row in measured:
        if row["world_size"] > seen and key(row) in fitted.batch_s:
            predicted = fitted.seconds(row)
            error = predicted / row["seconds_per_step"] - 1
            held.append(Held(row=row, predicted_s=predicted, error=error))
    return fitted, held
