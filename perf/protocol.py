"""
What is timed and how; the only place that knows.

A *step* is all ``accumulate`` calls of one logical batch, ``update``, one synchronisation. Each
round of a method lies between two steps of the SGD it is compared with (same model, mode and P),
unless it is that itself; its ratio divides by their geometric mean, each per real example. Padding
is not counted as examples. Draws come from one seed, so that every method, framework and run does
the same work.
"""

import gc
import importlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dpsgd import PrivacyConfig, models, poisson_batches
from dpsgd.text import random_text
from dpsgd.tree import take
from perf import check
from perf.outcome import WrongResult
from perf.profiles import Case

SEED = 20240617
NUM_EXAMPLES = 50_000
LEARNING_RATE = 1e-6
SCHEMA = 1


def pool(spec: models.ModelSpec, physical_batch: int) -> tuple[Any, np.ndarray]:
    """Inputs and targets of 4 physical batches, leading axes [4, P], through which steps cycle."""
    rng = np.random.default_rng(SEED)
    shape = (4, physical_batch)
    inputs: Any = (
        random_text(spec, shape, rng)
        if spec.is_text
        else rng.standard_normal((*shape, *spec.input_shape), np.float32)
    )
    return inputs, rng.integers(0, spec.num_classes, shape)


def placed(step: Any, logical: Iterable[Any], inputs: Any, targets: np.ndarray) -> list[list[Any]]:
    """The physical batches of each logical batch, on the device; equal ones are put there once."""
    found: dict[tuple, Any] = {}
    batches = []
    for draw in logical:
        parts = []
        for number, part in enumerate(draw):
            key = (number % 4, part.mask.tobytes())
            if key not in found:
                which = (number % 4, slice(len(part.mask)))
                found[key] = step.put(take(inputs, which), targets[which], part.mask)
            parts.append(found[key])
        batches.append(parts)
    return batches


class Prepared:
    """A built step, its logical batches on the device already, and how to run one."""

    def __init__(self, case: Case, device: str, *, ragged: bool, checked: bool = True) -> None:
        framework = importlib.import_module(f"dpsgd.{case.row.framework}.models")
        self.case, spec = case, models.get(case.model)
        model = framework.build(spec, seed=0, device=device)
        self.privacy = PrivacyConfig(
            num_examples=NUM_EXAMPLES,
            sample_rate=case.expected_batch / NUM_EXAMPLES,
            noise_multiplier=1.0,
            clip_norm=1.0,
            steps=1000,
        )
        self.inputs, self.targets = pool(spec, case.physical_batch)
        if checked:
            self.reference = check.Reference(case, model, framework.cross_entropy, self)
        self.step = case.row.build(
            model,
            framework.optimizer(model, "adam", LEARNING_RATE),
            self.privacy,
            loss=framework.cross_entropy,
            physical_batch_size=case.physical_batch,
            precision=case.precision,
            compile=case.compile,
            seed=SEED,
        )
        draws = poisson_batches(
            NUM_EXAMPLES,
            self.privacy.sample_rate,
            case.physical_batch,
            100,
            seed=SEED,
            padded=not ragged,
        )
        logical = list(itertools.islice((d for d in draws if d.size), case.draws))
        self.sizes = [draw.size for draw in logical]
        self.batches = placed(self.step, logical, self.inputs, self.targets)
        slots = sum(len(part[2]) for parts in self.batches for part in parts)
        # A row without static shapes drops the padding itself.
        self.padding_fraction = 1 - sum(self.sizes) / slots if case.row.static_shapes else 0.0

    def run(self, draw: int) -> None:
        """One whole step on draw number ``draw``."""
        for part in self.batches[draw % len(self.batches)]:
            self.step.accumulate(*part)
        self.step.update()
        self.step.synchronize()


