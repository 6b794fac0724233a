"""``torchrun … -m dpsgd.train``: the same run on two ranks, and resumed after a death."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpsgd.train import main

TESTS = Path(__file__).parent
LINE = "--method torch-bookkeeping --device cpu --steps 6 --sample-rate 0.04 --checkpoint-every 2"


def torchrun(*what, kill=""):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launcher, "--nproc-per-node=2", *what],
        env=os.environ | {"OMP_NUM_THREADS": "1", "KILL": kill, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def parameters(folder):
    with np.load(folder / "checkpoint.npz") as saved:
        return np.concatenate([saved[n].ravel() for n in sorted(saved) if n.startswith("model/")])


def test_two_ranks_train_as_one_does(tmp_path, capsys):
    line = [*LINE.split(), "--noise-multiplier", "0", "--seed", "3", "--optimizer", "sgd"]
    many, one = tmp_path / "many", tmp_path / "one"
    run = torchrun("-m", "dpsgd.train", *line, "--checkpoint", str(many))
    assert run.returncode == 0, run.stderr
    assert main([*line, "--checkpoint", str(one)]) == 0
    out = capsys.readouterr().out
    assert run.stdout == out, "once, and the same"
    assert "test accuracy" in out
    np.testing.assert_allclose(parameters(many), parameters(one), rtol=0, atol=1e-6)
    assert sorted(p.name for p in many.iterdir()) == ["checkpoint.npz", "keys", "keys.1", "ledger"]
    assert [oct((many / k).stat().st_mode & 0o777) for k in ("keys", "keys.1")] == ["0o600"] * 2


@pytest.mark.slow
def test_two_runs_in_one_launch_do_not_read_each_other():
    first, second = ([*LINE.split(), "--epsilon", epsilon] for epsilon in ("8", "2"))
    run = torchrun(str(TESTS / "ranks_train.py"), *first, "then", *second)
    assert run.returncode == 0, run.stderr
    said = [float(text.split()[2]) for text in run.stdout.splitlines() if text.startswith("ε")]
    assert 7.9 < said[0] <= 8
    assert 1.9 < said[1] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["round-robin", "shard"])
def test_two_ranks_resume_after_one_has_died(tmp_path, capsys, placement):
    line = [*LINE.split(), "--noise-multiplier", "1", "--placement", placement]
    script, whole, broken = str(TESTS / "ranks_train.py"), tmp_path / "whole", tmp_path / "broken"
    seeded = [*line, "--seed", "3", "--checkpoint"]
    full = torchrun(script, *seeded, str(whole))
    assert full.returncode == 0, full.stderr
    died = torchrun(script, *seeded, str(broken), kill="1:4")
    assert died.returncode != 0
    resumed = torchrun(script, *line, "--checkpoint", str(broken), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    np.testing.assert_array_equal(parameters(broken), parameters(whole))
    assert main([*LINE.split(), "--noise-multiplier", "1"]) == 0
    alone = capsys.readouterr().out.splitlines()
    for run in (full, resumed):
        said = [text for text in run.stdout.splitlines() if text.startswith("ε")]
        assert said == [text for text in alone if text.startswith("ε")], "no world size in ε"
