"""
Seconds of one logical batch on W devices, and what follows from them.

T(W) = K_W·t_pb + t_comm(W) + t_noise + t_opt + t_fix

- K_W, the physical batches of the slowest rank (:mod:`perf.scaling.trips`), each t_pb seconds;
- a ring all-reduce of S bytes takes 2(W−1)·α + 2(W−1)/W·S/β, α seconds a hop, β bytes a second;
  ``sync="once"`` makes one for each logical batch, ``sync="every"`` one for each physical batch;
- noise and optimiser once per logical batch, over all parameters; t_fix is what else is paid once.

One α and β for all hops: those of the slowest link, which a ring waits for. Inside one node the
model is therefore pessimistic. References: Thakur, Rabenseifner, Gropp, "Optimization of collective
communication operations in MPICH", 2005, section 4.4; Patarasuk, Yuan, "Bandwidth optimal
all-reduce algorithms", 2009.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perf.scaling.trips import trips

SYNCS = ("once", "every")
SCALINGS = ("strong", "weak")
FLOAT32 = 4  # bytes

Number = Any  # float, or an array of as many as there are corners


@dataclass(frozen=True, kw_only=True)
class Range:
    """An input known as low ≤ likely ≤ high."""

    low: float
    likely: float
    high: float

    def __post_init__(self):
        if not 0 <= self.low <= self.likely <= self.high:
            raise ValueError(f"{self} is no range: give 0 ≤ low ≤ likely ≤ high")


def exactly(value: float) -> Range:
    """A range without width."""
    return Range(low=value, likely=value, high=value)


@dataclass(frozen=True, kw_only=True)
class Load:
    """
    What is trained on.

    Attributes:
        expected_batch: L at W=1; in weak scaling, L of each rank.
        num_examples: N at W=1.
        parameters: trainable parameters, a count; float32 gradients are reduced.
        placement: of the draw, ``round-robin`` or ``shard``.
        scaling: ``strong`` keeps L, ``weak`` keeps L/W.
        grows: what grows with W in weak scaling, ``q`` or ``N``.
    """

    expected_batch: float
    num_examples: int
    parameters: int
    placement: str = "round-robin"
    scaling: str = "strong"
    grows: str = "N"

    def __post_init__(self):
        if self.scaling not in SCALINGS or self.grows not in ("q", "N"):
            raise ValueError(f"{self.scaling!r}, {self.grows!r}: use strong or weak, and q or N")

    def at(self, world: int) -> tuple[float, int]:
        """(L, N) of the whole logical batch on W ranks."""
        if self.scaling == "strong":
            return self.expected_batch, self.num_examples
        more = world if self.grows == "N" else 1
        return self.expected_batch * world, self.num_examples * more


@dataclass(frozen=True, kw_only=True)
class Method:
    """
    How it is trained.

    Attributes:
        physical_batch: P of one rank.
        slowdown: seconds per example over those of SGD, on one device.
        private: whether noise is added.
        sync: ``once`` per logical batch, or with ``every`` physical batch.
        padded: every physical batch costs as if it were full; otherwise by its real examples.
        overlap: share of t_pb behind which an all-reduce can hide (DDP: its backward pass, 2/3).
    """

    name: str
    physical_batch: int
    slowdown: Range = Range(low=1, likely=1, high=1)
    private: bool = False
    sync: str = "once"
    padded: bool = True
    overlap: float = 0.0

    def __post_init__(self):
        if self.sync not in SYNCS:
            raise ValueError(f"sync is {self.sync!r}; use {' or '.join(SYNCS)}")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """
    One device and its links.

    Attributes:
        examples_per_s: of SGD on one device, for the model of the load.
        alpha_s: latency of one hop of the ring, seconds.
        bytes_per_s: β, bytes a second that one rank sends in the ring.
        memory_bytes_per_s: of the device's memory, as far as noise and optimiser reach it.
        fix_s: what else is paid once per logical batch, seconds.
        sources: {field: where its range is from}.
    """

    name: str
    examples_per_s: Range
    alpha_s: Range
    bytes_per_s: Range
    memory_bytes_per_s: Range
    fix_s: Range
    sources: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Values:
    """The inputs of one prediction, seconds and bytes a second; arrays hold several at once."""

    batch_s: Number
    alpha_s: Number
    bytes_per_s: Number
    noise_s: Number = 0.0
    optimizer_s: Number = 0.0
    fix_s: Number = 0.0


# Passes over the parameters, float32: Adam reads p, g, m, v and writes p, m, v; noise is written,
# read with the sum and added to it.
ADAM_PASSES, NOISE_PASSES = 7, 4


def corners(machine: Machine, method: Method, load: Load) -> Values:
    """
    Arrays whose entry 0 is the likely case; the rest are all combinations of lows and highs.

    T is monotone in each input and so is each ratio of two T, one input at a time: the extremes of
    a band are among the corners.
    """
    ranges = [
        machine.examples_per_s,
        machine.alpha_s,
        machine.bytes_per_s,
        machine.memory_bytes_per_s,
        machine.fix_s,
        method.slowdown,
    ]
    likely = [r.likely for r in ranges]
    rest = itertools.product(*((r.low, r.high) for r in ranges))
    speed, alpha, beta, memory, fix, slowdown = np.array([likely, *rest]).T
    vector = FLOAT32 * load.parameters / memory
    return Values(
        batch_s=method.physical_batch * slowdown / speed,
        alpha_s=alpha,
        bytes_per_s=beta,
        noise_s=NOISE_PASSES * vector * method.private,
        optimizer_s=ADAM_PASSES * vector,
        fix_s=fix,
    )


def all_reduce_s(world: int, size_bytes: float, alpha_s: Number, bytes_per_s: Number) -> Number:
    """Seconds of one ring all-reduce, 2(W−1)·α + 2(W−1)/W·S/β."""
    hops = 2 * (world - 1)
    return hops * alpha_s + hops / world * size_bytes / bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    Where the seconds of one logical batch go, and what comes of them.

    Attributes:
        compute_s: of the mean rank's real examples.
        padding_s: of what fills its physical batches up.
        straggler_s: what the slowest rank needs more than the mean one.
        comm_s: all-reduces, as far as nothing hides them.
        once_s: noise, optimiser and what else is paid once.
        examples: expected real examples of the logical batch.
    """

    world: int
    compute_s: Number
    padding_s: Number
    straggler_s: Number
    comm_s: Number
    once_s: Number
    examples: float

    @property
    def seconds(self) -> Number:
        """T(W)."""
        local = self.compute_s + self.padding_s + self.straggler_s
        return local + self.comm_s + self.once_s

    @property
    def examples_per_s(self) -> Number:
        """Real examples a second, padding not counted."""
        return self.examples / self.seconds

    @property
    def comm_share(self) -> Number:
        """Of T, 0 to 1."""
        return self.comm_s / self.seconds

    @property
    def padding_share(self) -> Number:
        """Of T, 0 to 1."""
        return self.padding_s / self.seconds

    @property
    def straggler_share(self) -> Number:
        """Of T, 0 to 1."""
        return self.straggler_s / self.seconds


