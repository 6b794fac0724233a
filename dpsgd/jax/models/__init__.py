"""
The flax.nnx twins of the torch models: same names, same weights, images NHWC.

Text models are called with ``input_ids`` and ``attention_mask``, int32 [P, T].
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dpsgd.jax import weights as layouts
from dpsgd.jax.models.bert import Bert, DistilBert, Roberta
from dpsgd.jax.models.bit import BiT
from dpsgd.jax.models.cnn import CNN
from dpsgd.jax.models.vit import ViT
from dpsgd.jax.step import laid_out
from dpsgd.models import ModelSpec, initial_weights
from dpsgd.tree import length, take, tree_map

_KINDS: dict[str, Any] = {
    "cnn": CNN,
    "vit": ViT,
    "bit": BiT,
    "bert": Bert,
    "distilbert": DistilBert,
    "roberta": Roberta,
}


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


def preload(spec: ModelSpec) -> None:
    """Import what :func:`build` needs: all of it is imported with this module."""


def build(
    spec: ModelSpec, *, seed: int = 0, weights: str | Path | None = None, device: str | None = None
) -> nnx.Module:
    """
    The model of ``spec``, with the same initial weights as its torch twin.

    Args:
        spec: a row of :data:`dpsgd.models.MODELS`.
        seed: of the initial weights.
        weights: a local folder with ``*.safetensors`` in Hugging Face's names.
        device: ``cpu``, ``cuda`` or None for JAX's own choice.

    Raises:
        ValueError: no twin of this model; or the checkpoint does not fit it, and the message names
            the parameter.
    """
    if spec.family not in _KINDS:
        raise ValueError(
            f"{spec.name} has no JAX twin yet: use a torch method, or {', '.join(_KINDS)}"
        )
    graph, state = nnx.split(nnx.eval_shape(lambda: _frozen(spec)))
    values = initial_weights(layouts.shapes(state), seed=seed, checkpoint=weights)
    with jax.default_device(jax.local_devices(backend=device)[0] if device else None):
        layouts.fill(state, values)
    return nnx.merge(graph, state)


def _frozen(spec: ModelSpec) -> nnx.Module:
    model = _KINDS[spec.family](spec, nnx.Rngs(0))
    modules = dict(nnx.iter_graph(model))
    for (*parents, leaf), variable in nnx.to_flat_state(nnx.state(model)):
        if not spec.trains(".".join(map(str, parents))):
            setattr(modules[tuple(parents)], str(leaf), Frozen(variable[...]))
    return model


def logits(model, inputs):
    """[P, classes] of ``inputs``, an array [P, ...] or a dict of them."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def cross_entropy(model, inputs, targets):
    """Per-example cross-entropy in float32, [P]; ``inputs`` as in :func:`logits`."""
    scores = logits(model, inputs).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(scores, targets)


def optimizer(model: nnx.Module, name: str, learning_rate: float) -> optax.GradientTransformation:
    """``adam`` or ``sgd``; ``model`` is unused, for the same call as in torch."""
    kinds = {"adam": optax.adam, "sgd": optax.sgd}
    if name not in kinds:
        raise ValueError(f"unknown optimizer {name!r}; use one of {', '.join(kinds)}")
    return kinds[name](learning_rate)


@nnx.jit
def _classes(model, inputs):
    return logits(model, inputs).argmax(-1)


def predict(step, inputs: Any, batch_size: int = 256) -> np.ndarray:
    """Predicted classes, int64 [n], of NumPy ``inputs`` (n rows) by the model in ``step``."""
    model, chunks = step.model, []
    for start in range(0, length(inputs), batch_size):
        chunk = take(inputs, slice(start, start + batch_size))
        count = length(chunk)
        padded = tree_map(lambda a: _padded(laid_out(a), batch_size), chunk)  # compiled once
        chunks.append(np.asarray(_classes(model, padded))[:count])
    return np.concatenate(chunks).astype(np.int64)


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])
