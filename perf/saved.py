"""Saved runs: pytest-benchmark's JSON plus ``rows``, one per case, whatever became of it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perf.protocol import SCHEMA

FOLDER = Path(".benchmarks")


class Unusable(Exception):
    """A file that is no saved run of this schema; says what to do."""


def load(path: str | Path) -> dict[str, Any]:
    """
    A saved run.

    Raises:
        Unusable: no such file, not JSON, no rows, or another schema.
    """
    path = Path(path)
    try:
        run = json.loads(path.read_text())
    except FileNotFoundError:
        raise Unusable(f"{path} does not exist: measure first, or give another file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Unusable(f"{path} is not JSON ({error}): measure again") from None
    if not isinstance(run, dict) or not isinstance(run.get("rows"), list):
        raise Unusable(f"{path} holds no rows: it is no run of this suite")
    schemas = {row.get("schema") for row in run["rows"]} or {SCHEMA}
    if schemas != {SCHEMA}:
        raise Unusable(f"{path} has schema {schemas}, this suite reads {SCHEMA}: measure again")
    return run


def save(run: dict[str, Any], path: str | Path) -> Path:
    """Write a run; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


def steps(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of training steps."""
    return [row for row in run["rows"] if row.get("kind", "step") == "step"]


def is_sgd(row: dict[str, Any]) -> bool:
    """Whether the row is of a method without privacy."""
    return row["method"].endswith(("-sgd", "-sgd-tuned"))


def best_sgd(rows: Iterable[dict[str, Any]]) -> None:
    """
    Set ``vs_best_sgd``: against that framework's fastest SGD, any mode, same precision.

    A paired row's is its slowdown times what its own SGD loses to the fastest, so that a machine
    whose speed changed between the rows does not enter; a paired SGD's rate is its own SGD's over
    its slowdown.
    """
    rows = [row for row in rows if row["status"] == "ok" and "baseline" in row]

    def group(row):
        names = ("framework", "model", "physical_batch", "expected_batch", "precision")
        return tuple(row[name] for name in names)

    own = {
        (*group(row), row["compile"], row["method"]): row["examples_per_s"]
        for row in rows
        if row["method"] == row["baseline"]
    }

    def baseline_rate(row):
        return own.get((*group(row), row["compile"], row["baseline"]))

    fastest: dict[tuple, float] = {}
    for row in rows:
        if is_sgd(row):
            paired = "slowdown" in row and baseline_rate(row)
            rate = paired / row["slowdown"] if paired else row["examples_per_s"]
            fastest[group(row)] = max(fastest.get(group(row), 0), rate)
    for row in rows:
        rate = baseline_rate(row)
        if rate and "slowdown" in row:
            row["vs_best_sgd"] = row["slowdown"] * fastest[group(row)] / rate
        elif group(row) in fastest:
            row["vs_best_sgd"] = fastest[group(row)] / row["examples_per_s"]


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of several: rows and benchmarks joined; libraries of all; ``vs_best_sgd`` set."""
    merged = dict(parts[0])
    merged["rows"] = [row for part in parts for row in part["rows"]]
    merged["benchmarks"] = [entry for part in parts for entry in part.get("benchmarks", [])]
    merged["machine_info"] = dict(parts[0]["machine_info"])
    merged["machine_info"]["fingerprint"] = "+".join(
        sorted({part["machine_info"]["fingerprint"] for part in parts})
    )
    libraries: dict[str, str] = {}
    for part in parts:
        libraries |= part["machine_info"]["libraries"]
    merged["machine_info"]["libraries"] = libraries
    best_sgd(merged["rows"])
    for entry in merged["benchmarks"]:
        for row in merged["rows"]:
            if row["case"] == entry["extra_info"].get("case"):
                entry["extra_info"] = row
    return merged
