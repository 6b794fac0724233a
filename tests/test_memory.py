"""Memory that a step has freed stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from dpsgd import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x, function = jnp.ones(1 << 24), jax.jit(lambda x: jnp.sin(x) + 1)
function(x).block_until_ready()
before = faults()
for step in range(40):  # a result that is freed late leaves a hole, which is found soon
    function(x).block_until_ready()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_pages_stay_from_step_to_step():
    found = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how]))
        for how in ("keep", "default")
    }
    assert found["default"] >= 40 * 32, "64 MiB have 16,384 pages, or 32 huge ones"
    assert found["keep"] < found["default"] / 2
