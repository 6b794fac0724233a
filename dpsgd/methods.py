"""
The registry: one row per method, imported only when it is built.

A method is one file under ``dpsgd/<framework>/methods/`` and one row here. Tests and benchmarks
read this table, so a new method needs nothing else.
"""

import difflib
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Step(Protocol):
    """
    One training step of one method: the loop every method, ours or a peer's, is driven by.

    ``for physical in logical: step.accumulate(*step.put(inputs, targets, mask))`` then
    ``step.update()`` once per logical batch, after an empty draw too. ``done`` counts updates.
    """

    done: int

    def put(self, inputs: Any, targets: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Move NumPy ``inputs`` [P, ...] (images NCHW), ``targets``, ``mask`` to the device."""

    def accumulate(self, inputs: Any, targets: Any, mask: Any) -> None:
        """Add the clipped gradients of the unmasked examples; leading axis P, ``mask`` [P] bool."""

    def update(self) -> None:
        """
        Add N(0, σ²C²) once, divide by L, apply the optimizer, clear the sum.

        Over ranks this holds the only collective: every rank calls it, whatever its share.
        """

    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def clipped_sum(self, inputs: Any, targets: Any, mask: Any) -> Mapping[str, Any]:
        """Clipped sum of one physical batch: {torch parameter name: NumPy array, torch layout}."""

    def norms(self, inputs: Any, targets: Any, mask: Any) -> Any:
        """Per-example gradient L2 norms, NumPy float32 [P]; masked rows are 0."""

    def parameters(self) -> Mapping[str, Any]:
        """Trainable parameters now: {torch parameter name: NumPy array, torch layout}."""

    def state(self) -> dict[str, Any]:
        """Model and optimizer as NumPy arrays, by name; nothing secret."""

    def restore(self, state: Mapping[str, Any], done: int) -> None:
        """Come back to ``state`` after ``done`` updates; the noise goes on from there."""

    def compiles(self) -> int:
        """How often this process has compiled this method's functions so far (0 for eager)."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """
    One row. ``target`` is ``module:Class``; ``baseline`` the SGD row it is paired with.

    ``static_shapes``: compiles once whatever is drawn. ``accepts_ragged``: takes variable physical
    sizes without cost, while it is not compiled. ``deviations``: where a peer differs from exact
    flat clipping, each asserted by a test.
    """

    name: str
    target: str
    private: bool = True
    baseline: str
    source: str
    requires: tuple[str, ...] = ()
    static_shapes: bool = True
    accepts_ragged: bool = False
    deviations: tuple[str, ...] = ()
    ours: bool = True

    @property
    def framework(self) -> str:
        """``torch`` or ``jax``."""
        return self.name.split("-")[0]

    def pads(self, compile: bool) -> bool:
        """Whether physical batches are padded to P: where each size would be compiled anew."""
        return not self.accepts_ragged or (compile and self.framework == "torch")

    def missing(self) -> tuple[str, ...]:
        """The packages this method needs that are not installed here."""
        needed = (self.framework, *self.requires)
        return tuple(name for name in needed if importlib.util.find_spec(name) is None)

    def build(self, model: Any, optimizer: Any, privacy: Any, **options: Any) -> Step:
        """
        Build the step.

        Args:
            model: ``torch.nn.Module`` or ``flax.nnx.Module``.
            optimizer: a ``torch.optim.Optimizer`` or an optax ``GradientTransformation``.
            privacy: a :class:`dpsgd.PrivacyConfig`.
            **options: ``loss(model, inputs, targets) -> [P]``, ``physical_batch_size``,
                ``precision`` (fp32, tf32, bf16), ``compile``, ``memory_budget_bytes``, ``seed``;
                over ranks ``ranks``, ``noise_placement`` (split, rank0), ``sync`` (once, every).

        Raises:
            ModuleNotFoundError: a package of this row is not installed.
            ValueError: the model holds what cannot be clipped per example, named in the message.
        """
        if missing := self.missing():
            raise ModuleNotFoundError(
                f"{self.name} needs {', '.join(missing)}: pip install {' '.join(missing)}"
            )
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)(
            model, optimizer, privacy, **options
        )


_OPACUS = (
    "clip factor is C/(norm+1e-6)",
    "a non-finite example gradient spreads to the whole sum",
)
_PAPER = "arXiv:2406.17298 §3"

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="torch-sgd",
            target="dpsgd.torch.methods.sgd:SGD",
            private=False,
            baseline="torch-sgd",
            source="non-private",
            accepts_ragged=True,
        ),
        Method(
            name="torch-opacus",
            target="dpsgd.torch.methods.opacus:Opacus",
            baseline="torch-sgd",
            source="Opacus, hooks (arXiv:2109.12298)",
            requires=("opacus",),
            accepts_ragged=True,
            deviations=_OPACUS,
            ours=False,
        ),
        Method(
            name="torch-opacus-ghost",
            target="dpsgd.torch.methods.opacus_ghost:OpacusGhost",
            baseline="torch-sgd",
            source="Opacus, ghost clipping (arXiv:2110.05679)",
            requires=("opacus",),
            accepts_ragged=True,
            deviations=_OPACUS,
            ours=False,
        ),
        Method(
            name="torch-vmap",
            target="dpsgd.torch.methods.vmap:Vmap",
            baseline="torch-sgd",
            source="torch.func vmap(grad)",
            accepts_ragged=True,
        ),
        Method(
            name="torch-bookkeeping",
            target="dpsgd.torch.methods.bookkeeping:Bookkeeping",
            baseline="torch-sgd",
            source="arXiv:2210.00038, planned per layer",
            accepts_ragged=True,
        ),
        Method(
            name="torch-ghost",
            target="dpsgd.torch.methods.ghost:Ghost",
            baseline="torch-sgd",
            source="arXiv:2110.05679, planned per layer",
            accepts_ragged=True,
        ),
        Method(
            name="jax-sgd",
            target="dpsgd.jax.methods.sgd:SGD",
            private=False,
            baseline="jax-sgd",
            source="non-private",
        ),
        Method(
            name="jax-sgd-tuned",
            target="dpsgd.jax.methods.sgd_tuned:SGDTuned",
            private=False,
            baseline="jax-sgd",
            source="non-private, weight gradients as products of a chosen layout",
        ),
        Method(
            name="jax-vmap",
            target="dpsgd.jax.methods.vmap:Vmap",
            baseline="jax-sgd",
            source=f"{_PAPER}, naive",
            static_shapes=False,
        ),
        Method(
            name="jax-masked",
            target="dpsgd.jax.methods.masked:Masked",
            baseline="jax-sgd",
            source=f"{_PAPER}, masked",
        ),
        Method(
            name="jax-bookkeeping",
            target="dpsgd.jax.methods.bookkeeping:Bookkeeping",
            baseline="jax-sgd",
            source="arXiv:2210.00038, planned per layer",
        ),
        Method(
            name="jax-ghost",
            target="dpsgd.jax.methods.ghost:Ghost",
            baseline="jax-sgd",
            source="arXiv:2110.05679, norms by layer",
        ),
        Method(
            name="jax-optax",
            target="dpsgd.jax.methods.optax:Optax",
            baseline="jax-sgd",
            source="optax.per_example_global_norm_clip",
            requires=("optax",),
            deviations=("a NaN example gradient gets factor 1 and spreads to the whole sum",),
            ours=False,
        ),
        Method(
            name="jax-privacy",
            target="dpsgd.jax.methods.privacy:JaxPrivacy",
            baseline="jax-sgd",
            source="jax-privacy clipped_grad",
            requires=("jax_privacy",),
            deviations=("zeroes non-finite elements, not the whole example",),
            ours=False,
        ),
    )
}


def get(name: str) -> Method:
    """
    The row called ``name``.

    Raises:
        KeyError: there is none; the message gives the nearest names.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.3) or list(METHODS)
        raise KeyError(f"unknown method {name!r}; did you mean {', '.join(near)}?")
    return METHODS[name]
