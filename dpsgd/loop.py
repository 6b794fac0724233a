"""
The loop of all steps, as every rank runs it: progress, what was begun, checkpoints, Ctrl-C.

Nothing that depends on the training data is shown, unless diagnostics are asked for.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dpsgd.checkpoint import Folder
from dpsgd.data import Dataset
from dpsgd.privacy import PrivacyConfig
from dpsgd.ranks import Ranks
from dpsgd.sampling import LogicalBatch, side_by_side


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during the steps: ``steps`` updates were begun, which spent ``epsilon``."""

    def __init__(self, steps: int, epsilon: float):
        super().__init__(steps, epsilon)
        self.steps, self.epsilon = steps, epsilon


class Tally:
    """Steps to charge: those that were begun, in this run or, with its ``folder``, before."""

    def __init__(self, folder: Folder | None = None) -> None:
        self._folder = folder
        self._begun = folder.done if folder else 0

    def begin(self, number: int) -> None:
        """Before the update of step ``number``: interrupted in it, the sum may be out already."""
        self._begun = number
        if self._folder:
            self._folder.begin(number)

    @property
    def steps(self) -> int:
        """How many."""
        return self._folder.charged if self._folder else self._begun

    @contextlib.contextmanager
    def stated(self, config: PrivacyConfig) -> Iterator[None]:
        """Ctrl-C within, at whatever point, says what was spent, if anything was."""
        try:
            yield
        except KeyboardInterrupt:
            if steps := self.steps:
                raise Interrupted(steps, config.epsilon(steps)) from None
            raise


def run(
    step: Any,
    draws: Iterable[LogicalBatch],
    dataset: Dataset,
    config: PrivacyConfig,
    *,
    ranks: Ranks,
    tally: Tally,
    folder: Folder | None = None,
    every: int = 10,
    report: Callable[[str], None] | None = None,
    progress: bool = False,
) -> float:
    """
    Run what is left of T logical steps, and return the seconds they took.

    Args:
        step: of :meth:`dpsgd.Method.build`.
        draws: this rank's share of each logical batch that is left.
        dataset: what the draws point into.
        config: the public configuration.
        ranks: this process among all.
        tally: counts what is begun.
        folder: where checkpoints go, one after each ``every`` updates and after the last.
        every: updates from one checkpoint to the next.
        report: takes diagnostics, which depend on the training data.
        progress: show a progress bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    first = folder.done if folder else 0
    start = time.perf_counter()
    with Progress(
        "steps",
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    ) as bar:
        task = bar.add_task("", total=config.steps, completed=first)
        for number, logical in enumerate(draws, first + 1):
            _accumulate(step, logical, number, dataset, config, ranks, report)
            tally.begin(number)
            if ranks.world > 1:
                step.declare(draw=logical.drawn)
            step.update()
            bar.advance(task)
            if folder and (number % every == 0 or number == config.steps):
                folder.save(step)
        step.synchronize()
    return time.perf_counter() - start


def _accumulate(step, logical, number, dataset, config, ranks, report) -> None:
    if report:
        whose = " on rank 0" if ranks.world > 1 else ""
        report(f"step {number}: B = {logical.size}{whose}")
    devices = getattr(step, "shards", 1)  # that this process drives, each with a share
    if devices > 1:
        logical = side_by_side([logical.share(d, devices) for d in range(devices)])
    for i, physical in enumerate(logical):
        inputs, targets = dataset.batch(physical.indices)
        placed = step.put(inputs, targets, physical.mask)
        if report and i == 0:
            clipped = step.norms(*placed)[physical.mask] > config.clip_norm
            report(f"step {number}: clipped fraction {np.mean(clipped):.2f} (one P)")
        step.accumulate(*placed)
