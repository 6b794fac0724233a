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
for step in range(8):
    before = faults()
    function(x).block_until_ready()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_no_page_of_a_later_step_is_faulted_in():
    found = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how]))
        for how in ("keep", "default")
    }
    assert found["keep"] < 16 < found["default"], "of 64 MiB: 16,384 pages, or 32 huge ones"
