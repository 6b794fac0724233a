"""
One rank's part of a setting: the built step, and its share of every draw on its device already.

All ranks draw the same global logical batches from one seed and take their part of each. A JAX
process may drive several devices: it takes their parts side by side.
"""

import importlib
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dpsgd import PrivacyConfig, models
from dpsgd.sampling import LogicalBatch, poisson_batches, side_by_side
from perf.plan import DELTA, STEPS, Setting
from perf.protocol import LEARNING_RATE, SEED, placed, pool

DRAWS = 3  # rounds cycle through as many logical batches


def local(logical: LogicalBatch, ranks: Sequence[int], world: int, sync: str) -> list[Any]:
    """
    The physical batches of a process that drives the devices ``ranks`` of ``world``.

    Where every physical batch is reduced, all processes make as many as the longest share has, the
    last ones fully masked: a rank that left early would leave the others waiting.
    """
    shares = [logical.share(rank, world, even=sync == "every") for rank in ranks]
    return list(side_by_side(shares) if len(shares) > 1 else shares[0])


class Share:
    """
    ``run(draw)`` is one whole step of this rank.

    ``trips`` [draws][world] counts the physical batches of every rank.
    """

    def __init__(self, setting: Setting, ranks: Any, device: str) -> None:
        case, world = setting.case, setting.world_size
        framework = importlib.import_module(f"dpsgd.{case.row.framework}.models")
        spec = models.get(case.model)
        model = framework.build(spec, seed=0, device=device)
        self.private = case.row.private
        privacy = PrivacyConfig(
            num_examples=setting.num_examples,
            sample_rate=setting.sample_rate,
            noise_multiplier=1.0,
            clip_norm=1.0,
            steps=STEPS,
            delta=min(DELTA, 0.5 / setting.num_examples),
        )
        self.step: Any = case.row.build(
            model,
            framework.optimizer(model, "adam", LEARNING_RATE),
            privacy,
            loss=framework.cross_entropy,
            physical_batch_size=case.physical_batch,
            precision=case.precision,
            compile=case.compile,
            ranks=ranks,
            noise_placement=setting.placement,
            sync=setting.sync,
        )
        place = getattr(self.step, "place", None)  # JAX: the devices of this process
        mine = place.device_ranks if place else [ranks.rank]
        self.shards = len(mine)
        draws = poisson_batches(
            setting.num_examples,
            setting.sample_rate,
            case.physical_batch,
            100,
            seed=SEED,
            padded=not case.ragged,
        )
        logical = list(itertools.islice((d for d in draws if d.size), DRAWS))
        self.sizes = [draw.size for draw in logical]
        even = setting.sync == "every"
        self.trips = [
            [len(draw.share(r, world, even=even)) for r in range(world)] for draw in logical
        ]
        parts = [local(draw, mine, world, setting.sync) for draw in logical]
        inputs, targets = pool(spec, case.physical_batch * self.shards)
        self.batches = placed(self.step, parts, inputs, targets)

    def accumulate(self, draw: int, *, wait: bool = False) -> None:
        """All physical batches of draw number ``draw``."""
        for part in self.batches[draw % len(self.batches)]:
            self.step.accumulate(*part)
        if wait:
            self.step.synchronize()

    def run(self, draw: int) -> None:
        """One whole step."""
        self.accumulate(draw)
        self.step.update()
        self.step.synchronize()

    def in_parts(self, draw: int, clock=time.perf_counter) -> tuple[list[float], float]:
        """Seconds until each device of this rank has its sum; and from the last one to the end."""
        start = clock()
        self.accumulate(draw)
        arrived = self._arrivals(start, clock)
        then = clock()
        self.step.update()
        self.step.synchronize()
        return arrived, clock() - then

    def _arrivals(self, start: float, clock) -> list[float]:
        if self.shards == 1:
            self.step.synchronize()
            return [clock() - start]
        import jax

        def arrived(shard):
            shard.data.block_until_ready()
            return clock() - start

        shards = jax.tree.leaves(self.step.total)[0].addressable_shards
        with ThreadPoolExecutor(len(shards)) as pool:
            return list(pool.map(arrived, shards))
