"""A long profile is measured in parts: each case once, and one complete run comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf import memory, partial, protocol, saved
from perf.profiles import Case, cases

ROOT = Path(__file__).parent.parent
METHODS = ("torch-sgd", "torch-opacus", "torch-bookkeeping")


def measured(folder, *, stop_after, status):
    """Run the smoke profile's torch methods in ``folder``; (what was measured so far, the run)."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "perf" / "cases" / "test_step.py")]
    command += ["--profile=smoke", f"--methods={','.join(METHODS)}", "--rounds=2", "--resume"]
    command += ["--device=cpu", "-p", "stopping", "-p", "no:cacheprovider"]
    log = folder / "measured.txt"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "MEASURED": str(log),
        "STOP_AFTER": str(stop_after),
    }
    before = set(folder.glob(".benchmarks/cpu/runs/*.json"))
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    (new,) = {*folder.glob(".benchmarks/cpu/runs/*.json")} - before
    return log.read_text().split(), saved.load(new), done.stdout


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_and_no_case_is_measured_twice(tmp_path):
    ids, run, _ = measured(tmp_path, stop_after=1, status=2)
    assert [row["status"] for row in run["rows"]] == ["ok", "interrupted", "interrupted"]
    first = run["rows"][0]["seconds"]

    ids, run, text = measured(tmp_path, stop_after=9, status=0)
    assert [case_id.split("eager-")[1] for case_id in ids] == list(METHODS), "each once"
    assert "1 finished cases are taken over" in text
    assert f"3 of {len(cases('smoke'))} cases of the profile smoke" in text
    rows = {row["method"]: row for row in run["rows"]}
    assert [row["status"] for row in run["rows"]] == ["ok"] * 3
    assert rows["torch-sgd"]["seconds"] == first
    assert all(row["peak_bytes"] > 0 and row["vs_best_sgd"] for row in run["rows"])
    timed = {entry["extra_info"]["method"]: entry["stats"]["data"] for entry in run["benchmarks"]}
    assert timed == {name: rows[name]["seconds"] for name in METHODS}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "FOLDER", tmp_path)
    row = protocol.blank(Case(model="digits-cnn", physical_batch=8, method="torch-sgd"), "smoke")
    found = partial.Partial("cpu", "smoke")
    found.keep(row | {"status": "ok"}, {"stats": {}})
    return found, row


def test_only_what_is_finished_counts(kept):
    found, row = kept
    for status in ("wrong", "error", "interrupted", "missing"):
        found.keep(row | {"case": status, "status": status}, None)
        assert found.take(status) is None
    assert found.take(row["case"])["benchmark"] == {"stats": {}}
    assert partial.left([row], [row["case"]]) == [row["case"]]
    assert partial.left([row | {"status": "unsupported"}], [row["case"]]) == []
    found.remove()
    assert found.take(row["case"]) is None


@pytest.mark.parametrize(("field", "asked"), [("commit", True), ("fingerprint", False)])
def test_another_commit_counts_if_asked_and_another_machine_never(kept, field, asked):
    found, row = kept
    (path,) = found.folder.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "other"}))
    assert found.take(row["case"]) is None
    assert found.refused == 1
    anyway = partial.Partial("cpu", "smoke", any_commit=True)
    assert bool(anyway.take(row["case"])) is asked


SLOW_SECOND = """#!/bin/sh
echo '{"case": "one", "peak_bytes": 1}'
for try in $(seq 300); do
  [ -e go ] && echo '{"case": "two", "peak_bytes": 2}' && exit
  sleep 0.1
done
"""


def test_each_peak_is_there_before_the_next_is_measured(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(SLOW_SECOND)
    script.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(script))
    found = memory.measure(["one", "two"], "cpu")
    assert next(found) == ("one", {"peak_bytes": 1})
    (tmp_path / "go").touch()
    assert list(found) == [("two", {"peak_bytes": 2})]
