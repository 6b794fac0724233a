"""The cluster's script under a real SLURM: 20 nodes on this host, submitted with sbatch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_host

from perf import saved

ROOT = Path(__file__).parent.parent
NODES, PER_NODE = 20, 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_host.missing()), reason=slurm_host.missing()),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    with slurm_host.cluster(folder, NODES, PER_NODE) as found:
        yield found | {"PYTHONPATH": str(ROOT)}


def perf_cluster(environment, where, *options):
    command = [sys.executable, "-m", "perf.cluster", *map(str, options)]
    done = subprocess.run(
        command, env=environment, cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def finished(environment, printed, folder, timeout_s):
    """Wait for the job that was submitted; what it wrote."""
    job = printed.split("Submitted batch job ")[1].split()[0]
    command = ["srun", f"--dependency=afterany:{job}", "--ntasks=1", "true"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=timeout_s)
    return (folder / f"slurm-{job}.out").read_text()


def test_tasks_meet_on_one_to_twenty_nodes(environment, tmp_path):
    folder = tmp_path / "check"
    options = [
        "--nodes",
        NODES,
        "--gpus-per-node",
        PER_NODE,
        "--cpus-per-task",
        1,
        "--counts",
        "all",
    ]
    printed = perf_cluster(environment, tmp_path, *options, "--check", "--folder", folder)
    said = finished(environment, printed, folder, 300)
    assert "failed" not in said, said
    for nodes in range(1, NODES + 1):
        tasks = json.loads((folder / f"{nodes}x{PER_NODE}.placed").read_text())
        world = nodes * PER_NODE
        assert [task["rank"] for task in tasks] == list(range(world))
        assert {task["world"] for task in tasks} == {world}
        places = {(task["host"], task["local_rank"]) for task in tasks}
        assert len(places) == world, "each task has a device of its own"
        assert len({host for host, _ in places}) == nodes
        assert {task["gpus"] for task in tasks} == {"0,1,2,3"}
    assert "20x4: 80 tasks met on 20 nodes" in perf_cluster(
        environment, tmp_path, "--collect", folder
    )


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_both_frameworks_train_over_eight_nodes(environment, tmp_path, framework):
    folder = tmp_path / "run"
    options = [
        "--nodes",
        8,
        "--counts",
        "1,8",
        "--gpus-per-node",
        1,
        "--cpus-per-task",
        1,
        "--devices",
        "cpu",
    ]
    options += ["--framework", framework, "--physical-batch", 8, "--rounds", 2, "--times", 1]
    options += ["--methods", f"{framework}-bookkeeping", "--scaling", "strong"]
    printed = perf_cluster(environment, tmp_path, *options, "--folder", folder)
    said = finished(environment, printed, folder, 600)
    assert "failed" not in said, said
    said = perf_cluster(environment, tmp_path, "--collect", folder)
    (path,) = tmp_path.glob(".benchmarks/cpu/runs/*-multi.json")
    run = saved.load(path)
    assert f"saved {path.relative_to(tmp_path)}" in said
    assert {row["status"] for row in run["rows"]} == {"ok"}
    assert sorted({row["world_size"] for row in run["rows"]}) == [1, 8]
    methods = {(row["method"], row["sync"]) for row in run["rows"]}
    assert methods == {
        (f"{framework}-sgd", "once"),
        (f"{framework}-sgd", "every"),
        (f"{framework}-bookkeeping", "once"),
    }
    assert len(run["machine_info"]["hosts"]) == 8
    assert {row["nodes"] for row in run["rows"]} == {1, 8}


def test_everything_is_shut_down(tmp_path):
    tmp_path.chmod(0o755)
    before = slurm_host.HOSTS.read_text()
    with slurm_host.cluster(tmp_path, 2, 1):
        pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        assert len(pids) == 4
        assert "node02" in slurm_host.HOSTS.read_text()
    assert slurm_host.HOSTS.read_text().rstrip() == before.rstrip()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
