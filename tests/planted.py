"""A pytest plugin that makes benchmarks fail on purpose, one way for each method."""

from perf.protocol import Bench

_REAL = Bench.measure
_FAULTS = {
    "torch-opacus": MemoryError("tried to allocate 10 TB"),
    "torch-opacus-ghost": ValueError("layer 'conv1' is unknown"),
    "torch-vmap": KeyboardInterrupt(),
}


def _measure(self, case, pedantic, row):
    if case.method in _FAULTS:
        raise _FAULTS[case.method]
    _REAL(self, case, pedantic, row)


Bench.measure = _measure
