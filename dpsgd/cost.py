"""
What each way to clip a layer costs, and which way is the fastest within a memory budget.

Framework-free. A layer with T positions, d inputs and p outputs per example can be

- ``keep``: every example's gradient is formed during the backward pass and stays until its clip
  factor is known: SGD's FLOPs, P·p·d numbers;
- ``gram``: the norm comes from two T×T Gram matrices, the sum from one weighted product afterwards;
  the layer's inputs and output gradients stay: P·T·(p+d) numbers;
- ``rebuild``: the norm comes from gradients that are dropped at once; the rest is as for ``gram``;
- ``together``: a parameter used more than once, or by no layer, whose gradients add up before they
  are normed;
- ``tied``: a table used as an embedding and as a linear layer: ``gram``, and the cross term.

Sources: arXiv:2110.05679 (Gram), arXiv:2210.00038 (one backward pass).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WAYS = ("keep", "gram", "rebuild")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """
    ``examples`` P, ``positions`` T, ``inputs`` d and ``outputs`` p of each of ``groups``; what is
    no product has ``outputs`` alone.

    An image whose patches overlap holds fewer numbers than T·d: ``stored``. And XXᵀ of them takes
    fewer than 2T²d FLOPs: 2T²·``gram_inputs``. ``beside`` numbers of an example and group stay
    with x and g.
    """

    name: str
    kind: str
    examples: int
    positions: int = 1
    inputs: int = 1
    outputs: int
    groups: int = 1
    itemsize: int = 4
    stored: int | None = None
    gram_inputs: int | None = None
    beside: int = 0
    ways: tuple[str, ...] = WAYS
    norms_only: bool = False  # a second backward pass makes the sum: nothing is held

    def flops(self, way: str) -> int:
        """Beyond the forward pass and the gradient of the layer's input."""
        size = self.examples * self.groups
        product = 2 * size * self.positions * self.inputs * self.outputs
        if way in ("keep", "together"):
            return product + 4 * size * self.inputs * self.outputs
        pairs = self.inputs if self.gram_inputs is None else self.gram_inputs
        gram = 2 * size * self.positions**2 * (pairs + self.outputs)
        return product + (product if way == "rebuild" else gram)

    @property
    def _pair(self) -> int:
        # Numbers of the input and the output gradient of one example and group.
        stored = self.positions * self.inputs if self.stored is None else self.stored
        return stored + self.positions * self.outputs

    def held(self, way: str) -> int:
        """Bytes that stay until the clip factors are known."""
        if self.norms_only and way in ("gram", "rebuild"):
            return 0
        kept = way in ("keep", "together")
        numbers = self.inputs * self.outputs if kept else self._pair + self.beside
        return self.examples * self.groups * numbers * self.itemsize

    def moved(self, way: str) -> int:
        """Bytes to and from memory: what is held is written once and read twice."""
        size = self.examples * self.groups * self.itemsize
        gradients = size * self.inputs * self.outputs
        pair = size * self._pair
        if way == "rebuild":
            return 2 * gradients + 2 * pair
        return 3 * gradients if way in ("keep", "together") else 2 * pair

    def effort(self, way: str, balance: float) -> float:
        """Time in units of one FLOP."""
        return self.flops(way) + balance * self.moved(way)


def balance(device: str) -> float:
    """FLOPs in the time that one byte takes to or from memory: of a ``cpu``, or another device."""
    return 10.0 if device == "cpu" else 15.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One line of a plan."""

    layer: Layer
    way: str
    why: str


def plan(
    layers: Sequence[Layer],
    *,
    memory_budget_bytes: int | None = None,
    balance: float = 10.0,
    seconds: Mapping[tuple[str, str], float] | None = None,
) -> list[Choice]:
    """
    The fastest way for each layer; slower and smaller ones where the budget asks for it.

    ``seconds`` {(layer's name, way): measured} take the place of what the sizes tell.

    Raises:
        ValueError: not even the smallest plan fits; the message says what it needs.
    """
    measured = seconds or {}

    def effort(layer: Layer, way: str) -> float:
        return measured.get((layer.name, way), layer.effort(way, balance))

    chosen = {
        layer: min(layer.ways, key=lambda way: (effort(layer, way), layer.held(way)))
        for layer in layers
    }
    fastest = "fastest as measured" if measured else "fastest"
    why = {layer: fastest if len(layer.ways) > 1 else "the only one" for layer in layers}

    def total() -> int:
        return sum(layer.held(way) for layer, way in chosen.items())

    while memory_budget_bytes is not None and total() > memory_budget_bytes:
        swaps = [
            (layer, way, saved)
            for layer, now in chosen.items()
            for way in layer.ways
            if (saved := layer.held(now) - layer.held(way)) > 0
        ]
        if not swaps:
            raise ValueError(
                f"memory_budget_bytes is {memory_budget_bytes:,}; the smallest plan holds "
                f"{total():,}: raise the budget, lower physical_batch_size or use the ghost method"
            )

        def price(swap):
            layer, way, saved = swap
            return (effort(layer, way) - effort(layer, chosen[layer])) / saved

        layer, way, _ = min(swaps, key=price)
        chosen[layer], why[layer] = way, "smaller, for the budget"
    return [Choice(layer=layer, way=chosen[layer], why=why[layer]) for layer in layers]


def show(choices: Sequence[Choice]) -> str:
    """The plan as text: layer, kind, way, MFLOPs, MB held, why."""
    rows = [("layer", "kind", "T", "d→p", "way", "MFLOPs", "MB", "why")]
    for choice in choices:
        layer, way = choice.layer, choice.way
        sizes = f"{layer.inputs}→{layer.outputs}" + (
            f" ×{layer.groups}" if layer.groups > 1 else ""
        )
        figures = f"{layer.flops(way) / 1e6:.1f}", f"{layer.held(way) / 1e6:.2f}"
        rows.append(
            (layer.name, layer.kind, str(layer.positions), sizes, way, *figures, choice.why)
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
