"""ViT (arXiv:2010.11929), as Hugging Face transformers has it."""

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd.models import ModelSpec


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