def timed(function: Callable, *args: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one call takes."""
    start = clock()
    function(*args)
    return clock() - start


def ratios(
    seconds: Sequence[float], sizes: Sequence[int], baseline: Sequence[float]
) -> list[float]:
    """
    Slowdown of each round against the SGD steps before and after it, per real example.

    ``baseline`` holds one more value than ``seconds``: its last step repeats the last draw.
    """
    sizes = [*sizes, sizes[-1]]
    per_example = [b / n for b, n in zip(baseline, sizes, strict=True)]
    return [
        t / n / np.sqrt(before * after)
        for t, n, (before, after) in zip(
            seconds, sizes[:-1], itertools.pairwise(per_example), strict=True
        )
    ]


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median, from a fixed seed."""
    rng = np.random.default_rng(0)
    picks = rng.choice(np.asarray(values), (2000, len(values)))
    low, high = np.percentile(np.median(picks, axis=1), [2.5, 97.5])
    return float(low), float(high)


def blank(case: Case, profile: str) -> dict[str, Any]:
    """The row of a case before it is measured."""
    return {
        "schema": SCHEMA,
        "case": case.id,
        "profile": profile,
        "method": case.method,
        "baseline": case.row.baseline,
        "framework": case.row.framework,
        "model": case.model,
        "model_overrides": [
            part
            for part in case.model.split("-")
            if part.endswith(("px", "blocks", "tok", "frozenemb"))
        ],
        "precision": case.precision,
        "compile": case.compile,
        "physical_batch": case.physical_batch,
        "expected_batch": case.expected_batch,
        "sample_rate": case.expected_batch / NUM_EXAMPLES,
        "noise_multiplier": 1.0,
        "world_size": 1,
        "seed": SEED,
        "deviations": list(case.row.deviations),
        "status": "error",
        "reason": "",
    }


class Bench:
    """Measures cases in one process; keeps the last SGD step, which the next case may share."""

    def __init__(
        self, device: str, rounds: int | None, clock: Callable[[], float] = time.perf_counter
    ):
        self.device, self.rounds, self.clock = device, rounds, clock
        self._kept: tuple[Any, Prepared] | None = None

    def measure(self, case: Case, pedantic: Callable, row: dict[str, Any]) -> None:
        """
        Check the step of ``case``, time it in pairs, fill ``row``.

        Args:
            case: what to measure.
            pedantic: ``pedantic(target, setup=…, rounds=…, warmup_rounds=…)`` times the rounds and
                returns their seconds.
            row: from :func:`blank`; filled as far as it gets.

        Raises:
            WrongResult: the check failed, or the step recompiled after warm-up.
        """
        subject = Prepared(case, self.device, ragged=case.ragged)
        compiled = subject.step.compiles()
        row["padding_fraction"] = subject.padding_fraction
        problem, row["first_step_s"] = subject.reference.problem(subject.step, self.clock)
        if problem:
            raise WrongResult(problem)
        row["checked"], row["checked_to"] = True, subject.reference.tolerance
        row["compiles"] = subject.step.compiles() - compiled
        own = case.method == case.row.baseline
        sgd = None if own else self._sgd(case)
        if not case.row.static_shapes:
            compiled = subject.step.compiles()
            cold = [timed(subject.run, k, clock=self.clock) for k in range(case.draws)]
            row["recompiles"] = subject.step.compiles() - compiled
            row["examples_per_s_with_recompiles"] = sum(subject.sizes) / sum(cold)
        compiled, baseline, draws = subject.step.compiles(), [], itertools.count()
        rounds, warm_up = self.rounds or case.rounds, case.warm_up

        def setup():
            draw = next(draws)
            if sgd:
                baseline.append(timed(sgd.run, draw, clock=self.clock))
            gc.collect()
            return (draw,), {}

        gc.disable()
        try:
            seconds = pedantic(subject.run, setup=setup, rounds=rounds, warmup_rounds=warm_up)
            last = warm_up + rounds - 1
            if sgd:
                baseline.append(timed(sgd.run, last, clock=self.clock))
        finally:
            gc.enable()
        sizes = [subject.sizes[k % case.draws] for k in range(warm_up, last + 1)]
        row |= self._summary(seconds, sizes, baseline[warm_up:] if sgd else None)
        row["update_s"] = self._update_seconds(subject)
        if case.row.static_shapes:
            row["recompiles"] = subject.step.compiles() - compiled
            if row["recompiles"] and (sgd is None or case.row.framework == "jax"):
                raise WrongResult(f"compiled {row['recompiles']} times more after warm-up")
        if not all(np.isfinite(p).all() for p in subject.step.parameters().values()):
            raise WrongResult("parameters are not finite after the timed steps")
        row["status"] = "ok"
        if own:
            self._kept = (self._key(case, case.ragged), subject)

    def _summary(self, seconds, sizes, baseline) -> dict[str, Any]:
        per_example = np.array(seconds) / sizes
        q1, median, q3 = np.percentile(per_example, [25, 50, 75])
        found = {
            "rounds": len(seconds),
            "seconds": list(map(float, seconds)),
            "sizes": list(map(int, sizes)),
            "examples_per_s": float(1 / median),
            "iqr_fraction": float((q3 - q1) / median),
        }
        if baseline is not None:
            slow = ratios(seconds, sizes, baseline)
            q1, median, q3 = np.percentile(slow, [25, 50, 75])
            found |= {
                "baseline_s": list(map(float, baseline)),
                "ratios": list(map(float, slow)),
                "slowdown": float(median),
                "slowdown_q1": float(q1),
                "slowdown_q3": float(q3),
                "slowdown_ci": interval(slow),
            }
        return found

    def _update_seconds(self, subject: Prepared) -> float:
        found = []
        for draw in range(3):
            draw %= len(subject.batches)
            subject.step.accumulate(*subject.batches[draw][0])
            subject.step.synchronize()

            def update():
                subject.step.update()
                subject.step.synchronize()

            found.append(timed(update, clock=self.clock))
        return float(np.median(found))

    @staticmethod
    def _key(case: Case, ragged: bool):
        return (case.baseline, ragged)

    def _sgd(self, case: Case) -> Prepared:
        key = self._key(case, case.ragged)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # free it before the next one is built
            prepared = Prepared(case.baseline, self.device, ragged=case.ragged, checked=False)
            for draw in range(case.draws):  # ragged shapes compile here, not in a timed round
                prepared.run(draw)
            self._kept = (key, prepared)
        return self._kept[1]
