"""The flax.nnx twins of the torch models: same names, same weights, images NHWC."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dpsgd.jax import weights as layouts
from dpsgd.jax.step import laid_out
from dpsgd.models import ModelSpec, initial_weights


class CNN(nnx.Module):
    """Two convolutions with GroupNorm; flattened channels first, as torch does."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        side = spec.image_size // 2
        self.conv1 = nnx.Conv(spec.channels, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.GroupNorm(16, num_groups=4, epsilon=1e-5, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm2 = nnx.GroupNorm(32, num_groups=4, epsilon=1e-5, rngs=rngs)
        self.linear = nnx.Linear(32 * side * side, spec.num_classes, rngs=rngs)

    def __call__(self, x):
        """[P, H, W, C] to logits [P, classes]."""
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.linear(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


class _Module(nnx.Module):
    """A bare holder, so that attribute paths spell the torch names."""


class Attention(nnx.Module):
    """Self-attention with separate projections."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nnx.Linear(width, width, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x):
        """[P, T, d] to [P, T, d]."""
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (proj(x).reshape(split) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.attention = Attention(spec.width, spec.heads, rngs)
        self.layernorm_before = nnx.LayerNorm(spec.width, epsilon=1e-12, rngs=rngs)
        self.layernorm_after = nnx.LayerNorm(spec.width, epsilon=1e-12, rngs=rngs)
        self.mlp = _Module()
        self.mlp.fc1 = nnx.Linear(spec.width, spec.mlp, rngs=rngs)
        self.mlp.fc2 = nnx.Linear(spec.mlp, spec.width, rngs=rngs)

    def __call__(self, x):
        """[P, T, d] to [P, T, d]."""
        x = x + self.attention(self.layernorm_before(x))
        hidden = jax.nn.gelu(self.mlp.fc1(self.layernorm_after(x)), approximate=False)
        return x + self.mlp.fc2(hidden)


class ViT(nnx.Module):
    """The ViT of Hugging Face transformers (arXiv:2010.11929), class token and all."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        patch, tokens = (spec.patch, spec.patch), (spec.image_size // spec.patch) ** 2 + 1
        self.vit = _Module()
        self.vit.embeddings = _Module()
        self.vit.embeddings.cls_token = nnx.Param(jnp.zeros((1, 1, spec.width)))
        self.vit.embeddings.position_embeddings = nnx.Param(jnp.zeros((1, tokens, spec.width)))
        self.vit.embeddings.patch_embeddings = _Module()
        self.vit.embeddings.patch_embeddings.projection = nnx.Conv(
            spec.channels, spec.width, patch, strides=patch, padding="VALID", rngs=rngs
        )
        self.vit.layers = nnx.List([Block(spec, rngs) for _ in range(spec.blocks)])
        self.vit.layernorm = nnx.LayerNorm(spec.width, epsilon=1e-12, rngs=rngs)
        self.classifier = nnx.Linear(spec.width, spec.num_classes, rngs=rngs)

    def __call__(self, x):
        """[P, H, W, C] to logits [P, classes]."""
        embeddings = self.vit.embeddings
        x = embeddings.patch_embeddings.projection(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = jnp.broadcast_to(embeddings.cls_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token.astype(x.dtype), x], 1) + embeddings.position_embeddings[...]
        for block in self.vit.layers:
            x = block(x)
        return self.classifier(self.vit.layernorm(x)[:, 0])


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
    kinds = {"cnn": CNN, "vit": ViT}
    if spec.family not in kinds:
        raise ValueError(f"{spec.name} has no JAX twin yet: use a torch method, or a ViT")
    kind = kinds[spec.family]
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(spec, nnx.Rngs(0))))
    values = initial_weights(layouts.shapes(state), seed=seed, checkpoint=weights)
    with jax.default_device(jax.local_devices(backend=device)[0] if device else None):
        layouts.fill(state, values)
    return nnx.merge(graph, state)


def cross_entropy(model, inputs, targets):
    """Per-example cross-entropy in float32, [P]; ``inputs`` [P, ...], ``targets`` int32 [P]."""
    logits = model(inputs).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def optimizer(model: nnx.Module, name: str, learning_rate: float) -> optax.GradientTransformation:
    """``adam`` or ``sgd``; ``model`` is unused, for the same call as in torch."""
    kinds = {"adam": optax.adam, "sgd": optax.sgd}
    if name not in kinds:
        raise ValueError(f"unknown optimizer {name!r}; use one of {', '.join(kinds)}")
    return kinds[name](learning_rate)


@nnx.jit
def _classes(model, inputs):
    return model(inputs).argmax(-1)


def predict(step, inputs: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Predicted classes, int64 [n], of NumPy ``inputs`` [n, ...] by the model in ``step``."""
    model, chunks = step.model, []
    for start in range(0, len(inputs), batch_size):
        chunk = inputs[start : start + batch_size]
        padded = np.zeros((batch_size, *inputs.shape[1:]), inputs.dtype)  # one shape, one compile
        padded[: len(chunk)] = chunk
        chunks.append(np.asarray(_classes(model, laid_out(padded)))[: len(chunk)])
    return np.concatenate(chunks).astype(np.int64)
