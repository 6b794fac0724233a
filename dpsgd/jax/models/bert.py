"""
Hugging Face's BERT (arXiv:1810.04805), RoBERTa and DistilBERT as classifiers of sequences.

``input_ids`` and ``attention_mask`` are integers [P, T], the mask 0 at padding; the class is told
from the first token. There is no dropout.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd.models import ModelSpec


def _attention(heads: int, q, k, v, mask):
    """Softmax attention of [P, T, d] by heads, to the keys that ``mask`` [P, T] lets in."""
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
    seen = None if mask is None else (mask != 0)[:, None, None]
    found = jax.nn.dot_product_attention(q, k, v, mask=seen)
    return found.reshape(*found.shape[:2], -1)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


class Embeddings(nnx.Module):
    """The sum of the tables of tokens, positions and, where there are any, token types."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs, *, types: int = 0, epsilon: float = 1e-12):
        self.word_embeddings = nnx.Embed(spec.vocabulary, spec.width, rngs=rngs)
        self.position_embeddings = nnx.Embed(spec.positions, spec.width, rngs=rngs)
        self.types = types
        if types:
            self.token_type_embeddings = nnx.Embed(types, spec.width, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(spec.width, epsilon=epsilon, rngs=rngs)

    def __call__(self, ids, positions):
        """Ids [P, T] and positions, [1, T] or [P, T], to [P, T, d]; all of the first type."""
        x = self.word_embeddings(ids)
        if self.types:
            x = x + self.token_type_embeddings(jnp.zeros_like(ids))
        return self.LayerNorm(x + self.position_embeddings(positions))


class Layer(nnx.Module):
    """One post-norm block of BERT."""

    def __init__(self, spec: ModelSpec, epsilon: float, rngs: nnx.Rngs):
        width, self.heads = spec.width, spec.heads

        def linear(inside, outside):
            return nnx.Linear(inside, outside, rngs=rngs)

        def added(inside):
            norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
            return nnx.Dict(dense=linear(inside, width), LayerNorm=norm)

        projections = {name: linear(width, width) for name in ("query", "key", "value")}
        self.attention = nnx.Dict({"self": nnx.Dict(projections), "output": added(width)})
        self.intermediate = nnx.Dict(dense=linear(width, spec.mlp))
        self.output = added(spec.mlp)

    def __call__(self, x, mask):
        """[P, T, d] to [P, T, d]."""
        one, out = self.attention["self"], self.attention["output"]
        seen = _attention(self.heads, one.query(x), one.key(x), one.value(x), mask)
        x = out.LayerNorm(out.dense(seen) + x)
        hidden = _gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(self.output.dense(hidden) + x)


class _Encoder(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs, *, types: int, epsilon: float):
        self.embeddings = Embeddings(spec, rngs, types=types, epsilon=epsilon)
        layers = nnx.List([Layer(spec, epsilon, rngs) for _ in range(spec.blocks)])
        self.encoder = nnx.Dict(layer=layers)

    def __call__(self, ids, positions, mask):
        x = self.embeddings(ids, positions)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x[:, 0]


class Bert(nnx.Module):
    """BERT with its pooler."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.bert = _Encoder(spec, rngs, types=2, epsilon=1e-12)
        self.bert.pooler = nnx.Dict(dense=nnx.Linear(spec.width, spec.width, rngs=rngs))
        self.classifier = nnx.Linear(spec.width, spec.num_classes, rngs=rngs)

    def __call__(self, input_ids, attention_mask=None):
        """[P, T] to logits [P, classes]."""
        first = self.bert(input_ids, jnp.arange(input_ids.shape[1])[None], attention_mask)
        return self.classifier(jnp.tanh(self.bert.pooler.dense(first)))


class Roberta(nnx.Module):
    """RoBERTa (arXiv:1907.11692): positions count from the padding's id on, past the padding."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.pad = spec.pad
        self.roberta = _Encoder(spec, rngs, types=1, epsilon=1e-5)
        self.classifier = nnx.Dict(
            dense=nnx.Linear(spec.width, spec.width, rngs=rngs),
            out_proj=nnx.Linear(spec.width, spec.num_classes, rngs=rngs),
        )

    def __call__(self, input_ids, attention_mask=None):
        """[P, T] to logits [P, classes]."""
        real = (input_ids != self.pad).astype(input_ids.dtype)
        positions = jnp.cumsum(real, axis=1) * real + self.pad
        first = self.roberta(input_ids, positions, attention_mask)
        return self.classifier.out_proj(jnp.tanh(self.classifier.dense(first)))


class Block(nnx.Module):
    """One post-norm block of DistilBERT."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        width, self.heads = spec.width, spec.heads
        names = ("q_lin", "k_lin", "v_lin", "out_lin")
        self.attention = nnx.Dict({name: nnx.Linear(width, width, rngs=rngs) for name in names})
        self.sa_layer_norm = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.ffn = nnx.Dict(
            lin1=nnx.Linear(width, spec.mlp, rngs=rngs), lin2=nnx.Linear(spec.mlp, width, rngs=rngs)
        )
        self.output_layer_norm = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)

    def __call__(self, x, mask):
        """[P, T, d] to [P, T, d]."""
        own = self.attention
        seen = _attention(self.heads, own.q_lin(x), own.k_lin(x), own.v_lin(x), mask)
        x = self.sa_layer_norm(own.out_lin(seen) + x)
        return self.output_layer_norm(self.ffn.lin2(_gelu(self.ffn.lin1(x))) + x)


class DistilBert(nnx.Module):
    """DistilBERT (arXiv:1910.01108)."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        layers = nnx.List([Block(spec, rngs) for _ in range(spec.blocks)])
        self.distilbert = nnx.Dict(
            embeddings=Embeddings(spec, rngs), transformer=nnx.Dict(layer=layers)
        )
        self.pre_classifier = nnx.Linear(spec.width, spec.width, rngs=rngs)
        self.classifier = nnx.Linear(spec.width, spec.num_classes, rngs=rngs)

    def __call__(self, input_ids, attention_mask=None):
        """[P, T] to logits [P, classes]."""
        x = self.distilbert.embeddings(input_ids, jnp.arange(input_ids.shape[1])[None])
        for block in self.distilbert.transformer.layer:
            x = block(x, attention_mask)
        return self.classifier(jax.nn.relu(self.pre_classifier(x[:, 0])))