def step(load: Load, method: Method, world: int, values: Values) -> Step:
    """
    Predict one logical batch on W ranks.

    Raises:
        ValueError: L above N, or more ranks than examples.
    """
    expected, examples = load.at(world)
    drawn = (examples, expected / examples, world)
    batches = trips(*drawn, method.physical_batch, load.placement)
    unit = 1 if method.padded else method.physical_batch
    work = batches if method.padded else trips(*drawn, 1, load.placement)
    reductions = batches.slowest if method.sync == "every" else 1.0
    reduction = all_reduce_s(world, FLOAT32 * load.parameters, values.alpha_s, values.bytes_per_s)
    real = expected / world / method.physical_batch
    exposed = np.maximum(0, reduction - method.overlap * values.batch_s)
    return Step(
        world=world,
        compute_s=real * values.batch_s,
        padding_s=(work.mean / unit - real) * values.batch_s,
        straggler_s=(work.slowest - work.mean) / unit * values.batch_s,
        comm_s=reductions * exposed,
        once_s=values.noise_s + values.optimizer_s + values.fix_s,
        examples=expected,
    )


def efficiency(load: Load, method: Method, world: int, values: Values) -> Number:
    """Throughput of a rank over that of one device alone; 1 is ideal."""
    alone, many = (step(load, method, w, values) for w in (1, world))
    return many.examples_per_s / world / alone.examples_per_s


def band(values: Number) -> Range:
    """Likely, and the extremes, of an array whose entry 0 is the likely one."""
    values = np.asarray(values, float)
    return Range(low=float(values.min()), likely=float(values[0]), high=float(values.max()))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A line and its band at each world size: examples a second, efficiency, shares of T."""

    method: Method
    worlds: Sequence[int]
    examples_per_s: Sequence[Range]
    efficiency: Sequence[Range]
    comm_share: Sequence[Range]
    straggler_share: Sequence[Range]


def predict(load: Load, method: Method, machine: Machine, worlds: Sequence[int]) -> Prediction:
    """The band of a method over world sizes."""
    values = corners(machine, method, load)
    found = [step(load, method, w, values) for w in worlds]
    return Prediction(
        method=method,
        worlds=worlds,
        examples_per_s=[band(one.examples_per_s) for one in found],
        efficiency=[band(efficiency(load, method, w, values)) for w in worlds],
        comm_share=[band(one.comm_share) for one in found],
        straggler_share=[band(one.straggler_share) for one in found],
    )
