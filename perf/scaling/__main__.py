"""
Draw and explain: ``python -m perf.scaling [RUN.json …] [--out STEM] [--write docs/scaling.md]``.

Without a run: predictions from ranges of inputs. With runs: the fit, its hold-out, Amdahl's and the
universal law, and the figure of predicted lines with measured points. ``--write`` puts the one or
the other between its marks of a page, and draws predictions beside it; without, or ``--out``, they
are drawn in ``.benchmarks/scaling/runs``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perf import saved
from perf.scaling import figure, report
from perf.scaling.inputs import (
    BOOKKEEPING,
    HOOKS,
    LOAD,
    MACHINES,
    SGD_EVERY,
    SGD_ONCE,
    measured_slowdowns,
)
from perf.scaling.measured import describe, groups
from perf.scaling.model import SCALINGS, Machine, Range
from perf.scaling.trips import PLACEMENTS

MARK, MEASURED, END = "<!-- scaling -->\n", "<!-- measured -->\n", "<!-- end -->"
RANGES = ("examples_per_s", "alpha_s", "bytes_per_s", "fix_s")


def write(text: str, path: Path, mark: str = MARK) -> None:
    """
    Replace what stands between the marks of a Markdown file.

    Raises:
        saved.Unusable: there is no such file, or it has no such marks.
    """
    marks = f"{mark.strip()} … {END.strip()}"
    try:
        before, found, rest = path.read_text().partition(mark)
    except OSError as error:
        raise saved.Unusable(
            f"{path}: {error.strerror}: give --write a page that has the marks {marks}"
        ) from None
    if not found or END not in rest:
        raise saved.Unusable(f"{path} has no marks {marks}: put them where it is to be written")
    path.write_text(before + mark + text + END + rest.partition(END)[2])


def _machine(args: argparse.Namespace) -> Machine:
    found = MACHINES[args.machine]
    for name in RANGES:
        if value := getattr(args, name):
            low, likely, high = value
            given: dict[str, Any] = {name: Range(low=low, likely=likely, high=high)}
            sources = found.sources | {name: "given on the command line"}
            found = replace(found, sources=sources, **given)
    return found


def _predict(args: argparse.Namespace) -> None:
    machine = _machine(args)
    methods = (SGD_EVERY, SGD_ONCE, HOOKS, BOOKKEEPING)
    load = replace(LOAD, placement=args.placement, scaling=args.scaling, grows=args.grows)
    size = "L = 25,000"
    if args.scaling == "weak":
        load = replace(
            load,
            expected_batch=LOAD.expected_batch / report.WORLD,
            num_examples=LOAD.num_examples // (report.WORLD if args.grows == "N" else 1),
        )
        size = f"L = 25,000 at W = {report.WORLD} and in proportion"
    last = 2 * report.WORLD if args.grows == "q" else 256  # L = N there
    series = figure.predicted(load, methods, machine, report.worlds(last))
    title = f"ViT-B/16 on {machine.name}, {args.placement}, {size}: predicted, not measured"
    note = "bands: all corners of the inputs' ranges. no point here was measured\n"
    note += "teeth: the last physical batch of a rank is padded to P"
    text = report.markdown(LOAD, machine, measured_slowdowns())
    stem = saved.FOLDER / "scaling" / "runs" / args.machine
    if args.write:
        write(text, args.write)
        stem = args.write.with_suffix("")
    else:
        print(text, end="")
    for path in figure.draw(series, title, note, args.out or stem):
        print(f"figure {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict or fit; 2 if a run cannot be used."""
    parser = argparse.ArgumentParser(prog="perf.scaling", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json")
    parser.add_argument("--out", type=Path, help="of the figure, without suffix")
    parser.add_argument("--write", type=Path, help=f"between the marks of this file, to {END}")
    parser.add_argument("--machine", default="v100", choices=sorted(MACHINES))
    parser.add_argument("--placement", default=PLACEMENTS[0], choices=PLACEMENTS, help="of draws")
    parser.add_argument("--scaling", default=SCALINGS[0], choices=SCALINGS)
    parser.add_argument("--grows", default="N", choices=("q", "N"), help="with W, if weak")
    for name in RANGES:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, nargs=3, metavar=("LOW", "LIKELY", "HIGH")
        )
    args = parser.parse_args(arguments)
    try:
        if not args.runs:
            _predict(args)
        for path in args.runs:
            run = saved.load(path)
            text = describe(run)
            print(f"{path}\n\n{text}")
            if args.write:
                write(f"```\n{text}```\n", args.write, MEASURED)
            stem = args.out or path.with_suffix("")
            for name, (title, note, series) in groups(run).items():
                for picture in figure.draw(
                    series, title, note, stem.parent / f"{stem.name}-{name}"
                ):
                    print(f"figure {picture}")
    except (saved.Unusable, ValueError) as error:
        print(f"perf.scaling: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
