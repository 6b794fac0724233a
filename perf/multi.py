"""
Strong and weak scaling over the devices of one host: ``python -m perf.multi --devices cuda``.

This process imports no framework. Each world size is one launch: of torch by torchrun, one process
a device; of JAX one process that drives them all. What to measure and what was found are JSON
files. A launch that dies loses the setting it was at; the rest is launched again. Ctrl-C
ends the run, and keeps what was measured.

``--devices cpu --ranks 1,2,4`` runs the same over CPU ranks: a check of the code, not a measurement
of scaling.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from perf import device, results, saved
from perf.plan import NUM_EXAMPLES, PLACEMENTS, SCALINGS, SYNCS, settings, sizes
from perf.results import Job

BYTES = [1 << n for n in range(10, 29, 3)]  # of the bare all-reduce: 1 KiB … 256 MiB

NOTHING = 5  # exit code, as pytest's: nothing was selected
STOPPED = 130  # exit code, as a shell's: by Ctrl-C


def visible() -> int:
    """GPUs that this host has and lets this process see."""
    here, listed = len(device.nvidia("name")), os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return here
    return min(here, len([name for name in listed.split(",") if name not in ("", "-1")]))


def command(job: Job) -> tuple[list[str], dict[str, str]]:
    """The command of one launch on this host, and its environment."""
    environment = dict(os.environ)
    worker = ["-m", "perf.worker", str(job.path)]
    if job.device == "cpu":
        # One thread a rank, whatever their number: a rank must not slow down for want of cores
        # that another one took, until there are more ranks than cores.
        environment |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        flags = f"--xla_force_host_platform_device_count={job.world_size}"
        environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    if job.framework == "torch":
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.world_size}"]
        return [sys.executable, *run, *worker], environment
    if job.device == "cuda":
        listed = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(visible())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(listed.split(",")[: job.world_size])
    return [sys.executable, *worker], environment


def launch(job: Job, timeout_s: float) -> None:
    """Run one job; one that dies or takes too long goes on after the setting that it was at."""
    while job.left():
        job.write()
        line, environment = command(job)
        child = subprocess.Popen(line, env=environment, start_new_session=True)
        reason = ""
        try:
            if status := child.wait(timeout_s):
                reason = f"the launch ended with status {status}"
        except subprocess.TimeoutExpired:
            reason = f"no end after {timeout_s:g} s: see --timeout"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)  # torchrun ends its ranks on it
                try:
                    child.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        job.read(reason)


def worlds(wanted: str | None, where: str) -> list[int]:
    """
    The world sizes to measure: those asked for, or 1, 2, 4 … all GPUs.

    Raises:
        ValueError: fewer than two GPUs, more ranks than GPUs, or no number.
    """
    if where == "cpu":
        return sorted({int(part) for part in (wanted or "1,2").split(",")})
    here = visible()
    if here < 2:
        raise ValueError(
            f"{here} GPUs here, and scaling needs two: `nox -s perf_gpu` measures one, and "
            "`nox -s perf_multi_gpu -- --devices cpu --ranks 1,2` checks this code on CPU ranks"
        )
    found = sorted({int(part) for part in wanted.split(",")}) if wanted else sizes(here)
    if max(found) > here:
        raise ValueError(f"{max(found)} ranks were asked for; this host has {here} GPUs")
    return found


def options(prog: str, description: str | None) -> argparse.ArgumentParser:
    """What :mod:`perf.cluster` can be asked for too."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--devices", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--framework", choices=("torch", "jax"), help="default: both")
    parser.add_argument("--model", help="default: vit-b16; digits-cnn on CPUs")
    parser.add_argument("--methods", help="comma-separated; their SGD is always there")
    parser.add_argument("--physical-batch", type=int, help="P of one device; default 64")
    parser.add_argument(
        "--times", type=int, default=4, help="physical batches of a rank at the largest world"
    )
    parser.add_argument("--num-examples", type=int, default=NUM_EXAMPLES, help="N")
    parser.add_argument("--grows", default="q", help="with W in weak scaling: q or N")
    parser.add_argument("--scaling", default=",".join(SCALINGS))
    parser.add_argument("--sync", default=",".join(SYNCS), help="of SGD: once (always), every")
    parser.add_argument("--noise-placement", default="split", help=", ".join(PLACEMENTS))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="torch: compiled")
    parser.add_argument("--rounds", type=int, default=9)
    return parser


def jobs(args: argparse.Namespace, worlds: Sequence[int], folder: Path) -> list[Job]:
    """
    One job for each framework and world size, its files in ``folder``.

    Raises:
        ValueError, KeyError: an option that makes no sense.
    """
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}; it must be at least 1")
    for name in ("physical_batch", "times", "num_examples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    found = []
    for framework in [args.framework] if args.framework else ["torch", "jax"]:
        planned = settings(
            framework,
            worlds,
            model=args.model or ("digits-cnn" if args.devices == "cpu" else "vit-b16"),
            physical_batch=args.physical_batch or 64,
            methods_wanted=args.methods.split(",") if args.methods else None,
            scalings=args.scaling.split(","),
            syncs=args.sync.split(","),
            placements=args.noise_placement.split(","),
            times=args.times,
            num_examples=args.num_examples,
            grows=args.grows,
            precision=args.precision,
            compiled=args.compile,
        )
        for world in worlds:
            its = [setting for setting in planned if setting.world_size == world]
            if its:
                path = folder / f"{framework}-w{world}.json"
                found.append(
                    Job(
                        path=path,
                        framework=framework,
                        device=args.devices,
                        world_size=world,
                        rounds=args.rounds,
                        sizes_bytes=BYTES if args.devices == "cuda" else BYTES[:-2],
                        settings=its,
                    )
                )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, save, print the table, plot; 1 if a setting failed, 130 if the user stopped it."""
    parser = options("perf.multi", __doc__)
    parser.add_argument("--ranks", help="world sizes, comma-separated; default: 1, 2, 4 … all")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of one launch")
    parser.add_argument("--part", type=Path, help="save only this framework's part, to this file")
    parser.add_argument("--merge", type=Path, nargs="+", help="make one run of such parts")
    args = parser.parse_args(arguments)
    try:
        if args.merge:
            return results.finish(results.merge([saved.load(part) for part in args.merge]))
        found = worlds(args.ranks, args.devices)
        folder = saved.FOLDER / device.slug(args.devices) / "runs" / f".multi-{os.getpid()}"
        todo = jobs(args, found, folder)
        if not todo:
            print(f"no method of {args.framework} among {args.methods}")
            return NOTHING
        stopped = False
        try:
            for job in todo:
                launch(job, args.timeout)
                print(f"[{job.framework}, {job.world_size} ranks] {job.summary()}", flush=True)
        except KeyboardInterrupt:
            stopped = True
            for job in todo:
                job.stop()
        run = results.run(todo)
        shutil.rmtree(folder, ignore_errors=True)
        if args.part:
            saved.save(run, args.part)
        if args.part and not stopped:
            return 0
        failed = results.finish(run)
        return STOPPED if stopped else failed
    except (ValueError, KeyError, saved.Unusable) as error:
        print(f"perf.multi: {error.args[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
