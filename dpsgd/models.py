"""
The model table, framework-free: name → family, sizes, input shape; and seeded initial weights.

A name may carry overrides, in any order, so that a case id always says what was changed:
``vit-ti16-64px`` (image side), ``vit-b16-4blocks`` (depth), ``distilbert-64tok`` (sequence length),
``distilbert-frozenemb`` (the embedding tables are not trained).
"""

import dataclasses
import difflib
import math
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """
    One model; its ``family`` selects the builder.

    ``image_size`` in pixels; ``width`` is the hidden size (of the first stage, in BiT); ``blocks``
    the depth, ``stages`` that of each stage. Text: ``vocabulary`` > 0, ``sequence_length`` tokens,
    ``positions`` in the position table, ``pad`` the id of the padding.
    """

    name: str
    family: str
    channels: int = 3
    image_size: int = 224
    num_classes: int = 100
    patch: int = 16
    width: int = 0
    blocks: int = 0
    stages: tuple[int, ...] = ()
    groups: int = 32
    heads: int = 0
    mlp: int = 0
    vocabulary: int = 0
    sequence_length: int = 0
    positions: int = 0
    pad: int = 0
    frozen_embeddings: bool = False

    @property
    def is_text(self) -> bool:
        """Its inputs are ``input_ids`` and ``attention_mask``."""
        return self.vocabulary > 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width), or (tokens,)."""
        if self.is_text:
            return (self.sequence_length,)
        return (self.channels, self.image_size, self.image_size)

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""
        return not (self.frozen_embeddings and _EMBEDDINGS & {*parameter.split(".")})

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


def _bit(name: str, stages: tuple[int, ...], factor: int = 1, **more) -> ModelSpec:
    return ModelSpec(name=name, family="bit", stages=stages, **{"width": 256 * factor, **more})


def _text(name: str, family: str, **more) -> ModelSpec:
    base = {"width": 768, "blocks": 12, "heads": 12, "sequence_length": 128, "num_classes": 2}
    spec = ModelSpec(name=name, family=family, **{**base, **_TABLES[family], **more})
    return spec.replace(mlp=4 * spec.width)


# The modules that hold the tables of tokens and positions.
_EMBEDDINGS = {"embeddings", "wte", "wpe"}
_TABLES: dict[str, dict[str, Any]] = {
    "bert": {"vocabulary": 30522, "positions": 512},
    "distilbert": {"vocabulary": 30522, "positions": 512},
    "roberta": {"vocabulary": 50265, "positions": 514, "pad": 1},
    "gpt2": {"vocabulary": 50257, "positions": 1024, "pad": 50256},  # it has no padding of its own
}
_SMALL: dict[str, Any] = {
    **{"width": 16, "blocks": 2, "heads": 2, "num_classes": 3},
    **{"vocabulary": 40, "positions": 16, "sequence_length": 8},
}

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
        _bit("bit-test", (1, 2), width=32, groups=4, image_size=32, num_classes=10),
        _bit("bit-r50x1", (3, 4, 6, 3)),
        _bit("bit-r101x1", (3, 4, 23, 3)),
        _bit("bit-r50x3", (3, 4, 6, 3), 3),
        _bit("bit-r101x3", (3, 4, 23, 3), 3),
        _bit("bit-r152x4", (3, 8, 36, 3), 4),
        _text("bert-test", "bert", **_SMALL),
        _text("bert-base", "bert"),
        _text("distilbert-test", "distilbert", **_SMALL),
        _text("distilbert", "distilbert", blocks=6),
        _text("roberta-test", "roberta", **_SMALL),
        _text("roberta-base", "roberta"),
        _text("gpt2-test", "gpt2", **_SMALL | {"pad": 39}),
        _text("gpt2", "gpt2"),
    )
}


def get(name: str) -> ModelSpec:
    """
    The model called ``name``, with its overrides applied and kept in its name.

    Raises:
        KeyError: unknown; the message gives the nearest names.
        ValueError: an override does not fit the model.
    """
    base, overrides, wanted = name, {}, []
    while match := re.fullmatch(r"(.+)-(?:(\d+)(px|blocks|tok)|(frozenemb))", base):
        base, kind = match[1], match[3] or match[4]
        overrides[_FIELDS[kind]] = int(match[2]) if match[2] else True
        wanted.append(kind)
    if base not in MODELS:
        near = difflib.get_close_matches(base, MODELS, n=3, cutoff=0.3) or list(MODELS)
        raise KeyError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    spec = MODELS[base]
    allowed = _TEXT_OVERRIDES if spec.is_text else _IMAGE_OVERRIDES.get(spec.family, ())
    if refused := [kind for kind in wanted if kind not in allowed]:
        raise ValueError(
            f"{name}: {base} takes {', '.join(allowed) if allowed else 'no override'}, "
            f"not {', '.join(refused)}"
        )
    size = overrides.get("image_size", spec.image_size)
    if spec.family == "vit" and size % spec.patch:
        raise ValueError(f"{name}: the image side {size} is no multiple of the patch {spec.patch}")
    spec = spec.replace(name=name, **overrides)
    longest = spec.positions - (spec.pad + 1 if spec.family == "roberta" else 0)
    if spec.is_text and not 2 <= spec.sequence_length <= longest:
        raise ValueError(f"{name}: {base} takes 2 to {longest} tokens")
    return spec


_FIELDS = {
    "px": "image_size",
    "blocks": "blocks",
    "tok": "sequence_length",
    "frozenemb": "frozen_embeddings",
}
_IMAGE_OVERRIDES = {"vit": ("px", "blocks"), "bit": ("px",)}
_TEXT_OVERRIDES = ("tok", "blocks", "frozenemb")


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
    # BiT's convolutions N(0, 2/fan_out), everything else a truncated N(0, 0.02²).
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bias":
        return np.zeros(shape, np.float32)
    if leaf == "weight" and len(shape) == 1:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.startswith(("conv", "linear")):
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    if name.startswith("bit.") and len(shape) == 4:
        fan_out = shape[0] * math.prod(shape[2:])
        return np.float32(math.sqrt(2 / fan_out)) * rng.standard_normal(shape, np.float32)
    return np.float32(0.02) * np.clip(rng.standard_normal(shape, np.float32), -2, 2)


# New for each task, so that a checkpoint may lack them.
_HEADS = ("classifier.", "linear.", "pre_classifier.", "score.")
_OLD_NORMS = ((".gamma", ".weight"), (".beta", ".bias"))  # TensorFlow's
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
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; give the checkpoint's folder")
    found: dict[str, np.ndarray] = {}
    for file in files:
        try:
            loaded = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        for name, value in loaded.items():
            for renames in ((), _OLD_NORMS, _OLD_NAMES):
                for old, new in renames:
                    name = name.replace(old, new)
                found.setdefault(name, value)
    chosen, kept = {}, []
    for name, shape in shapes.items():
        given = found.get(name, found.get(name.partition(".")[2]))  # a bare backbone
        if given is not None and given.shape == tuple(shape):
            chosen[name] = given.astype(np.float32)
        elif name.startswith(_HEADS):
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
