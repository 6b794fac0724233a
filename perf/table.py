"""
The table of a saved run: ``python -m perf.table [RUN.json] [--markdown]``; default: newest.

``--write FILE`` puts it into a Markdown file between ``<!-- PROFILE -->`` and ``<!-- end -->``.
Of several runs, it is one line for each model: what privacy costs, by method.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

from perf import device, saved
from perf.check import TOLERANCE

HEADERS = (
    "method",
    "mode",
    "real ex/s",
    "× own SGD (q1–q3)",
    "× best SGD",
    "peak MB",
    "first s",
    "update ms",
    "compiles",
    "padding",
    "spread",
)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(value)))}f}"


def _cells(row: dict[str, Any], mark: str) -> list[str]:
    mode = "compiled" if row["compile"] else "eager"
    if row["status"] != "ok":
        return [row["method"] + mark, mode, row["status"]] + [""] * 8
    slow = "–"
    if row.get("slowdown"):
        low, high = row["slowdown_q1"], row["slowdown_q3"]
        slow = f"{row['slowdown']:.2f} ({low:.2f}–{high:.2f})"
    compiles = str(row["compiles"]) + (f"+{row['recompiles']}" if row.get("recompiles") else "")
    peak = row.get("peak_bytes")
    return [
        row["method"] + mark,
        mode,
        _number(row["examples_per_s"]),
        slow,
        f"{row['vs_best_sgd']:.2f}" if row.get("vs_best_sgd") else "–",
        _number(peak / 1e6 if peak else None),
        _number(row["first_step_s"], 2),
        _number(1e3 * row["update_s"], 2),
        compiles,
        f"{row['padding_fraction']:.0%}",
        f"{row['iqr_fraction']:.0%}",
    ]


def _notes(row: dict[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [f"{row['status']}: {row['reason']}"]
    notes = list(row.get("deviations", []))
    cold = row.get("examples_per_s_with_recompiles")
    if cold:
        notes.append(
            f"recompiles for each new size: {_number(cold)} real ex/s with them (first draws)"
        )
    if row.get("checked_to", 0) > TOLERANCE[row["precision"]]:
        notes.append(
            f"checked to {row['checked_to']:.1%}: ReLUs about to switch answer rounding errors"
        )
    return notes


def sections(run: dict[str, Any]) -> tuple[list[tuple[str, list[list[str]]]], list[str]]:
    """([(title, rows of cells)], footnotes) over the training steps of a run."""
    notes: list[str] = []
    found = []

    def group(row):
        return tuple(row[k] for k in ("model", "precision", "physical_batch", "expected_batch"))

    rows = saved.steps(run)
    order = {key: n for n, key in reversed(list(enumerate(map(group, rows))))}
    rows = sorted(rows, key=lambda row: order[group(row)])
    for (model, precision, physical, expected), members in itertools.groupby(rows, group):
        lines = []
        for row in members:
            marks = []
            for note in _notes(row):
                if note not in notes:
                    notes.append(note)
                marks.append(str(notes.index(note) + 1))
            lines.append(_cells(row, f" [{','.join(marks)}]" if marks else ""))
        found.append((f"{model} · {precision} · P={physical} · L={expected}", lines))
    return found, [f"[{n}] {note}" for n, note in enumerate(notes, 1)]


CALLS = "outside of a step: one Poisson draw at qN=1,000; one physical batch loaded, transferred"
CALL_HEADERS = ("call", "by", "size", "µs")


def calls(run: dict[str, Any]) -> list[list[str]]:
    """Cells of what is measured outside of a step."""
    rows = [row for row in run["rows"] if row.get("kind", "step") not in ("step", "padding")]
    return [
        [
            row["kind"],
            row["method"],
            row["size"],
            _number(1e6 * row["call_s"]) if row["status"] == "ok" else row["status"],
        ]
        for row in rows
    ]


def across(run: dict[str, Any]) -> list[str]:
    """
    JAX over PyTorch in real examples a second, the fastest SGD and private row of each.

    The frameworks are measured one after the other: these ratios are not paired.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in saved.steps(run):
        if row["status"] == "ok":
            names = ("model", "precision", "physical_batch", "expected_batch")
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    lines = []
    for (model, precision, physical, expected), rows in groups.items():
        best: dict[tuple, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: row["examples_per_s"]):
            best[row["framework"], saved.is_sgd(row)] = row
        parts = []
        for sgd, what in ((True, "SGD"), (False, "private")):
            one, two = (best.get((framework, sgd)) for framework in ("jax", "torch"))
            if one and two:
                ratio = one["examples_per_s"] / two["examples_per_s"]
                parts.append(f"{what} {ratio:.2f} ({one['method']} / {two['method']})")
        if parts:
            size = f"{model} · {precision} · P={physical} · L={expected}"
            lines.append(f"JAX / PyTorch, real ex/s, {size}: {', '.join(parts)}")
    return lines


PADDING_HEADERS = ("way", "compiles", "padding", "real ex/s", "with compiling")


