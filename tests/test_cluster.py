"""The cluster's script: what it says, that bash reads it, what is refused; tasks that meet."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from perf import cluster, device, place, plan
from perf.results import Job

ROOT = Path(__file__).parent.parent


def script(capsys, *options):
    assert cluster.main(["--dry-run", *options]) == 0
    return capsys.readouterr().out


def syntax(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_script_sweeps_all_sizes_in_one_allocation(capsys, tmp_path):
    options = ["--nodes", "20", "--gpus-per-node", "4", "--folder", str(tmp_path / "a b")]
    options += ["--directive=--partition=gpu", "--setup", "module load cuda"]
    text = script(capsys, *options)
    assert syntax(text)
    assert "@{" not in text
    assert "@@" not in text
    lines = text.splitlines()
    for wanted in ("--nodes=20", "--gpus-per-node=4", "--partition=gpu", "--ntasks-per-node=4"):
        assert f"#SBATCH {wanted}" in lines
    assert "module load cuda" in lines
    last_directive = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    first_command = min(n for n, line in enumerate(lines) if line and line[0] != "#")
    assert last_directive < first_command, "sbatch reads no directive after a command"
    for framework in ("torch", "jax"):
        steps = [line.split()[1:] for line in lines if line.startswith(f"{framework} ")]
        found = [(int(nodes), int(each)) for nodes, each, _ in steps]
        within = [(1, 1), (1, 2), (1, 4)]
        assert found == [*within, (2, 4), (4, 4), (8, 4), (16, 4), (20, 4)]
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_cpu_ranks_and_every_size(capsys):
    text = script(
        capsys, "--devices", "cpu", "--nodes", "3", "--gpus-per-node", "1", "--counts", "all"
    )
    assert syntax(text)
    assert "--gpus-per-node" not in text
    assert "JAX_PLATFORMS=cpu" in text
    assert [n for n in (1, 2, 3) if f"torch {n} 1 torch-w{n}\n" in text] == [1, 2, 3]
    check = script(capsys, "--nodes", "2", "--gpus-per-node", "2", "--check")
    assert "place 2 2 2x2" in check
    assert syntax(check)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "0"], "--nodes is 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--nodes", "4", "--counts", "1,8"], "each must lie in 1 … 4"),
        (["--framework", "jax", "--methods", "torch-sgd"], "no method of jax"),
        (["--methods", "jax-nothing"], "did you mean"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words, capsys):
    assert cluster.main(["--dry-run", *options]) == 2
    assert words in capsys.readouterr().err


def test_without_sbatch_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cluster.main(["--folder", str(tmp_path / "run")]) == 2
    assert "no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_jobs_are_written_and_submitted(capsys, monkeypatch, tmp_path):
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ -f "$1" ] && echo Submitted batch job 7 || exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    folder = tmp_path / "run"
    assert cluster.main(["--nodes", "2", "--gpus-per-node", "2", "--folder", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "Submitted batch job 7" in said
    assert f"--collect {folder}" in said
    worlds = {(j.framework, j.world_size) for j in map(Job.load, folder.glob("*-w*.json"))}
    assert worlds == {(name, w) for name in ("torch", "jax") for w in (1, 2, 4)}
    assert cluster.main(["--collect", str(folder)]) == 2
    assert "has the job begun" in capsys.readouterr().err
    fake.write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    assert cluster.main(["--folder", str(folder)]) == 2
    assert "no such partition" in capsys.readouterr().err


def test_collecting_keeps_what_there_is_and_names_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "submit", lambda text, found, folder: [j.write() for j in found])
    options = ["--nodes", "1", "--gpus-per-node", "1", "--devices", "cpu", "--framework", "torch"]
    folder = tmp_path / "run"
    assert cluster.main([*options, "--scaling", "strong", "--folder", str(folder)]) == 0
    job = Job.load(next(folder.glob("*-w1.json")))
    numbers = {"seconds_per_step": 1.0, "examples_per_s": 9.0, "comm_s": 0.0, "wait_s": 0.0}
    done = {job.settings[0].id: {"status": "ok", "reason": "", **numbers}}
    facts = {"device": "cpu", "names": ["x"], "threads": 1, "libraries": {}, "fingerprint": "f"}
    result = {"rows": done, "hosts": ["n1"], "machine_info": facts, "all_reduce": []}
    job.result.write_text(json.dumps(result))
    assert cluster.main(["--collect", str(folder)]) == 1
    (path,) = Path(".benchmarks/cpu/runs").glob("*-multi.json")
    statuses = [row["status"] for row in json.loads(path.read_text())["rows"]]
    assert statuses == ["ok", "error", "missing"]


def test_a_job_that_measured_nothing_says_why(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "nvidia", lambda query: [])  # as on a login node
    monkeypatch.setattr(plan, "_epsilon", lambda sample_rate: 1.0)
    monkeypatch.setattr(cluster, "submit", lambda text, found, folder: [j.write() for j in found])
    folder = tmp_path / "run"
    options = ["--gpus-per-node", "1", "--framework", "torch", "--folder", str(folder)]
    assert cluster.main(options) == 0
    reason = {"status": "error", "reason": "RuntimeError: torch does not see the device 'cuda'"}
    (folder / "torch-w1.result.failed").write_text(json.dumps(reason))
    capsys.readouterr()
    assert cluster.main(["--collect", str(folder)]) == 1
    assert f"torch-w1: error: {reason['reason']}\n" in capsys.readouterr().out
    (path,) = Path(".benchmarks/unknown-gpu/runs").glob("*-multi.json")
    statuses = [row["status"] for row in json.loads(path.read_text())["rows"]]
    assert statuses == ["error"] + ["missing"] * 5


def test_tasks_meet(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    target = tmp_path / "placed"
    tasks = []
    for rank in (2, 1, 0):  # rank 0, whom the others look for, comes last
        names = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % 2, "SLURM_NTASKS": 3}
        names["SLURMD_NODENAME"] = f"node{rank // 2}"
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in names.items()}
        command = [sys.executable, "-m", "perf.place", "127.0.0.1", port, str(target)]
        tasks.append(subprocess.Popen(command, env=environment))
    assert [task.wait(60) for task in tasks] == [0, 0, 0]
    found = json.loads(target.read_text())
    assert [(one["rank"], one["host"], one["world"]) for one in found] == [
        (0, "node0", 3),
        (1, "node0", 3),
        (2, "node1", 3),
    ]


def test_placing_needs_no_framework():
    code = "import sys, perf.place; sys.exit(bool({'torch', 'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert place.record({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"})
