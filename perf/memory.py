"""
Peak memory of one logical step of one method alone: ``python -m perf.memory CASE [CASE …]``.

Inputs cycle, so a few physical batches hold as much as all of them: at most four are run.
Each case runs in a process of its own, forked before the framework starts a thread or touches the
device, so that imports are paid once. CUDA: the allocator's peak. CPU: VmHWM during the step, minus
the resident size before the model is built, with freed arrays given back at once; where there is no
/proc, the process' peak so far. Prints one JSON object a line.
"""

import argparse
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpsgd import models, return_freed_memory
from perf.profiles import Case

_STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    if _STATUS.exists() and (match := re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())):
        return int(match[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak(case: Case, device: str) -> dict:
    """
    {"peak_bytes", "memory_source"} of one step, after one that has warmed up.

    JAX adds "xla_plan_bytes": what XLA itself plans for one physical batch; no figure to compare
    with the others.
    """
    from perf import device as devices
    from perf.protocol import Prepared

    devices.require(case.row.framework, device)
    before = _resident("VmRSS")
    prepared = Prepared(case, device, ragged=case.ragged, checked=False)
    prepared.batches = [prepared.batches[0][:4]]
    step: Any = prepared.step
    prepared.run(0)
    if device == "cuda" and case.row.framework == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
        prepared.run(0)
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "memory_source": "allocator"}
    if device == "cuda":
        import jax

        found = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        plan = step.plan_bytes(*prepared.batches[0][0])
        return {"peak_bytes": found, "memory_source": "allocator", "xla_plan_bytes": plan}
    _reset_peak()
    prepared.run(0)
    found = {"peak_bytes": _resident("VmHWM") - before, "memory_source": "rss"}
    if case.row.framework == "jax":
        found["xla_plan_bytes"] = step.plan_bytes(*prepared.batches[0][0])
    return found


def _forked(case: Case, device: str) -> None:
    if os.fork() == 0:
        try:
            found = peak(case, device)
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(1, json.dumps({"case": case.id} | found).encode() + b"\n")
        os._exit(0)


def measure(case_ids: list[str], device: str) -> Iterator[tuple[str, dict]]:
    """(case id, what :func:`peak` found), as each process of its own ends; one framework."""
    command = [sys.executable, "-W", "ignore", "-m", "perf.memory", "--device", device, *case_ids]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        for line in child.stdout or ():
            if line.startswith(b"{"):
                found = json.loads(line)
                yield found.pop("case"), found


def main() -> None:
    """Print the peak of each case."""
    parser = argparse.ArgumentParser(prog="perf.memory", description=__doc__)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    if args.device == "cpu":
        return_freed_memory()  # or holes of the heap would count
    cases = [Case.parse(name) for name in args.cases]
    for case in cases:
        framework = importlib.import_module(f"dpsgd.{case.row.framework}.models")
        framework.preload(models.get(case.model))
        importlib.import_module(case.row.target.partition(":")[0])
    # JAX mostly compiles here, which two can do at once; torch's spinning threads would collide.
    at_once = 2 if args.device == "cpu" and cases[0].row.framework == "jax" else 1
    for number, case in enumerate(cases):
        if number >= at_once:
            os.wait()
        _forked(case, args.device)
    for _ in cases[:at_once]:
        os.wait()


if __name__ == "__main__":
    main()
