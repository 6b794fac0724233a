"""What the model says of the default inputs, as Markdown: inputs, the three checks, the claim."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from perf.scaling import claim
from perf.scaling.inputs import (
    BOOKKEEPING,
    CLAIMED,
    GHOST,
    HOOKS,
    SGD_EVERY,
    SGD_ONCE,
    SLOWDOWN_SOURCES,
    private,
)
from perf.scaling.model import (
    FLOAT32,
    Load,
    Machine,
    Method,
    Range,
    Values,
    all_reduce_s,
    band,
    corners,
    efficiency,
    predict,
    step,
)
from perf.scaling.trips import PLACEMENTS, trips

WORLD = 80
WORLDS = (1, 2, 4, 8, 16, 32, 64, 80, 160)
METHODS = (SGD_EVERY, SGD_ONCE, HOOKS, GHOST, BOOKKEEPING)
DDP_OVERLAP = 2 / 3  # the backward pass, of forward and backward


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: Range) -> str:
    """Likely (low–high), in percent."""
    return f"{100 * value.likely:.1f} % ({100 * value.low:.1f}–{100 * value.high:.1f})"


def times(value: Range, digits: int = 2) -> str:
    """Likely (low–high)."""
    low, likely, high = (f"{v:,.{digits}f}" for v in (value.low, value.likely, value.high))
    return likely if low == high else f"{likely} ({low}–{high})"


def inputs(machine: Machine) -> str:
    """The table of inputs."""
    scales = {
        "examples_per_s": ("SGD on one device, examples/s", 1),
        "alpha_s": ("α, µs a hop", 1e6),
        "bytes_per_s": ("β, GB/s", 1e-9),
        "memory_bytes_per_s": ("memory, GB/s", 1e-9),
        "fix_s": ("paid once per logical batch, ms", 1e3),
    }
    rows = []
    for field, (name, scale) in scales.items():
        value = getattr(machine, field)
        numbers = [f"{scale * v:,.4g}" for v in (value.low, value.likely, value.high)]
        rows.append([name, *numbers, machine.sources[field]])
    for method in (HOOKS, GHOST, BOOKKEEPING):
        value = method.slowdown
        numbers = [f"{v:g}" for v in (value.low, value.likely, value.high)]
        rows.append([f"{method.name}, × SGD", *numbers, SLOWDOWN_SOURCES[method.name]])
    return table(("input", "low", "likely", "high", "source"), rows)


def at_world(load: Load, machine: Machine, methods: Sequence[Method], world: int = WORLD) -> str:
    """Where a step's time goes, and each method's efficiency over that of both SGDs."""
    base = [efficiency(load, m, world, corners(machine, m, load)) for m in (SGD_EVERY, SGD_ONCE)]
    rows = []
    for method in methods:
        values = corners(machine, method, load)
        found = step(load, method, world, values)
        own = efficiency(load, method, world, values)
        rows.append(
            [
                method.name,
                times(method.slowdown),
                times(band(found.seconds)),
                percent(band(found.comm_share)),
                percent(band(found.padding_share)),
                percent(band(own)),
                times(band(own / base[0])) if method is not SGD_EVERY else "–",
                times(band(own / base[1])) if method is not SGD_ONCE else "–",
            ]
        )
    headers = ("method", "× SGD", f"s/step at {world}", "communication", "padding", "efficiency")
    return table((*headers, "÷ SGD (every)", "÷ SGD (once)"), rows)


def over_worlds(load: Load, machine: Machine) -> str:
    """Efficiency in strong and weak scaling, then shares of T in strong scaling."""
    methods = (SGD_EVERY, SGD_ONCE, HOOKS, BOOKKEEPING)
    alone = load.expected_batch / WORLD
    weak = replace(
        load, scaling="weak", expected_batch=alone, num_examples=load.num_examples // WORLD
    )
    rows = []
    shard = replace(load, placement="shard")
    for name, kind, field in (
        ("strong: efficiency", load, "efficiency"),
        ("weak: efficiency", weak, "efficiency"),
        ("strong: communication", load, "comm_share"),
        ("strong, shard: waiting", shard, "straggler_share"),
    ):
        lines = [getattr(predict(kind, m, machine, WORLDS), field) for m in methods]
        for n, world in enumerate(WORLDS):
            total = kind.at(world)[0]
            rows.append([name, f"{world}", f"{total:,.0f}", *(percent(line[n]) for line in lines)])
    return table(("scaling: figure", "W", "L", *(m.name for m in methods)), rows)


def stragglers(load: Load, machine: Machine) -> str:
    """What the slowest rank costs where each rank draws its own part."""
    rows = []
    sizes = ((load.expected_batch, load.num_examples), (4096.0, 50_000))
    for placement in PLACEMENTS:
        for expected, examples in sizes:
            kind = replace(
                load, placement=placement, expected_batch=expected, num_examples=examples
            )
            drawn = trips(examples, expected / examples, WORLD, 1, placement)
            values = corners(machine, HOOKS, kind)
            share = band(step(kind, HOOKS, WORLD, values).straggler_share)
            own = band(efficiency(kind, HOOKS, WORLD, values))
            ratio = f"{drawn.slowest / drawn.mean:.3f}"
            rows.append(
                [
                    *(placement, f"{expected:,.0f}", f"{expected / examples:.3g}"),
                    *(ratio, percent(share), percent(own)),
                ]
            )
    headers = ("placement", "L", "q", f"E[max B_w]/E[B_w], W={WORLD}", "waiting")
    return table((*headers, f"efficiency, {HOOKS.name}"), rows)


def _likely(machine: Machine, method: Method, load: Load, slowdown: float) -> Values:
    exact = replace(method, slowdown=Range(low=slowdown, likely=slowdown, high=slowdown))
    values = corners(machine, exact, load)
    return Values(**{name: float(array[0]) for name, array in vars(values).items()})


def _quantity(value: float | None, scale: float, unit: str) -> str:
    return f"{scale * value:,.3g} {unit}" if value else "nothing"


def _claim_rows(load: Load, machine: Machine) -> list[list[str]]:
    overlapped = replace(SGD_EVERY, overlap=DDP_OVERLAP, name="SGD, every, hidden behind backward")
    cases = [(method, 1.0, "SGD") for method in (SGD_EVERY, overlapped, SGD_ONCE)]
    cases += [(HOOKS, getattr(HOOKS.slowdown, end), "DP-SGD") for end in ("low", "likely", "high")]
    cases += [(BOOKKEEPING, BOOKKEEPING.slowdown.likely, "DP-SGD")]
    rows = []
    for method, slowdown, name in cases:
        values = _likely(machine, method, load, slowdown)
        found = claim.needed(load, method, WORLD, values, CLAIMED[name])
        rows.append(
            [
                method.name,
                f"{slowdown:g}",
                f"{100 * CLAIMED[name]:.1f} %",
                f"{100 * float(efficiency(load, method, WORLD, values)):.1f} %",
                f"{found.overhead_s:.2f}",
                _quantity(found.bytes_per_s, 1e-9, "GB/s"),
                _quantity(found.alpha_s, 1e6, "µs"),
            ]
        )
    return rows


def claims(load: Load, machine: Machine) -> str:
    """Which α, β and sync would give the paper's efficiencies."""
    headers = ("method", "× SGD", "claimed", "predicted", "overhead s/step", "β needed", "α needed")
    parts = [table(headers, _claim_rows(load, machine))]
    loss = {name: 1 / share - 1 for name, share in CLAIMED.items()}
    same = loss["SGD"] / loss["DP-SGD"]
    lines = [
        f"- One and the same overhead per logical batch gives both numbers where DP-SGD's batch is "
        f"{same:.2f} × SGD's: (1/{CLAIMED['SGD']} − 1)/(1/{CLAIMED['DP-SGD']} − 1)."
    ]
    for sgd in (SGD_EVERY, SGD_ONCE):
        values = _likely(machine, sgd, load, 1.0)
        beta = claim.needed(load, sgd, WORLD, values, CLAIMED["SGD"]).bytes_per_s
        if beta is None:
            lines.append(f"- {sgd.name}: no β gives {CLAIMED['SGD']:.1%}.")
            continue
        slow = replace(_likely(machine, HOOKS, load, 1.0), bytes_per_s=beta)
        hooks = replace(slow, batch_s=slow.batch_s * HOOKS.slowdown.likely)
        there = float(efficiency(load, HOOKS, WORLD, hooks))
        wanted = claim.slowdown_for(load, HOOKS, WORLD, slow, CLAIMED["DP-SGD"])
        lines.append(
            f"- {sgd.name}: {CLAIMED['SGD']:.1%} needs β = {beta / 1e9:.2g} GB/s. On that link "
            f"DP-SGD at {HOOKS.slowdown.likely:g} × SGD would be at {there:.1%}; "
            f"{CLAIMED['DP-SGD']:.1%} would mean that its batch takes "
            + (f"{wanted:.2f} × SGD's." if wanted else "no time that this model can give.")
        )
    return "\n\n".join([parts[0], "\n".join(lines)])


