"""
The parent of a measurement: each framework in a process of its own, then one run and one table.

It imports no framework, so that none disturbs the other.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

from perf import device, saved, table
from perf.partial import Partial, left
from perf.profiles import cases


def selected(options) -> dict:
    """
    The keyword arguments of :func:`perf.profiles.cases` that the command line asks for.

    Raises:
        ValueError, KeyError: an unknown name among them.
    """

    def split(text):
        return text.split(",") if text else None

    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}; it must be at least 1")
    if options.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {options.device!r}; use auto, cpu or cuda")
    modes = ("eager", "compiled") if options.compile == "both" else split(options.compile)
    default = "gpu" if device.resolve(options.device) == "cuda" else "quick"
    wanted = {
        "profile": options.profile or default,
        "methods_wanted": split(options.methods),
        "models_wanted": split(options.models),
        "precisions": split(options.precision),
        "modes": modes,
    }
    cases(**wanted)
    return wanted


def run(options, arguments: list[str]) -> int:
    """Run the frameworks one after the other; merge, save, print; the worst exit status."""
    wanted, where = selected(options), device.resolve(options.device)
    folder = saved.FOLDER / device.slug(where)
    parts, worst = folder / "runs" / f".parts-{os.getpid()}", 0
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if where == "cpu" else {})
    # Cold at the start; what was compiled for timing is not compiled again to measure memory.
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(parts / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for framework in dict.fromkeys(case.row.framework for case in cases(**wanted)):
        part = parts / f"{framework}.json"
        command = [sys.executable, "-m", "pytest", *arguments, f"--framework={framework}"]
        command += [f"--device={where}", f"--benchmark-json={part}"]
        part.parent.mkdir(parents=True, exist_ok=True)
        child = subprocess.Popen(command, env=environment)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            status = child.wait()  # it has had the signal too, and saves what it measured
        if status < 0:
            print(
                f"{framework}: its process was killed by signal {-status} (9: perhaps memory ran "
                "out); what it measured is kept only with --resume"
            )
            status = 128 - status
        # 5: -k selected nothing of this framework
        worst = max(worst, 0 if status == 5 else status)
        if status == 2:
            break
    found = [saved.load(part) for part in sorted(parts.glob("*.json"), reverse=True)]
    shutil.rmtree(parts, ignore_errors=True)
    if not found:
        return worst or 5
    every = [case.id for case in cases(wanted["profile"])]
    missing = left(saved.merge(found)["rows"], every)
    if missing and options.resume:
        print(
            f"{len(every) - len(missing)} of {len(every)} cases of the profile "
            f"{wanted['profile']} are in this run: go on with --resume"
        )
    finish(found, baseline=options.save_baseline and not worst)
    if options.resume and not missing:
        Partial(where, wanted["profile"]).remove()
    return worst


def finish(parts: list[dict], *, baseline: bool) -> Path:
    """
    Merge, save, print the table.

    Args:
        parts: runs of single frameworks.
        baseline: save it as the baseline too, if it has the cases of the whole profile.
    """
    merged = saved.merge(parts)
    profile = merged["rows"][0]["profile"]
    folder = saved.FOLDER / merged["machine_info"]["device"]
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = saved.save(merged, folder / "runs" / f"{stamp}-{profile}.json")
    table.show(merged)
    print(f"saved {path}")
    absent = {case.id for case in cases(profile)} - {row.get("case") for row in merged["rows"]}
    if baseline and absent:
        print(f"the baseline stays: {len(absent)} cases of {profile} are not in this run")
    elif baseline:
        print(f"baseline {saved.save(merged, folder / f'{profile}.json')}")
    return path


def main() -> None:
    """Merge runs of single frameworks: ``python -m perf.runner [--save-baseline] PART …``."""
    parser = argparse.ArgumentParser(prog="perf.runner", description=main.__doc__)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--save-baseline", action="store_true")
    args = parser.parse_args()
    try:
        finish([saved.load(part) for part in args.parts], baseline=args.save_baseline)
    except saved.Unusable as error:
        sys.exit(f"perf.runner: {error}")


if __name__ == "__main__":
    main()
