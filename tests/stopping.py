"""A pytest plugin that logs what is measured to $MEASURED, and stops after $STOP_AFTER cases."""

import os
from pathlib import Path

from perf.protocol import Bench

_REAL = Bench.measure
_LOG = Path(os.environ["MEASURED"])


def _measure(self, case, pedantic, row):
    done = _LOG.read_text().split() if _LOG.exists() else []
    if len(done) == int(os.environ["STOP_AFTER"]):
        raise KeyboardInterrupt
    _LOG.write_text("\n".join([*done, case.id]))
    _REAL(self, case, pedantic, row)


Bench.measure = _measure
