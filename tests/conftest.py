"""
The same examples every time, no deadline; what is the same for all tests is made once.

Hypothesis is derandomized. JAX compiles each program once for all tests and their processes, and
without LLVM's optimisations, which would take a fourth of the time: what is optimised is checked
against the oracle by each benchmark, before it is timed.
"""

import atexit
import functools
import gc
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=12, database=None)
settings.load_profile("suite")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="dpsgd-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Benchmarks that a test starts must not think that they run beside others, or they time nothing.
os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """The frameworks' own objects, millions, are there to stay: no collection looks at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def captured(monkeypatch):
    """torch.compile captures the graph, and generates no code for it, which takes longest."""
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