def checks(load: Load, machine: Machine) -> str:
    """The three checks, in numbers, of the likely inputs."""

    def likely(method):
        values = corners(machine, method, load)
        return step(load, method, WORLD, values), efficiency(load, method, WORLD, values)

    (sgd, every), (_, once) = likely(SGD_EVERY), likely(SGD_ONCE)
    runs = {method.name: likely(method) for method in (HOOKS, GHOST, BOOKKEEPING)}
    hooks, own = runs[HOOKS.name]
    size = FLOAT32 * load.parameters
    one = float(all_reduce_s(WORLD, size, machine.alpha_s.likely, machine.bytes_per_s.likely))
    gains = ", ".join(
        f"{float(share[0] / every[0]):.3f} × ({name.removeprefix('DP-SGD, ')})"
        for name, (_, share) in runs.items()
    )
    against_once = ", ".join(f"{float(s[0] / once[0]):.3f}" for _, s in runs.values())
    return "\n".join(
        [
            f"1. An all-reduce moves the same {size / 1e6:,.0f} MB for all of them and takes "
            f"{1e3 * one:.0f} ms at W={WORLD}. It is {float(sgd.comm_share[0]):.1%} of a step of "
            f"SGD that reduces every physical batch, {float(hooks.comm_share[0]):.2%} of one of "
            "DP-SGD by Opacus's hooks.",
            f"2. Efficiency of DP-SGD over that of this SGD: {gains}. The faster the clipping, the "
            "smaller the advantage.",
            f"3. Over SGD that reduces once per logical batch, too: {against_once}. Reducing once "
            f"takes SGD from {float(every[0]):.1%} to {float(once[0]):.1%} of ideal, a factor of "
            f"{float(once[0] / every[0]):.3f}; all of the advantage of hooks is "
            f"{float(own[0] / every[0]):.3f}. What is left is what longer compute is worth.",
        ]
    )


