"""Sessions: `nox -l` lists them. Each makes its environment; `nox --no-venv` uses a ready one."""

import functools
import itertools
import os
import pathlib
import shutil
import subprocess

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests"]

PARTS = pathlib.Path(".benchmarks/parts")
EVERYTHING = ("torch", "jax", "peers-torch", "peers-jax")
# Two files of tests at a time, with a thread each.
SIDE_BY_SIDE = ("-n", "2", "--dist", "loadscope")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def install(session: nox.Session, *extras: str, gpu: bool = False) -> None:
    """
    Install torch first and by itself, so that its index and its exact build can be chosen.

    TORCH_SPEC and TORCH_INDEX_URL choose it; JAX_EXTRA chooses JAX's build: cuda12 on a GPU.
    """
    if session.venv_backend == "none":
        return
    pins = []
    if "torch" in extras:
        pins += [os.environ.get("TORCH_SPEC", "torch==2.13.0")]
        index = os.environ.get("TORCH_INDEX_URL")
        session.install(*pins, *(["--index-url", index] if index else []), silent=True)
        pins += ["opacus==1.6.0"]
    if "jax" in extras:
        extra = os.environ.get("JAX_EXTRA", "cuda12" if gpu else "")
        pins += [f"jax[{extra}]==0.10.2" if extra else "jax==0.10.2"]
        pins += ["flax==0.12.8", "optax==0.2.8"]
    session.install("-e", f".[{','.join(extras)}]", *pins, silent=True)


@functools.cache
def parts(session: str) -> pathlib.Path:
    """Where the legs of a session leave their parts; the first one here clears an older run's."""
    folder = PARTS / session
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def gpus() -> int:
    """How many GPUs nvidia-smi lists."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)
    return 0 if listed.returncode else len(listed.stdout.splitlines())


@nox.session
def perf_cpu(session: nox.Session) -> None:
    """Measure every method on the CPU: one table, one saved run. `-- --profile full -k ghost`."""
    install(session, *EVERYTHING, "perf")
    session.run("python", "-m", "pytest", "perf", "--device=cpu", *session.posargs)


@nox.session
@nox.parametrize("framework", ["torch", "jax"])
def perf_gpu(session: nox.Session, framework: str) -> None:
    """
    Measure every method on the GPU, torch then JAX, each in its own environment; one table.

    A long profile of one framework goes in parts, in an environment of yours:
    `python -m pytest perf --device=cuda --profile=gpu-torch --resume --precision=tf32`, then the
    other parts that perf/profiles.py lists, then without `--precision` for the table of all.
    """
    if not gpus():
        session.error("no CUDA device: nvidia-smi lists none here. On a CPU: nox -s perf_cpu")
    folder = parts("perf_gpu")
    install(session, framework, f"peers-{framework}", "perf", gpu=True)
    options = [f"--framework={framework}", "--device=cuda", *session.posargs]
    part = f"--benchmark-json={folder / framework}.json"
    session.run("python", "-m", "pytest", "perf", part, *options, success_codes=[0, 5])
    if framework == "jax":
        baseline = [o for o in session.posargs if o == "--save-baseline"]
        found = map(str, sorted(folder.glob("*.json"), reverse=True))
        session.run("python", "-m", "perf.runner", *baseline, *found)


@nox.session
@nox.parametrize("framework", ["torch", "jax"])
def perf_multi_gpu(session: nox.Session, framework: str) -> None:
    """Measure scaling over the GPUs of this host; or `-- --devices cpu --ranks 1,2` as a check."""
    options = session.posargs
    on_cpu = "--devices=cpu" in options or ("--devices", "cpu") in itertools.pairwise(options)
    if not on_cpu and gpus() < 2:
        session.error(
            f"{gpus()} GPUs here, and scaling needs two. One GPU: nox -s perf_gpu; a CPU: nox -s "
            "perf_cpu; the code of this session on CPU ranks: nox -s perf_multi_gpu -- "
            "--devices cpu --ranks 1,2; a cluster: python -m perf.cluster --help"
        )
    folder = parts("perf_multi_gpu")
    install(session, framework, f"peers-{framework}", "perf", gpu=not on_cpu)
    run = ["python", "-m", "perf.multi"]
    part = ["--framework", framework, "--part", f"{folder / framework}.json"]

    def merge() -> None:
        session.run(*run, "--merge", *map(str, sorted(folder.glob("*.json"), reverse=True)))

    try:  # 5: no method of this framework. Stopped, it needs time to end its ranks and save
        session.run(*run, *part, *options, success_codes=[0, 5], interrupt_timeout=90)
    except KeyboardInterrupt:
        if framework == "jax":
            merge()  # with what torch measured
        raise
    if framework == "jax":
        merge()


@nox.session
def perf_compare(session: nox.Session) -> None:
    """Compare the newest run with its baseline, or `-- BASE NEW`; 1 if slower, 2 if unjudgeable."""
    install(session, "perf")
    session.run("python", "-m", "perf.compare", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests (at most 10 minutes on 2 cores)."""
    install(session, *EVERYTHING, "test")
    options = ["-m", "not slow", "--durations=15", *session.posargs]
    session.run("python", "-m", "pytest", "tests", *SIDE_BY_SIDE, *options, env=ONE_THREAD)


@nox.session
def tests_all(session: nox.Session) -> None:
    """Run all tests, the slow ones too (at most 25 minutes)."""
    install(session, *EVERYTHING, "test")
    options = [*SIDE_BY_SIDE, *session.posargs]
    session.run("python", "-m", "pytest", "tests", *options, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and types."""
    if session.venv_backend != "none":
        session.install("ruff>=0.14,<0.16", "mypy>=1.15,<3", "numpy", silent=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "dpsgd", "perf")
