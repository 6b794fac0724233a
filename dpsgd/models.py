"""
The model table, framework-free: name → family, sizes, input shape; and seeded initial weights.

A name may carry overrides: ``vit-ti16-64px`` (image side), ``vit-b16-4blocks`` (depth), in either
order, so that a case id always says what was cut.
"""

import dataclasses
import difflib
import math
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model. ``image_size`` in pixels; ``width`` is the hidden size; ``blocks`` the depth."""

    name: str
    family: str
    channels: int = 3
    image_size: int = 224
    num_classes: int = 100
    patch: int = 16
    width: int = 0
    blocks: int = 0
    heads: int = 0
    mlp: int = 0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, self.image_size, self.image_size)

    def replace(self, **changes) -> "ModelSpec":
        """A copy with fields changed."""
        return dataclasses.replace(self, **changes)


def _vit(name: str, width: int, blocks: int, heads: int, patch: int = 16, **more) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="vit",
        width=width,
        blocks=blocks,
        heads=heads,
        mlp=4 * width,
        patch=patch,
        **more,
    )


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(name="digits-cnn", family="cnn", channels=1, image_size=8, num_classes=10),
        _vit("vit-test", 16, 2, 2, patch=4, image_size=8, num_classes=10),
        _vit("vit-ti16", 192, 12, 3),
        _vit("vit-s16", 384, 12, 6),
        _vit("vit-b16", 768, 12, 12),
        _vit("vit-l16", 1024, 24, 16),
        _vit("vit-h14", 1280, 32, 16, patch=14),
    )
}


def get(name: str) -> ModelSpec:
    """
    The model called ``name``, with its overrides applied and kept in its name.

    Raises:
        KeyError: unknown; the message gives the nearest names.
        ValueError: an override does not fit the model.
    """
    base, overrides = name, {}
    while match := re.fullmatch(r"(.+)-(\d+)(px|blocks)", base):
        base = match[1]
        overrides["image_size" if match[3] == "px" else "blocks"] = int(match[2])
    if base not in MODELS:
        near = difflib.get_close_matches(base, MODELS, n=3, cutoff=0.3) or list(MODELS)
        raise KeyError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    spec = MODELS[base]
    if overrides and spec.family != "vit":
        raise ValueError(f"{base} takes no override; {name!r} asks for {overrides}")
    size = overrides.get("image_size", spec.image_size)
    if spec.family == "vit" and size % spec.patch:
        raise ValueError(f"{name}: the image side {size} is no multiple of the patch {spec.patch}")
    return spec.replace(name=name, **overrides)


def initial_weights(
    shapes: dict[str, tuple[int, ...]], *, seed: int, checkpoint: str | Path | None = None
) -> dict[str, np.ndarray]:
    """
    Float32 start values of a whole model, {torch parameter name: array}, from a seed or a folder.

    Args:
        shapes: {torch parameter name: torch shape}.
        seed: of the values that no checkpoint gives.
        checkpoint: a folder with ``*.safetensors`` in Hugging Face's names, of any age.

    Raises:
        ValueError: the folder does not fit; the message names the parameter.
    """
    values = {name: _initial(name, shape, seed) for name, shape in shapes.items()}
    return values if checkpoint is None else values | _checkpoint(checkpoint, shapes)


def _initial(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # 1-D weights (norm scales) 1, biases 0, the CNN's layers uniform ±1/√fan_in (torch's default),
    # everything else a truncated N(0, 0.02²) (ViT's).
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bias":
        return np.zeros(shape, np.float32)
    if leaf == "weight" and len(shape) == 1:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.startswith(("conv", "linear")):
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    return np.float32(0.02) * np.clip(rng.standard_normal(shape, np.float32), -2, 2)


# Hugging Face's ViT names before transformers 5, which most published checkpoints still carry.
_OLD_NAMES = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def _checkpoint(folder: str | Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; give the checkpoint's folder")
    found = {}
    for file in files:
        for name, value in load_file(file).items():
            for old, new in _OLD_NAMES:
                name = name.replace(old, new)
            found[name] = value
    chosen, kept = {}, []
    for name, shape in shapes.items():
        given = found.get(name, found.get(name.removeprefix("vit.")))  # a bare backbone
        if given is not None and given.shape == tuple(shape):
            chosen[name] = given.astype(np.float32)
        elif name.startswith(("classifier.", "linear.")):
            kept.append(name)
        else:
            has = "has none" if given is None else f"has shape {given.shape}"
            raise ValueError(f"{folder}: {name} needs shape {tuple(shape)}; the checkpoint {has}")
    if kept:
        warnings.warn(
            f"{', '.join(kept)} keep their initial values: {folder} has none of their shape",
            stacklevel=4,
        )
    return chosen
