"""
The loop of all steps, as every rank runs it: progress, checkpoints, what an early end has spent.

Nothing that depends on the training data is shown, unless diagnostics are asked for.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dpsgd.checkpoint import Folder
from dpsgd.data import Dataset
from dpsgd.privacy import PrivacyConfig
from dpsgd.ranks import Ranks
from dpsgd.sampling import LogicalBatch, side_by_side

_RELATIONS = {"add_remove": "add/remove one", "replace_one": "replace one"}


def rounded_up(epsilon: float) -> str:
    """ε is an upper bound and stays one when it is shown."""
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "inf"


def statement(
    epsilon: float, *, delta: float, neighbours: str, sample_rate: float, steps: int
) -> str:
    """``epsilon``, with all that it is stated for."""
    return (
        f"ε = {rounded_up(epsilon)} at δ = {delta:g} "
        f"({_RELATIONS[neighbours]}, Poisson q={sample_rate:.4g}, T={steps}, PLD)"
    )


class Interrupted(KeyboardInterrupt):
    """
    Ctrl-C after ``steps`` updates of a run of ``config`` were begun.

    Attributes:
        seeded: whether draws and noise came from a seed.
    """

    def __init__(self, steps: int, config: PrivacyConfig, seeded: bool):
        super().__init__(steps, config, seeded)
        self.steps, self.config, self.seeded = steps, config, seeded

    @property
    def epsilon(self) -> float:
        """What was spent."""
        return self.config.epsilon(self.steps)


class Unsaved(RuntimeError):
    """The system has failed the run, for ``reason``; the message says what was spent, too."""

    public = True  # the message holds nothing of the data

    def __init__(self, reason: str, steps: int, config: PrivacyConfig, seeded: bool):
        spent = statement(
            config.epsilon(steps),
            delta=config.delta,
            neighbours=config.neighbours,
            sample_rate=config.sample_rate,
            steps=steps,
        )
        unless = seeded * ", which holds for nobody who knows the seed"
        super().__init__(
            f"{reason}: the run ends after {steps} of {config.steps} steps, which spent "
            f"{spent}{unless}; mend that and resume"
        )


class Tally:
    """Steps to charge: those that were begun, in this run or, with its folder, before."""

    def __init__(self) -> None:
        self._folder: Folder | None = None
        self._config: PrivacyConfig | None = None
        self._begun, self._seeded = 0, False

    def open(self, folder: Folder | None, config: PrivacyConfig, seeded: bool) -> None:
        """Before the first step: what the run is; its folder, if it has one, knows of seeds."""
        self._folder, self._config, self._seeded = folder, config, seeded

    def begin(self, number: int) -> None:
        """Before the update of step ``number``: interrupted in it, the sum may be out already."""
        self._begun = number
        if self._folder:
            with self._written(self._folder) as folder:
                folder.begin(number)

    def save(self, step: Any) -> None:
        """A checkpoint, where the run has a folder."""
        if self._folder:
            with self._written(self._folder) as folder:
                folder.save(step)

    @contextlib.contextmanager
    def _written(self, folder: Folder) -> Iterator[Folder]:
        try:
            yield folder
        except OSError as error:
            assert self._config is not None
            reason = f"{folder.path} cannot be written ({error.strerror or error})"
            raise Unsaved(reason, self.steps, self._config, self.seeded) from error

    @property
    def steps(self) -> int:
        """How many."""
        return self._folder.charged if self._folder else self._begun

    @property
    def seeded(self) -> bool:
        """Whether draws and noise came from a seed."""
        return self._folder.seeded if self._folder else self._seeded

    @contextlib.contextmanager
    def stated(self) -> Iterator[None]:
        """Ctrl-C or a failing file within, at whatever point, says what was spent, if any was."""
        try:
            yield
        except OSError as error:
            if self._config and (steps := self.steps):
                raise Unsaved(str(error), steps, self._config, self.seeded) from error
            raise
        except KeyboardInterrupt:
            if self._config and (steps := self.steps):
                raise Interrupted(steps, self._config, self.seeded) from None
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
            if number % every == 0 or number == config.steps:
                tally.save(step)
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
