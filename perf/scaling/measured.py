"""What the model makes of a measured run: fit, hold-out, laws, and the series of its figures."""

from typing import Any

import numpy as np

from perf.results import ON_CPU
from perf.scaling import fit as fits
from perf.scaling.figure import Series
from perf.scaling.laws import Law, law
from perf.scaling.model import Range

BEYOND = (16, 32, 64, 80)


def _line(row: dict[str, Any]) -> tuple:
    return (*fits.key(row), row["scaling"], row["sync"], row.get("placement"))


def _lines(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["world_size"]):
        found.setdefault(_line(row), []).append(row)
    return found


def _label(row: dict[str, Any]) -> str:
    more = [row["sync"], *([row["placement"]] if row.get("placement") else [])]
    return f"{row['method']}, {', '.join(more)}"


def _rounds(row: dict[str, Any]) -> list[float]:
    """Examples a second of each round; of the row where rounds were not kept."""
    if row.get("seconds") and row.get("sizes"):
        return (np.array(row["sizes"]) / np.array(row["seconds"])).tolist()
    return [row["examples_per_s"]]


def _laws(members: list[dict[str, Any]]) -> list[Law]:
    pairs = [(row["world_size"], rate) for row in members for rate in _rounds(row)]
    worlds, rates = [w for w, _ in pairs], [rate for _, rate in pairs]
    different = len(set(worlds))
    return [law(worlds, rates, usl=usl) for usl in (False, True) if different >= 2 + usl]


def _fit_text(fitted: fits.Fit) -> str:
    alpha = f"{1e6 * fitted.alpha_s:,.3g} µs" if fitted.identified else "not told apart from β"
    beta = f"{fitted.bytes_per_s / 1e9:,.3g} GB/s" if np.isfinite(fitted.bytes_per_s) else "–"
    return f"α {alpha}, β {beta}; relative error of the steps {fitted.relative_error:.1%}"


def _law_text(found: Law) -> str:
    text = f"{found.name} σ={found.sigma:.4f}"
    if found.intervals:
        text += " [{:.4f}, {:.4f}]".format(*found.intervals[0])
    if found.name == "USL":
        text += f", κ={found.kappa:.5f}"
        if found.intervals:
            text += " [{:.5f}, {:.5f}]".format(*found.intervals[1])
        return text
    if found.sigma >= 1:
        return f"{text}: more ranks are no faster"
    return f"{text}, parallel part {1 - found.sigma:.2%}"


def describe(run: dict[str, Any]) -> str:
    """Fit, hold-out and laws of a run, as text."""
    rows, bare = fits.rows(run), run.get("all_reduce", [])
    parts = []
    if run.get("machine_info", {}).get("device") == "cpu":
        parts.append(ON_CPU)
    for framework in dict.fromkeys(row.get("framework") for row in rows):
        own = [row for row in rows if row.get("framework") == framework]
        links = [one for one in bare if one.get("framework", framework) == framework]
        parts.append(f"{framework}, all worlds: {_fit_text(fits.fit(own, links))}")
        if len({row["world_size"] for row in own}) >= 3:
            fitted, held = fits.hold_out(own, links)
            parts.append(f"{framework}, hold-out: {_fit_text(fitted)}")
            for one in held:
                row = one.row
                parts.append(
                    f"  W={row['world_size']} {row['scaling']} {_label(row)}: predicted "
                    f"{1e3 * one.predicted_s:.1f} ms, measured "
                    f"{1e3 * row['seconds_per_step']:.1f} ms, {one.error:+.1%}"
                )
        for members in _lines(own).values():
            if found := _laws(members):
                first = members[0]
                laws = "; ".join(map(_law_text, found))
                parts.append(f"{first['scaling']} {_label(first)}: {laws}")
    return "\n".join(parts) + "\n"


def _series(members: list[dict[str, Any]], fitted: fits.Fit, beyond: bool) -> Series:
    first, worlds = members[0], [row["world_size"] for row in members]
    settings = dict(zip(worlds, members, strict=True))
    if beyond:
        for world in BEYOND:
            if world > worlds[-1]:
                grown = world / worlds[-1] if first["scaling"] == "weak" else 1
                further = members[-1] | {"world_size": world}
                further["expected_batch"] = members[-1]["expected_batch"] * grown
                if first["scaling"] == "weak":
                    further["num_examples"] = int(further.get("num_examples", 50_000) * grown)
                further.pop("trips_max", None)
                settings[world] = further
    rates = [row["expected_batch"] / fitted.seconds(row) for row in settings.values()]
    spread = 2 * fitted.relative_error

    def around(value):
        return Range(low=max(0.0, value * (1 - spread)), likely=value, high=value * (1 + spread))

    per_rank = [rate / world for rate, world in zip(rates, settings, strict=True)]
    base = first["examples_per_s"] / worlds[0]
    return Series(
        label=_label(first),
        worlds=list(settings),
        rates=list(map(around, rates)),
        efficiency=[around(one / per_rank[0]) for one in per_rank],
        measured=[
            (row["world_size"], row["examples_per_s"], row["examples_per_s"] / w / base)
            for w, row in zip(worlds, members, strict=True)
        ],
    )


def groups(run: dict[str, Any]) -> dict[str, tuple[str, str, list[Series]]]:
    """{name: (title, note, series)}: one figure for each framework, model and scaling."""
    rows = fits.rows(run)
    worlds = sorted({row["world_size"] for row in rows})
    seen = worlds[-2] if len(worlds) >= 3 else worlds[-1]
    cpu = run.get("machine_info", {}).get("device") == "cpu"
    found: dict[str, tuple[str, str, list[Series]]] = {}
    for members in _lines(rows).values():
        first = members[0]
        framework = first.get("framework")
        own = [r for r in rows if r.get("framework") == framework and r["world_size"] <= seen]
        if fits.key(first) not in {fits.key(row) for row in own}:
            continue
        bare = [
            one
            for one in run.get("all_reduce", [])
            if one.get("framework", framework) == framework and one["world_size"] <= seen
        ]
        name = f"{framework}-{first.get('model')}-{first['scaling']}"
        title = f"{first.get('model')}, {framework}, {first['scaling']} scaling"
        title += f"\n{ON_CPU}" if cpu else ""
        note = f"points: measured. lines: the model, fitted to W ≤ {seen}; band: ±2 of its error"
        entry = found.setdefault(name, (title, note, []))
        entry[2].append(_series(members, fits.fit(own, bare), beyond=not cpu))
    return found