def markdown(
    load: Load, machine: Machine, slowdowns: dict[tuple[str, str], Range] | None = None
) -> str:
    """The generated part of docs/scaling.md."""
    extra = [
        private(f"{method}, slowdown measured on {device}", value)
        for (device, method), value in (slowdowns or {}).items()
    ]
    size = (
        f"Predicted, not measured. {machine.name}; {load.parameters / 1e6:.1f} M parameters, "
        f"N={load.num_examples:,}, L={load.expected_batch:,.0f}, P={SGD_EVERY.physical_batch}. "
        "Likely (lowest–highest over all corners of the ranges)."
    )
    parts = [
        size,
        "**Inputs**",
        inputs(machine),
        f"**The three checks, at W={WORLD}**",
        checks(load, machine),
        at_world(load, machine, [*METHODS, *extra]),
        "**Strong and weak scaling**",
        over_worlds(load, machine),
        "**The slowest rank**",
        stragglers(load, machine),
        f"**The claim of arXiv:2406.17298 on 80 V100, not verified: DP {CLAIMED['DP-SGD']:.1%}, "
        f"SGD {CLAIMED['SGD']:.1%} of ideal**",
        claims(load, machine),
    ]
    return "\n\n".join(parts) + "\n"


def worlds(last: int = 256, points: int = 60) -> list[int]:
    """World sizes of the figure, evenly on a logarithmic scale, W=1 and 80 among them."""
    spread = np.geomspace(1, last, points).round().astype(int)
    return sorted({1, WORLD, last, *spread.tolist()})
