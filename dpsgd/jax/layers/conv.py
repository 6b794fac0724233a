"""Convolutions as products: the input is unfolded into one row of patches per position."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd.jax.layers.base import Rule, default


class Conv(Rule):
    """``nnx.Conv`` in any number of dimensions: stride, groups, dilation, every padding."""

    def __init__(self, module: nnx.Conv, trained: list[str]) -> None:
        super().__init__(module, trained)
        self.kernel = tuple(module.kernel_size)
        self.groups = module.feature_group_count
        self.strides = self._each(module.strides)
        self.dilation = self._each(module.kernel_dilation)
        self.padding = module.padding

    def _each(self, value) -> tuple[int, ...]:
        value = 1 if value is None else value
        return (value,) * len(self.kernel) if isinstance(value, int) else tuple(value)

    @classmethod
    def takes(cls, module: nnx.Conv) -> bool:
        """With XLA's own convolution."""
        return module.conv_general_dilated is jax.lax.conv_general_dilated and cls.plain(module)

    @staticmethod
    def plain(module: nnx.Conv) -> bool:
        """Without masked weights, and without a dilated input."""
        dilated = module.input_dilation
        none = dilated in (None, 1) or (not isinstance(dilated, int) and set(dilated) == {1})
        return none and default(module, mask=None)

    @staticmethod
    def shape_of(module: nnx.Conv) -> tuple[int, ...]:
        """[*kernel, d/groups, p]."""
        return tuple(module.kernel_shape)

    def _padded(self, x: jax.Array) -> jax.Array:
        """As ``nnx.Conv`` does; [n, *space, d]."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        padding, mode = self.padding, "constant"
        if isinstance(padding, str):
            name = padding.upper()
            if name in ("CIRCULAR", "REFLECT"):
                mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[name]
                pads = [((s - 1) // 2, s // 2) for s in spans]
            elif name == "CAUSAL":
                pads = [(spans[0] - 1, 0)]
            else:
                pads = jax.lax.padtype_to_pads(x.shape[1:-1], spans, self.strides, name)
        elif isinstance(padding, int):
            pads = [(padding, padding)] * len(spans)
        else:
            pads = [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding]
        return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode=mode) if any(map(any, pads)) else x

    def _patches(self, x: jax.Array, space: tuple[int, ...]) -> jax.Array:
        """[T, K, d]: the K inputs of each output position, in the kernel's order."""
        x = self._padded(x)
        count, depth = math.prod(self.kernel), x.shape[-1]
        if self.kernel == self.strides and set(self.dilation) == {1}:  # patches do not overlap
            used = tuple(slice(s * k) for s, k in zip(space, self.kernel, strict=True))
            x = x[:, *used]
            cut = [n for s, k in zip(space, self.kernel, strict=True) for n in (s, k)]
            x = x.reshape(len(x), *cut, depth)
            dims = len(space)
            order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
            return x.transpose(order).reshape(-1, count, depth)
        parts = []
        for offsets in itertools.product(*map(range, self.kernel)):
            window = tuple(
                slice(o * d, o * d + (s - 1) * step + 1, step)
                for o, d, s, step in zip(offsets, self.dilation, space, self.strides, strict=True)
            )
            parts.append(x[:, *window].reshape(-1, depth))
        return jnp.stack(parts, 1)

    def matrices(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(X [groups, T, K·d/groups], G [groups, T, p/groups])."""
        dims = len(self.kernel)
        space = g.shape[-dims - 1 : -1]
        patches = self._patches(x.reshape(-1, *x.shape[-dims - 1 :]).astype(g.dtype), space)
        rows, count, depth = patches.shape
        inputs = patches.reshape(rows, count, self.groups, -1).transpose(2, 0, 1, 3)
        outputs = g.reshape(rows, self.groups, -1).transpose(1, 0, 2)
        return inputs.reshape(self.groups, rows, count * depth // self.groups), outputs

    def shaped(self, product: jax.Array) -> jax.Array:
        """[groups, K·d/groups, p/groups] as the kernel."""
        return product.transpose(1, 0, 2).reshape(self.shape)
