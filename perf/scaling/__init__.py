"""
How DP-SGD and SGD scale over devices: the model, its fit to measured runs, and the figure.

``python -m perf.scaling`` predicts from ranges of inputs; ``python -m perf.scaling RUN.json …``
fits the model to measured runs first, and checks it on the world sizes that the fit did not see.

A run is a saved run (:mod:`perf.saved`). Of its ``rows`` those with a ``world_size`` and
``seconds_per_step`` count:

| field | meaning |
|---|---|
| ``world_size`` | W, ranks |
| ``framework, model, method, precision, compile`` | as in every row |
| ``sync`` | ``once`` per logical batch, or with ``every`` physical batch |
| ``placement`` | of the draw, ``round-robin`` or ``shard``; what else it says is of the noise,
and the draw is then dealt round-robin |
| ``scaling`` | ``strong`` or ``weak`` |
| ``physical_batch, expected_batch`` | P of a rank; L of the whole logical batch |
| ``seconds_per_step`` | median seconds of one logical batch, the slowest rank's |
| ``examples_per_s`` | real examples a second, all ranks together |
| ``comm_s`` | seconds of its all-reduces alone, all ranks there |
| ``wait_s`` | seconds that the mean rank waits for the slowest |
| ``parameters`` | trainable parameters, a count |
| ``bytes_reduced`` | bytes of all its all-reduces |
| ``trips_mean`` | physical batches of the mean rank; ``trips_max`` of the slowest, if known |
| ``seconds, sizes`` | per round, if kept: intervals rest on them |

The run's ``all_reduce``, if there, lists bare all-reduces: ``world_size, bytes, seconds`` (one or
several values), from which α and β come.
"""
