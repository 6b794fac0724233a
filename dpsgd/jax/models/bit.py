"""
Hugging Face's BiT (arXiv:1912.11370): a pre-activation ResNet v2 with GroupNorm.

Every convolution standardises its kernel; padding is symmetric, and zeros before the max pool.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd.jax.layers.standardized import Standardized
from dpsgd.models import ModelSpec


def _conv(inside: int, outside: int, kernel: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inside,
        outside,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=False,
        conv_general_dilated=Standardized(epsilon=1e-8),
        rngs=rngs,
    )


def _norm(spec: ModelSpec, width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, num_groups=spec.groups, epsilon=1e-5, rngs=rngs)


class Bottleneck(nnx.Module):
    """One block; the first of a stage has a convolution on its shortcut."""

    def __init__(
        self, spec: ModelSpec, inside: int, outside: int, stride: int, first: bool, rngs: nnx.Rngs
    ):
        middle = outside // 4
        self.first = first
        if first:
            self.downsample = nnx.Dict(conv=_conv(inside, outside, 1, stride, rngs))
        self.norm1, self.conv1 = _norm(spec, inside, rngs), _conv(inside, middle, 1, 1, rngs)
        self.norm2, self.conv2 = _norm(spec, middle, rngs), _conv(middle, middle, 3, stride, rngs)
        self.norm3, self.conv3 = _norm(spec, middle, rngs), _conv(middle, outside, 1, 1, rngs)

    def __call__(self, x):
        """[P, H, W, C] to [P, H/stride, W/stride, C']."""
        active = jax.nn.relu(self.norm1(x))
        shortcut = self.downsample.conv(active) if self.first else x
        x = self.conv1(active)
        x = self.conv2(jax.nn.relu(self.norm2(x)))
        return self.conv3(jax.nn.relu(self.norm3(x))) + shortcut


class BiT(nnx.Module):
    """Stem, stages of blocks, GroupNorm, mean over the image, linear head."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        inside, stages = spec.width // 4, []
        embedder = nnx.Dict(convolution=_conv(spec.channels, inside, 7, 2, rngs))
        for number, depth in enumerate(spec.stages):
            outside, blocks = spec.width * 2**number, []
            for n in range(depth):
                stride = 2 if number and n == 0 else 1
                blocks.append(Bottleneck(spec, inside, outside, stride, n == 0, rngs))
                inside = outside
            stages.append(nnx.Dict(layers=nnx.List(blocks)))
        self.bit = nnx.Dict(
            embedder=embedder,
            encoder=nnx.Dict(stages=nnx.List(stages)),
            norm=_norm(spec, inside, rngs),
        )
        # The head's name in torch is classifier.1: a flattening layer comes before it.
        self.classifier = nnx.List([jnp.ravel, nnx.Linear(inside, spec.num_classes, rngs=rngs)])

    def __call__(self, x):
        """[P, H, W, C] to logits [P, classes]."""
        x = self.bit.embedder.convolution(x)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nnx.max_pool(x, (3, 3), (2, 2))
        for stage in self.bit.encoder.stages:
            for block in stage.layers:
                x = block(x)
        x = jax.nn.relu(self.bit.norm(x)).mean((1, 2))
        return self.classifier[1](x)
