"""What was measured on: device, versions, threads, clocks; the fingerprint of a saved run."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

LIBRARIES = (
    *("torch", "triton", "transformers", "opacus"),
    *("jax", "jaxlib", "flax", "optax", "jax-privacy"),
    *("numpy", "pytest-benchmark"),
)


def nvidia(query: str) -> list[str]:
    """One line per GPU of ``nvidia-smi --query-gpu``; empty without a GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


def resolve(name: str) -> str:
    """``auto`` to ``cuda`` where nvidia-smi lists a GPU, else ``cpu``."""
    return name if name != "auto" else ("cuda" if nvidia("name") else "cpu")


def require(framework: str, device: str) -> None:
    """
    Set threads; see that the framework really has the device.

    Raises:
        RuntimeError: ``cuda`` was asked for and this framework has none.
    """
    if framework == "torch":
        import torch

        torch.set_num_threads(threads())
        there = device == "cpu" or torch.cuda.is_available()
    else:
        import jax

        there = (jax.default_backend() == "gpu") == (device == "cuda")
    if not there:
        raise RuntimeError(
            f"{framework} does not see the device {device!r}: install its build for it, or choose "
            "with --device cpu or --device cuda"
        )


def threads() -> int:
    """Cores this process may use; both frameworks get them all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name, as :func:`distinct`."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = ("model name", "cpu family", "model", "flags")
    found = [re.search(rf"^{name}\s*: (.+)", text, re.M) for name in names]
    name, family, model, flags = (match and match[1] for match in found)
    name = name or platform.processor() or platform.machine()
    return distinct(name, family, model, (flags or "").split()) if family and model else name


def distinct(name: str, family: str | int, model: str | int, flags: Iterable[str]) -> str:
    """``name`` with what tells processors apart that a virtual machine calls the same."""
    widest = {"avx512f": ", AVX-512", "avx2": ", AVX2"}
    vector = next((words for flag, words in widest.items() if flag in flags), "")
    return f"{name} (family {family}, model {model}{vector})"


def names(device: str) -> list[str]:
    """Of each GPU, or of the processor; ``unknown GPU`` where nvidia-smi lists none."""
    return (nvidia("name") or ["unknown GPU"]) if device == "cuda" else [cpu_name()]


def slug(device: str) -> str:
    """The folder under ``.benchmarks``: ``cpu``, or the GPU's name."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", names(device)[0].lower()).strip("-")


def clocks(device: str) -> list[str]:
    """Clocks now: SM and memory of each GPU, or MHz of the cores."""
    if device == "cuda":
        return nvidia("clocks.sm,clocks.mem")
    info = Path("/proc/cpuinfo")
    return re.findall(r"cpu MHz\s*: (\S+)", info.read_text()) if info.exists() else []


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(device: str) -> dict:
    """The fingerprint and what it is made of, for ``machine_info``."""
    facts = {
        "device": slug(device),
        "names": names(device),
        "driver": nvidia("driver_version") if device == "cuda" else [],
        "threads": threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": versions(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return facts | {"fingerprint": digest}
