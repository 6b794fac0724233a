"""Memory that a step has freed stays with the process."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no mallopt here")
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


def test_pages_stay_from_step_to_step():
    found = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how]))
        for how in ("keep", "default")
    }
    assert found["default"] >= 40 * 32, "64 MiB have 16,384 pages, or 32 huge ones"
    assert found["keep"] < found["default"] / 2


HOLES = """
import re, sys
from pathlib import Path
from dpsgd import return_freed_memory
if sys.argv[1] == "return":
    assert return_freed_memory()
import numpy as np

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

before = resident()
whole = np.ones(1 << 21)  # once it is freed, the default is to map nothing smaller by itself
del whole
arrays = [np.ones(1 << 19) for _ in range(64)]  # of 4 MiB
del arrays[::2]
print(resident() - before)
"""


def test_what_is_freed_leaves_no_holes():
    found = {
        how: int(subprocess.check_output([sys.executable, "-c", HOLES, how]))
        for how in ("return", "default")
    }
    assert found["return"] < 160 < 224 < found["default"], "128 MiB are in use, 256 were"


TRIM = """
import re
from pathlib import Path
from dpsgd import keep_freed_memory
from dpsgd.memory import trim_freed_memory
keep_freed_memory()
import numpy as np

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

before = resident()
arrays = [np.ones(1 << 19) for _ in range(64)]  # of 4 MiB
last = np.ones(1 << 10)
del arrays
kept = resident() - before
trim_freed_memory()
print(kept, resident() - before)
"""


def test_what_is_kept_can_be_given_back_at_once():
    found = subprocess.check_output([sys.executable, "-c", TRIM]).split()
    assert int(found[1]) < 64 < 192 < int(found[0])
