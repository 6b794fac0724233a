"""One physical batch to the device: what every step in training pays before ``accumulate``."""

import numpy as np

from perf.profiles import Case
from perf.protocol import Prepared

P = 16


def test_put(request, measure_call):
    options = request.config.option
    method = f"{options.framework}-sgd"
    case = Case(model="digits-cnn", physical_batch=P, method=method)
    step = Prepared(case, options.device, ragged=False, checked=False).step
    inputs, targets = np.ones((P, 3, 224, 224), np.float32), np.zeros(P, np.int64)

    def put():
        placed = step.put(inputs, targets, np.ones(P, bool))
        step.synchronize()
        return placed

    measure_call("transfer", options.framework, f"P={P} 3×224×224", put)
