"""The figure: throughput and efficiency; predictions as bands, measurements as points."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perf.scaling.model import Load, Machine, Method, Range, predict

# Okabe and Ito's colours, told apart by readers with any colour vision; so are markers and dashes.
COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000")
DASHES: tuple = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)), "-")
MARKERS = "osD^vP*"


@dataclass(frozen=True, kw_only=True)
class Series:
    """
    One line of the figure.

    Attributes:
        worlds: [n] W of the prediction.
        rates: [n] predicted examples a second.
        efficiency: [n] predicted, 0 to 1.
        measured: (W, examples a second, efficiency) of each measured point.
    """

    label: str
    worlds: Sequence[int]
    rates: Sequence[Range]
    efficiency: Sequence[Range]
    measured: Sequence[tuple[int, float, float]] = ()


def predicted(
    load: Load, methods: Sequence[Method], machine: Machine, worlds: Sequence[int]
) -> list[Series]:
    """The series of methods for which nothing was measured."""
    found = []
    for method in methods:
        line = predict(load, method, machine, worlds)
        found.append(
            Series(
                label=method.name,
                worlds=worlds,
                rates=line.examples_per_s,
                efficiency=line.efficiency,
            )
        )
    return found


def draw(series: Sequence[Series], title: str, note: str, stem: Path) -> list[Path]:
    """
    Write ``stem``.svg and ``stem``.png.

    Args:
        series: the lines, at most seven.
        title: what was predicted or measured.
        note: below the panels: what the reader must know of the numbers.
        stem: path without its suffix.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    matplotlib.rcParams["svg.hashsalt"] = "dpsgd"  # the same figure is the same file
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    rate, share = figure.subplots(1, 2)
    for line, colour, dash, marker in zip(series, COLOURS, DASHES, MARKERS, strict=False):
        for axis, values, column in ((rate, line.rates, 1), (share, line.efficiency, 2)):
            likely = [value.likely for value in values]
            axis.fill_between(
                line.worlds,
                [value.low for value in values],
                [value.high for value in values],
                color=colour,
                alpha=0.13,
                linewidth=0,
            )
            label = f"{line.label} (predicted)" if column == 1 else None
            axis.plot(line.worlds, likely, color=colour, linestyle=dash, linewidth=1.8, label=label)
            if line.measured:
                axis.plot(
                    [point[0] for point in line.measured],
                    [point[column] for point in line.measured],
                    marker,
                    color=colour,
                    markeredgecolor="black",
                    label=f"{line.label} (measured)" if column == 1 else None,
                )
    first, last = series[0].worlds[0], series[0].worlds[-1]
    for number, line in enumerate(series):
        start = (line.measured[0][1] if line.measured else line.rates[0].likely) / first
        rate.plot(
            [first, last],
            [start * first, start * last],
            color="0.45",
            linewidth=0.8,
            linestyle=":",
            label=None if number else "ideal: W × one device (likely)",
        )
    share.axhline(1, color="0.45", linewidth=0.8, linestyle=":")
    ticks = [w for w in (1, 2, 4, 8, 16, 32, 80, 160, 320) if first <= w <= last]
    for axis in (rate, share):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(w) for w in ticks])
        axis.set_xlabel("devices W")
        axis.grid(alpha=0.25, linewidth=0.6)
    rate.set_yscale("log")
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    rate.set_ylabel("throughput, real examples/s")
    share.set_ylabel("efficiency: throughput / (W × one device)")
    share.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    reached = [v for line in series for v in line.efficiency]
    lowest = np.floor(10 * min(value.low for value in reached)) / 10 - 0.1
    share.set_ylim(max(0, lowest), max(1.05, *(value.high + 0.05 for value in reached)))
    figure.suptitle(title, fontsize=12)
    figure.legend(
        loc="outside lower center",
        ncols=2,
        fontsize=9,
        frameon=False,
        title=note,
        title_fontsize=9,
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        path = stem.parent / (stem.name + suffix)
        figure.savefig(path, dpi=120, metadata=metadata)
        written.append(path)
    return written
