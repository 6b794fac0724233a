"""Seconds that each way of each layer really takes here, for a plan that need not trust a model."""

import time

import torch
from torch import Tensor

from dpsgd import cost
from dpsgd.torch.layers.base import Rule, Seen

REPEATS = 3  # the least of them counts


def seconds(layer: cost.Layer, rule: Rule, seen: Seen) -> dict[tuple[str, str], float]:
    """{(layer, way): s}: norm and weighted sum of ``layer.examples`` examples like those seen."""
    whole = Seen(
        x=_tiled(seen.x, seen.examples, layer.examples),
        g=_tiled(seen.g, seen.examples, layer.examples),
        y=None if seen.y is None else _tiled(seen.y, seen.examples, layer.examples),
        examples=layer.examples,
    )
    return {(layer.name, way): _best(rule, way, whole) for way in layer.ways}


def _tiled(t: Tensor, examples: int, wanted: int) -> Tensor:
    rows = torch.arange(wanted, device=t.device) % examples
    return t.unflatten(0, (examples, -1))[rows].flatten(0, 1)


@torch.no_grad()
def _best(rule: Rule, way: str, seen: Seen) -> float:
    into = [torch.zeros_like(getattr(rule.module, own)) for own in rule.trained]
    factors = torch.ones(seen.examples, device=seen.g.device)

    def run():
        if way == "keep":
            rows, _ = rule.kept(seen)
            for own, each, view in zip(rule.trained, rows, into, strict=True):
                rule.add_kept(own, each, factors, view)
        else:
            rule.squared(seen, way)
            rule.add(seen, factors, into)
        if seen.g.is_cuda:
            torch.cuda.synchronize(seen.g.device)

    run()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
