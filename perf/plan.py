"""
What is measured at several world sizes: each setting is one method at one size.

Strong scaling keeps L; weak scaling keeps L/W, so that q = L/N or N grows with W. ε is that of the
setting's q after T steps: the world size never enters it, but a q that grew with W does.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from dpsgd import methods, models, privacy
from perf.profiles import Case

STEPS = 1000  # T, for which ε is stated
DELTA = 1e-5
NUM_EXAMPLES = 50_000
SYNCS = ("once", "every")
PLACEMENTS = ("split", "rank0")
SCALINGS = ("strong", "weak")
USUAL = {
    "torch": ("torch-sgd", "torch-bookkeeping"),
    "jax": ("jax-sgd", "jax-bookkeeping"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    One method at one world size.

    Attributes:
        expected_batch: L of the whole logical batch, over all ranks.
        sync: gradients are reduced ``once`` a logical batch, or with ``every`` physical one.
        placement: each rank adds its share of the noise (``split``), or ``rank0`` all of it.
        grows: what grows with W in weak scaling, ``q`` or ``N``; empty in strong scaling.
    """

    model: str
    method: str
    world_size: int
    scaling: str
    physical_batch: int
    expected_batch: int
    num_examples: int
    grows: str = ""
    sync: str = "once"
    placement: str = "split"
    precision: str = "fp32"
    compile: bool = False

    @property
    def case(self) -> Case:
        """The same on one device, for everything that does not know of ranks."""
        return Case(
            model=self.model,
            physical_batch=self.physical_batch,
            method=self.method,
            precision=self.precision,
            compile=self.compile,
            wanted_batch=self.expected_batch,
        )

    @property
    def sample_rate(self) -> float:
        """The probability q = L/N."""
        return self.expected_batch / self.num_examples

    @property
    def id(self) -> str:
        """The case's id, then world size, scaling, synchronisation, placement of the noise."""
        more = [f"w{self.world_size}", self.scaling, self.sync, self.placement]
        return "-".join([self.case.id, *more])

    def epsilon(self) -> float | None:
        """ε at δ after T steps, by PLD, add/remove; None of SGD."""
        return _epsilon(self.sample_rate) if self.case.row.private else None


@functools.cache
def _epsilon(sample_rate: float) -> float:
    return privacy.epsilon(sample_rate=sample_rate, noise_multiplier=1.0, steps=STEPS, delta=DELTA)


def sizes(limit: int) -> list[int]:
    """1, 2, 4 … and ``limit`` itself."""
    return sorted({*(1 << n for n in range(limit.bit_length())), limit} - {0})


def settings(
    framework: str,
    worlds: Sequence[int],
    *,
    model: str,
    physical_batch: int,
    methods_wanted: Sequence[str] | None = None,
    scalings: Sequence[str] = SCALINGS,
    syncs: Sequence[str] = SYNCS,
    placements: Sequence[str] = ("split",),
    times: int = 4,
    num_examples: int = NUM_EXAMPLES,
    grows: str = "q",
    precision: str = "fp32",
    compiled: bool = False,
) -> list[Setting]:
    """
    The settings of one framework, SGD that reduces once first at each size and scaling.

    Each rank has ``times`` physical batches a step: at the largest world in strong scaling, at
    every world in weak scaling, so that both meet there.

    Raises:
        ValueError, KeyError: an unknown name, a world size below 1, or L above N.
    """
    for world in worlds:
        if world < 1:
            raise ValueError(f"a world of {world} ranks: it must be at least 1")
    for names, known in ((scalings, SCALINGS), (syncs, SYNCS), (placements, PLACEMENTS)):
        if unknown := set(names) - set(known):
            raise ValueError(f"unknown {', '.join(sorted(unknown))}; use {', '.join(known)}")
    if grows not in ("q", "N"):
        raise ValueError(f"what grows is {grows!r}; use q or N")
    models.get(model)
    rows = [methods.get(name) for name in methods_wanted or USUAL[framework]]
    rows = [row for row in rows if row.framework == framework]
    baselines = [methods.get(row.baseline) for row in rows]
    rows = list({row.name: row for row in [*baselines, *rows]}.values())
    rows.sort(key=lambda row: row.private)
    found = []
    for world in worlds:
        for scaling in scalings:
            ranks = world if scaling == "weak" else max(worlds)
            expected = times * physical_batch * ranks
            examples = num_examples
            if scaling == "weak" and grows == "N":
                examples = num_examples * world // min(worlds)
            if expected > examples:
                raise ValueError(
                    f"L = {expected} of {ranks} ranks is above N = {examples}: raise "
                    "--num-examples, lower --times, or let N grow (--grows N)"
                )
            for row in rows:
                # Once always, and first: the others are paired with it.
                variants = [(sync, "split") for sync in SYNCS if sync in ("once", *syncs)]
                if row.private:
                    variants = [("once", placement) for placement in placements]
                elif row.name.endswith("-tuned"):
                    variants = variants[:1]
                found += [
                    Setting(
                        model=model,
                        method=row.name,
                        world_size=world,
                        scaling=scaling,
                        physical_batch=physical_batch,
                        expected_batch=expected,
                        num_examples=examples,
                        grows=grows if scaling == "weak" else "",
                        sync=sync,
                        placement=placement,
                        precision=precision,
                        compile=compiled or framework == "jax",
                    )
                    for sync, placement in variants
                ]
    return found
