"""
The table and the plots of a run over several world sizes: ``python -m perf.chart RUN.json``.

Plots: throughput with its ideal line, efficiency, and which share of a step goes to communication
(the bare all-reduce of the same bytes) and to waiting for the slowest rank.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from perf import saved
from perf.table import _number as number

HEADERS = (
    *("method", "SGD sync", "noise", "W", "L", "ms/step", "real ex/s", "efficiency"),
    *("× own SGD", "comm", "waits", "ε"),
)


def groups(run: dict[str, Any]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """{(framework, model, precision, scaling): rows}."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in run["rows"]:
        key = tuple(row[name] for name in ("framework", "model", "precision", "scaling"))
        found.setdefault(key, []).append(row)
    return found


def name(row: dict[str, Any]) -> str:
    """A line of the plots: the method, and how it synchronises or places its noise if unusual."""
    more = [row["sync"]] if row["sync"] != "once" else []
    return " ".join([row["method"], *more, *(["rank 0"] if row["placement"] == "rank0" else [])])


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    private = row["method"] != row["baseline"]
    start = [
        row["method"],
        "–" if private else row["sync"],
        row["placement"] if private else "–",
        str(row["world_size"]),
        f"{row['expected_batch']:,}",
    ]
    if row["status"] != "ok":
        return [*start, row["status"], row["reason"][:40], *[""] * 5]
    return [
        *start,
        number(1e3 * row["seconds_per_step"]),
        number(row["examples_per_s"]),
        f"{row['efficiency']:.0%}",
        f"{row['slowdown']:.2f}" if "slowdown" in row else "–",
        f"{row['comm_s'] / row['seconds_per_step']:.0%}",
        f"{row['wait_s'] / row['seconds_per_step']:.0%}",
        f"{row['epsilon']:.2f}" if row["epsilon"] is not None else "–",
    ]


def legend(run: dict[str, Any]) -> list[str]:
    """What the columns mean, and what the numbers are worth."""
    one = run["rows"][0]
    least = min((r["reference_world"] for r in run["rows"] if "reference_world" in r), default=1)
    return [
        *sorted({row["label"] for row in run["rows"] if row["label"].startswith("CPU")}),
        f"efficiency: examples a second and rank, against W={least}. comm: a bare all-reduce of "
        "the same bytes; waits: the mean rank, for the slowest one; both of the step's time. "
        f"ε: after T={one['steps']:,} steps at σ=1, δ={one['delta']:g}, {one['neighbours']}, "
        f"{one['accountant'].upper()}; the world size does not enter it, a growing q does.",
    ]


def show(run: dict[str, Any], file=None) -> None:
    """Print the tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, width=140, highlight=False)
    info = run["machine_info"]
    console.print(f"{info['names'][0]}; {len(set(info.get('hosts', [])))} hosts", markup=False)
    for (_, model, precision, scaling), rows in groups(run).items():
        grown = f", {rows[0]['grows']} grows with W" if rows[0]["grows"] else ""
        title = f"{model} · {precision} · P={rows[0]['physical_batch']} · {scaling}{grown}"
        grid = Table(title=title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)
        for place, header in enumerate(HEADERS):
            grid.add_column(header, justify="left" if place < 3 else "right", no_wrap=True)
        order = sorted(rows, key=lambda row: (row["method"] != row["baseline"], name(row)))
        for row in order:
            grid.add_row(*cells(row))
        console.print(grid)
    for line in legend(run):
        console.print(line, markup=False)


def plot(run: dict[str, Any], stem: Path) -> list[Path]:
    """One picture for each framework, model and precision: strong above weak scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures: dict[tuple[str, ...], dict[str, list]] = {}
    for (*key, scaling), rows in groups(run).items():
        rows = [row for row in rows if row["status"] == "ok"]
        if rows:
            pictures.setdefault(tuple(key), {})[scaling] = rows
    found = []
    for names, by_scaling in pictures.items():
        figure, axes = pyplot.subplots(
            len(by_scaling), 3, figsize=(13, 4 * len(by_scaling)), squeeze=False
        )
        for line, (scaling, rows) in zip(axes, by_scaling.items(), strict=True):
            _panels(line, scaling, rows)
        label = rows[0]["label"] if rows[0]["label"].startswith("CPU") else ""
        figure.suptitle(
            " · ".join([*names, f"P={rows[0]['physical_batch']}", *filter(None, [label])])
        )
        figure.tight_layout()
        found.append(stem.parent / f"{stem.name}-{'-'.join(names)}.png")
        figure.savefig(found[-1], dpi=120)
        pyplot.close(figure)
    return found


def _panels(axes, scaling: str, rows: list[dict[str, Any]]) -> None:
    from matplotlib import ticker

    throughput, efficiency, shares = axes
    for place, label in enumerate(dict.fromkeys(map(name, rows))):
        mine = sorted((r for r in rows if name(r) == label), key=lambda r: r["world_size"])
        worlds = [row["world_size"] for row in mine]
        color = f"C{place}"
        rate = [row["examples_per_s"] for row in mine]
        throughput.plot(worlds, rate, "o-", color=color, label=label)
        ideal = [rate[0] / worlds[0] * world for world in worlds]
        throughput.plot(worlds, ideal, ":", color=color, linewidth=1)
        efficiency.plot(worlds, [row["efficiency"] for row in mine], "o-", color=color, label=label)
        for figure, style in (("comm_s", "o-"), ("wait_s", "x--")):
            part = [row[figure] / row["seconds_per_step"] for row in mine]
            shares.plot(worlds, part, style, color=color, label=f"{label}, {figure[:4]}")
    throughput.set(title=f"{scaling}: real examples/s (dotted: ideal)", xscale="log", yscale="log")
    efficiency.axhline(1, color="gray", linestyle=":", linewidth=1)
    efficiency.set(title=f"{scaling}: efficiency", xscale="log", ylim=(0, None))
    shares.set(title=f"{scaling}: share of a step", xscale="log", ylim=(0, None))
    throughput.yaxis.set_minor_formatter("{x:,.0f}")
    throughput.yaxis.set_major_formatter("{x:,.0f}")
    for panel in (efficiency, shares):
        panel.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=None))
    worlds = sorted({row["world_size"] for row in rows})
    for panel in axes:
        panel.set_xticks(worlds, map(str, worlds))
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.set_xlabel("devices")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)


def main() -> None:
    """Print the table of a run, and plot it beside its file."""
    parser = argparse.ArgumentParser(prog="perf.chart", description=__doc__)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    try:
        run = saved.load(args.run)
    except saved.Unusable as error:
        sys.exit(f"perf.chart: {error}")
    show(run)
    for picture in plot(run, args.run.with_suffix("")):
        print(f"plot {picture}")


if __name__ == "__main__":
    main()
