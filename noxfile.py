"""Sessions: `nox -l` lists them. Each makes its environment; `nox --no-venv` uses a ready one."""

import os

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests"]

TORCH = os.environ.get("TORCH_SPEC", "torch==2.13.0")
JAX = f"jax[{os.environ['JAX_EXTRA']}]==0.10.2" if "JAX_EXTRA" in os.environ else "jax==0.10.2"
TESTED = ("flax==0.12.8", "optax==0.2.8", "opacus==1.6.0")


def install(session: nox.Session, extras: str) -> None:
    """Install torch first and by itself, so that its index and its exact build can be chosen."""
    if session.venv_backend == "none":
        return
    index = os.environ.get("TORCH_INDEX_URL")
    session.install(TORCH, *(["--index-url", index] if index else []), silent=True)
    session.install("-e", f".[{extras}]", TORCH, JAX, *TESTED, silent=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests (at most 10 minutes on 2 cores)."""
    install(session, "torch,jax,peers-torch,peers-jax,test")
    session.run("python", "-m", "pytest", "tests", "-m", "not slow", *session.posargs)


@nox.session
def tests_all(session: nox.Session) -> None:
    """Run all tests, the slow ones too (at most 25 minutes)."""
    install(session, "torch,jax,peers-torch,peers-jax,test")
    session.run("python", "-m", "pytest", "tests", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    if session.venv_backend != "none":
        session.install("ruff>=0.14,<0.16", silent=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
