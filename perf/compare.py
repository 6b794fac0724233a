"""
Compare two saved runs: ``python -m perf.compare BASE NEW``; without arguments, the newest run and
its profile's baseline.

A private row is judged by its slowdown, which pairs it with SGD in the same run; an SGD row by its
seconds per example, after the drift of the whole machine (the median change over all rows) is
divided out. ``slower``: intervals separate, the median is more than the threshold worse, and the
one-sided rank test survives Holm's correction over the whole table.

Exit codes: 0 nothing slower; 1 something is slower or wrong; 2 cannot be judged.
Another fingerprint of the same kind of device compares slowdowns only, and is advisory.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perf import saved
from perf.protocol import interval
from perf.table import newest

MINIMUM_ROUNDS = 7
LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One line: ``change`` is new/base of the judged figure; ``verdict`` one word."""

    case: str
    figure: str = ""
    base: float | None = None
    new: float | None = None
    change: float | None = None
    p: float = 1.0
    verdict: str
    note: str = ""


def _per_example(row: dict[str, Any]) -> np.ndarray:
    return np.array(row["seconds"]) / np.array(row["sizes"])


def drift(base: dict[str, Any], new: dict[str, Any]) -> float:
    """Median change of seconds per example over the rows that both runs have; 1 below 4 rows."""
    changes = [
        np.median(_per_example(new[case])) / np.median(_per_example(base[case]))
        for case in base.keys() & new.keys()
        if base[case]["status"] == new[case]["status"] == "ok"
    ]
    return float(np.median(changes)) if len(changes) >= 4 else 1.0


def _judge(case: str, figure: str, base: np.ndarray, new: np.ndarray, threshold: float) -> Verdict:
    from scipy.stats import mannwhitneyu

    old, now = float(np.median(base)), float(np.median(new))
    change = now / old
    line = Verdict(case=case, figure=figure, base=old, new=now, change=change, verdict="same")
    if min(len(base), len(new)) < MINIMUM_ROUNDS:
        return replace(line, verdict="unclear", note=f"fewer than {MINIMUM_ROUNDS} rounds")
    if 1 / (1 + threshold) <= change <= 1 + threshold:
        return line
    worse = change > 1
    p = mannwhitneyu(new, base, alternative="greater" if worse else "less").pvalue
    (low, high), (new_low, new_high) = interval(base), interval(new)
    separate = new_low > high if worse else new_high < low
    if not separate:
        return replace(line, verdict="unclear", note="intervals overlap")
    return replace(line, verdict="slower" if worse else "faster", p=float(p))


def _holm(lines: list[Verdict]) -> list[Verdict]:
    """Keep slower and faster only where Holm's step-down test over the whole table rejects."""
    order = sorted(range(len(lines)), key=lambda n: lines[n].p)
    result, rejecting = list(lines), True
    for rank, n in enumerate(order):
        rejecting = rejecting and lines[n].p <= LEVEL / (len(lines) - rank)
        if lines[n].verdict in ("slower", "faster") and not rejecting:
            result[n] = replace(lines[n], verdict="unclear", note="not significant over the table")
    return result


def compare(
    base: dict[str, Any], new: dict[str, Any], threshold: float = 0.1
) -> tuple[list[Verdict], bool, float]:
    """
    (verdicts, whether the fingerprints agree, the drift that was divided out).

    Raises:
        saved.Unusable: the runs are of different kinds of device.
    """
    infos = base["machine_info"], new["machine_info"]
    if infos[0]["device"] != infos[1]["device"]:
        raise saved.Unusable(f"{infos[0]['device']} and {infos[1]['device']} cannot be compared")
    same_machine = infos[0]["fingerprint"] == infos[1]["fingerprint"]
    old, now = ({row["case"]: row for row in saved.steps(run)} for run in (base, new))
    moved = drift(old, now) if same_machine else 1.0
    judged, rest = [], []
    for case in [*old, *(case for case in now if case not in old)]:
        a, b = old.get(case), now.get(case)
        if b is None or b["status"] in ("interrupted", "missing"):
            rest.append(Verdict(case=case, verdict="missing", note=b["reason"] if b else ""))
        elif b["status"] != "ok":
            known = a is not None and a["status"] == b["status"]
            rest.append(
                Verdict(case=case, verdict="same" if known else b["status"], note=b["reason"])
            )
        elif a is None or a["status"] != "ok":
            rest.append(Verdict(case=case, verdict="new"))
        elif "ratios" in b and "ratios" in a:
            figures = np.array(a["ratios"]), np.array(b["ratios"])
            judged.append(_judge(case, "× SGD", *figures, threshold))
        elif same_machine:
            figures = _per_example(a) * 1e3, _per_example(b) * 1e3 / moved
            judged.append(_judge(case, "ms/example", *figures, threshold))
        else:
            rest.append(Verdict(case=case, verdict="unclear", note="seconds of another machine"))
    lines = {line.case: line for line in [*_holm(judged), *rest]}
    return [lines[case] for case in dict.fromkeys([*old, *now])], same_machine, moved