def padding(run: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Title and cells of the ways to give draws of every size one shape."""
    rows = [row for row in run["rows"] if row.get("kind") == "padding"]
    cells = [
        [
            row["method"],
            str(row["compiles"]),
            f"{row['padding_fraction']:.0%}",
            _number(row["examples_per_s"]),
            _number(row["examples_per_s_with_compiles"]),
        ]
        if row["status"] == "ok"
        else [row["method"], row["status"], "", "", ""]
        for row in rows
    ]
    return f"static shapes for Poisson draws · {rows[0]['size'] if rows else ''}", cells


HEADLINE = (
    *("torch-bookkeeping", "torch-opacus", "torch-opacus-ghost"),
    *("jax-bookkeeping", "jax-masked", "jax-privacy"),
)


def headline(runs: list[dict[str, Any]]) -> str:
    """× own SGD by model, a Markdown table of each run: PyTorch eager, JAX compiled, L = 8P."""
    return "\n".join(map(_headline, runs))


def _headline(run: dict[str, Any]) -> str:
    found: dict[tuple, dict[str, str]] = {}
    for row in saved.steps(run):
        usual = row["expected_batch"] == 8 * row["physical_batch"]
        if usual and row["compile"] == (row["framework"] == "jax") and row["method"] in HEADLINE:
            value = f"{row['slowdown']:.2f}" if row.get("slowdown") else row["status"]
            key = row["model"], row["physical_batch"]
            found.setdefault(key, {})[row["method"]] = value
    methods = [name for name in HEADLINE if any(name in cells for cells in found.values())]
    lines = [_machine(run), "", "| × SGD | P | " + " | ".join(methods) + " |"]
    lines.append("|---" * (2 + len(methods)) + "|")
    for (model, physical), cells in found.items():
        shown = " | ".join(cells.get(name, "–") for name in methods)
        lines.append(f"| {model} | {physical} | {shown} |")
    return "\n".join(lines) + "\n"


def _machine(run: dict[str, Any]) -> str:
    info = run["machine_info"]
    name, cpu = info["names"][0], info.get("cpu", {})
    if info["device"] == "cpu" and "family" in cpu and "(family" not in name:
        name = device.distinct(name, cpu["family"], cpu["model"], cpu.get("flags", ()))
    return f"{name}, {info['threads']} threads"


def _title(run: dict[str, Any]) -> str:
    libraries = run["machine_info"]["libraries"]
    names = ("torch", "jax", "opacus", "optax", "jax-privacy")
    return f"{_machine(run)}; {', '.join(f'{n} {libraries[n]}' for n in names if n in libraries)}"


LEGEND = (
    "σ=1, C=1, Adam; true Poisson draws. real ex/s: drawn examples, padding not counted. "
    "× own SGD: median of paired rounds, lower is better. compiles: "
    "+n are recompiles. spread: IQR/median."
)


def markdown(run: dict[str, Any]) -> str:
    """The run as Markdown."""

    def table(headers, rows):
        lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
        return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])

    found, notes = sections(run)
    parts = [_title(run)]
    parts += [f"**{title}**\n\n{table(HEADERS, rows)}" for title, rows in found]
    if lines := across(run):
        parts.append("  \n".join(lines))
    if rows := calls(run):
        parts.append(f"**{CALLS}**\n\n{table(CALL_HEADERS, rows)}")
    title, rows = padding(run)
    if rows:
        parts.append(f"**{title}**\n\n{table(PADDING_HEADERS, rows)}")
    return "\n\n".join([*parts, LEGEND, "  \n".join(notes)]).strip() + "\n"


def show(run: dict[str, Any], file=None) -> None:
    """Print the run to the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    wide = not (file or sys.stdout).isatty()
    console = Console(file=file, width=150 if wide else None, highlight=False)
    console.print(_title(run), markup=False)

    def table(title, headers, rows):
        console.print(title, markup=False, style="italic")
        grid = Table(pad_edge=False, box=box.SIMPLE_HEAD)
        for n, header in enumerate(headers):
            grid.add_column(header, justify="left" if n < 2 else "right", no_wrap=True)
        for cells in rows:
            grid.add_row(*(cell.replace("[", r"\[") for cell in cells))
        console.print(grid)

    found, notes = sections(run)
    for title, rows in found:
        table(title, HEADERS, rows)
    for line in across(run):
        console.print(line, markup=False)
    if rows := calls(run):
        table(CALLS, CALL_HEADERS, rows)
    title, rows = padding(run)
    if rows:
        table(title, PADDING_HEADERS, rows)
    for line in [LEGEND, *notes]:
        console.print(line, markup=False)


def newest() -> Path:
    """The newest run of one device."""
    runs = [p for p in saved.FOLDER.glob("*/runs/*.json") if not p.stem.endswith("-multi")]
    runs.sort(key=lambda path: path.stat().st_mtime)
    if not runs:
        raise saved.Unusable(
            "no saved run under .benchmarks/*/runs: measure first (nox -s perf_cpu)"
        )
    return runs[-1]


def write(name: str, text: str, path: Path) -> None:
    """Replace what stands between the marks of ``name`` in a Markdown file."""
    mark, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, found, rest = path.read_text().partition(mark)
    if not found or end not in rest:
        sys.exit(f"perf.table: {path} has no {mark.strip()} … {end} to write between")
    path.write_text(before + mark + text + end + rest.partition(end)[2])


def main() -> None:
    """Print one run, or one line for each model of several."""
    parser = argparse.ArgumentParser(prog="perf.table", description=__doc__)
    parser.add_argument("run", nargs="*")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--write", metavar="FILE", help="between the profile's marks of this file")
    args = parser.parse_args()
    try:
        runs = [saved.load(path) for path in args.run or [newest()]]
    except saved.Unusable as error:
        sys.exit(f"perf.table: {error}")
    if any(row.get("kind") == "scaling" for run in runs for row in run["rows"]):
        sys.exit("perf.table: a run over several devices: python -m perf.chart shows it")
    run, several = runs[0], len(runs) > 1
    name, text = run["rows"][0]["profile"], headline(runs) if several else markdown(run)
    if args.write:
        write("headline" if several else name, text, Path(args.write))
    elif args.markdown or several:
        print(text, end="")
    else:
        show(run)


if __name__ == "__main__":
    main()
