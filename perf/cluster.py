"""
Scaling over the nodes of a SLURM cluster: ``python -m perf.cluster --nodes 20 --gpus-per-node 4``.

It fills one sbatch script (``perf/templates/scaling.sbatch``) that measures 1 GPU … all nodes in
one allocation, and submits it: torch by ``srun torchrun``, JAX by one process a GPU. ``--dry-run``
prints the script. ``--collect DIR`` makes a saved run, a table and plots of what a job has found so
far; ``--check`` first sees, without a framework, where tasks land and that they reach each other.
The folder has to lie where all nodes see it.
"""

import argparse
import datetime
import importlib.resources
import json
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

from perf import results
from perf.multi import jobs, options
from perf.plan import sizes
from perf.results import Job


class Template(string.Template):
    """With ``@{name}``, since ``$`` belongs to the shell."""

    delimiter = "@"
    idpattern = "(?!)"  # no bare @name: an address is none
    braceidpattern = "[a-z_]+"


def grid(nodes: int, per_node: int, wanted: str | None = None) -> list[tuple[int, int]]:
    """
    The sizes (nodes, devices of each): within one node first, then whole nodes.

    Args:
        nodes: all there will be.
        per_node: devices of a node.
        wanted: numbers of nodes, comma-separated, or ``all``; None doubles from 1.

    Raises:
        ValueError: fewer than one of either, or more nodes wanted than there will be.
    """
    if nodes < 1:
        raise ValueError(f"--nodes is {nodes}; it must be at least 1")
    if per_node < 1:
        raise ValueError(f"--gpus-per-node is {per_node}; it must be at least 1")
    counts = list(range(1, nodes + 1)) if wanted == "all" else sizes(nodes)
    if wanted and wanted != "all":
        counts = sorted({int(count) for count in wanted.split(",")})
        if not 1 <= counts[0] <= counts[-1] <= nodes:
            raise ValueError(f"--counts is {wanted}; each must lie in 1 … {nodes}, or say all")
    return [*((1, n) for n in sizes(per_node)[:-1]), *((n, per_node) for n in counts)]


def script(args: argparse.Namespace, folder: Path, steps: list[tuple[str, int, int, str]]) -> str:
    """
    The sbatch script.

    Args:
        args: the command line.
        folder: where specs, results and the job's output lie.
        steps: (torch, jax or place; nodes; ranks of each; name of the spec), in order.
    """
    text = (importlib.resources.files("perf") / "templates" / "scaling.sbatch").read_text()
    gpus, setup = "", []
    directives = list(args.directive)
    if args.devices == "cuda":
        gpus = '--gpus-per-node="$devices"'  # a process that is alone takes all that it sees
        directives.append(f"--gpus-per-node={args.gpus_per_node}")
    else:
        setup = ["export JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="]
        setup += ["export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false"]
    return Template(text).substitute(
        nodes=args.nodes,
        per_node=args.gpus_per_node,
        cpus=args.cpus_per_task,
        time=args.time,
        minutes=args.step_minutes,
        gpus=gpus,
        folder=shlex.quote(str(folder)),
        root=shlex.quote(str(Path.cwd())),
        python=shlex.quote(args.python),
        directives="\n".join(f"#SBATCH {line}" for line in directives),
        setup="\n".join([*setup, *args.setup]),
        steps="\n".join(f"{kind} {n} {each} {name}" for kind, n, each, name in steps),
    )


def prepare(args: argparse.Namespace, folder: Path) -> tuple[list[Job], str]:
    """(the jobs, unwritten; the script that runs them)."""
    shapes = grid(args.nodes, args.gpus_per_node, args.counts)
    if args.check:
        steps = [("place", n, each, f"{n}x{each}") for n, each in shapes]
        return [], script(args, folder, steps)
    shape = {n * each: (n, each) for n, each in shapes}
    found = jobs(args, list(shape), folder)
    if not found:
        raise ValueError(f"no method of {args.framework} among {args.methods}")
    found.sort(key=lambda job: job.world_size)
    steps = [(job.framework, *shape[job.world_size], job.path.stem) for job in found]
    return found, script(args, folder, steps)


def submit(text: str, found: list[Job], folder: Path) -> str:
    """
    Write the specs and the script; submit it; sbatch's answer.

    Raises:
        RuntimeError: there is no sbatch here, or it refused.
    """
    if not shutil.which("sbatch"):
        raise RuntimeError(
            "no sbatch here: run this on a login node of a SLURM cluster; --dry-run prints the "
            "script, and `nox -s perf_multi_gpu` measures the GPUs of one host"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for job in found:
        job.write()
    path = folder / "scaling.sbatch"
    path.write_text(text)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip()


def collect(folder: Path) -> int:
    """
    Save and show what the jobs of a folder have found.

    Raises:
        ValueError: no such folder, or nothing was found yet.
    """
    placed = sorted(folder.glob("*.placed"), key=lambda path: path.stat().st_mtime)
    for path in placed:
        tasks = json.loads(path.read_text())
        hosts = len({task["host"] for task in tasks})
        print(f"{path.stem}: {len(tasks)} tasks met on {hosts} nodes")
    found = [Job.load(path) for path in folder.glob("*-w*.json")]
    found.sort(key=lambda job: (job.framework != "torch", job.world_size))
    begun = [job for job in found if job.result.exists() or Path(f"{job.result}.failed").exists()]
    if placed and not found:
        return 0
    if not begun:
        raise ValueError(
            f"no result in {folder}: has the job begun (squeue)? See slurm-*.out in it"
        )
    for job in begun:
        job.read("the step ended before this was measured")
        for row in job.rows.values():
            if row["status"] != "ok":
                print(f"{job.path.stem}: {row['status']}: {row['reason']}")
    return results.finish(results.run(found))


def main(arguments: list[str] | None = None) -> int:
    """Submit, print or collect; 2 if that cannot be."""
    parser = options("perf.cluster", __doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=4, help="of CPUs: ranks of a node")
    parser.add_argument("--counts", help="of nodes: 1,2,8 or all; default: 1, 2, 4 … all nodes")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="cores of each rank")
    parser.add_argument("--time", default="04:00:00", help="of the job")
    parser.add_argument("--step-minutes", type=int, default=30, help="limit of one world size")
    parser.add_argument("--python", default=sys.executable, help="the same on every node")
    parser.add_argument(
        "--directive", action="append", default=[], help="an #SBATCH line: --partition=gpu"
    )
    parser.add_argument(
        "--setup", action="append", default=[], help="a line of shell first: module load cuda"
    )
    parser.add_argument("--folder", type=Path, help="default: .benchmarks/cluster/<time>")
    parser.add_argument("--check", action="store_true", help="place tasks only, no framework")
    parser.add_argument("--dry-run", action="store_true", help="print the script")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="read the results of a job")
    args = parser.parse_args(arguments)
    try:
        if args.collect:
            return collect(args.collect)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = (args.folder or Path(".benchmarks/cluster") / stamp).absolute()
        found, text = prepare(args, folder)
        if args.dry_run:
            print(text, end="")
            return 0
        print(submit(text, found, folder))
        print(f"when it has ended: python -m perf.cluster --collect {folder}")
    except (ValueError, KeyError, RuntimeError) as error:
        print(f"perf.cluster: {error.args[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