def exit_code(lines: list[Verdict], *, gates: bool, strict: bool) -> int:
    """1 if something is wrong, or slower where ``gates``; under ``strict`` also if missing."""
    verdicts = {line.verdict for line in lines}
    if verdicts & {"wrong", "error"} or (strict and "missing" in verdicts):
        return 1
    return int("slower" in verdicts and (gates or strict))


def cells(line: Verdict) -> list[str]:
    """A verdict as table cells."""

    def number(value):
        return "" if value is None else f"{value:.3g}"

    change = "" if line.change is None else f"{line.change - 1:+.1%}"
    figures = [line.figure, number(line.base), number(line.new), change]
    return [line.case, *figures, line.verdict, line.note]


HEADERS = ("case", "figure", "base", "new", "change", "verdict", "note")


def report(lines: list[Verdict], same_machine: bool, moved: float, markdown: bool) -> str:
    """The comparison as text or Markdown, what was compared in its first line."""
    counts = {v: sum(line.verdict == v for line in lines) for v in {line.verdict for line in lines}}
    head = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    if same_machine:
        head += f". Same fingerprint; machine drift ×{moved:.2f} divided out of seconds."
    else:
        head += ". Another fingerprint: slowdowns only, advisory."
    rows = [cells(line) for line in lines]
    if markdown:
        table = ["| " + " | ".join(row) + " |" for row in (HEADERS, ["---"] * len(HEADERS), *rows)]
        return "\n".join([f"**Benchmarks: {head}**", "", *table]) + "\n"
    from rich.console import Console
    from rich.table import Table

    grid = Table(pad_edge=False)
    for header in HEADERS:
        grid.add_column(header)
    for row in rows:
        grid.add_row(*row)
    console = Console(width=132, highlight=False)
    with console.capture() as text:
        console.print(grid)
        console.print(head)
    return text.get()


def main(arguments: list[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="perf.compare", description=__doc__)
    parser.add_argument("base", nargs="?", help="default: the baseline of NEW's device and profile")
    parser.add_argument("new", nargs="?", help="default: the newest run")
    parser.add_argument("--threshold", type=float, default=0.1, help="0.1 is 10 %%")
    parser.add_argument("--strict", action="store_true", help="gate on another fingerprint too")
    parser.add_argument(
        "--markdown", metavar="FILE", help="also write Markdown, for a pull request"
    )
    parser.add_argument("--advisory", action="store_true", help="slower never fails")
    args = parser.parse_args(arguments)
    try:
        new = saved.load(args.new or newest())
        profile = next((row["profile"] for row in new["rows"]), "quick")
        device = new["machine_info"]["device"]
        base = saved.load(args.base or saved.FOLDER / device / f"{profile}.json")
        lines, same_machine, moved = compare(base, new, args.threshold)
    except saved.Unusable as error:
        print(f"perf.compare: {error}", file=sys.stderr)
        return 2
    print(report(lines, same_machine, moved, markdown=False), end="")
    if args.markdown:
        Path(args.markdown).write_text(report(lines, same_machine, moved, markdown=True))
    gates = same_machine and not args.advisory
    return exit_code(lines, gates=gates, strict=args.strict)


if __name__ == "__main__":
    sys.exit(main())
