"""The torch models, their loss, optimizers and predictions."""

import importlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dpsgd.models import ModelSpec, initial_weights
from dpsgd.tree import length, take, tree_map


def _cnn(spec: ModelSpec) -> nn.Module:
    side = spec.image_size // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(spec.channels, 16, 3, padding=1),
            norm1=nn.GroupNorm(4, 16),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            norm2=nn.GroupNorm(4, 32),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            linear=nn.Linear(32 * side * side, spec.num_classes),
        )
    )


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.blocks,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.mlp,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _tables(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.positions,
        "pad_token_id": spec.pad,
    }


def _vit(spec: ModelSpec) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **_sizes(spec),
        image_size=spec.image_size,
        patch_size=spec.patch,
        num_channels=spec.channels,
        num_labels=spec.num_classes,
    )
    return ViTForImageClassification(config)


def _bit(spec: ModelSpec) -> nn.Module:
    from transformers import BitConfig, BitForImageClassification

    config = BitConfig(
        num_channels=spec.channels,
        embedding_size=spec.width // 4,
        hidden_sizes=[spec.width * 2**n for n in range(len(spec.stages))],
        depths=list(spec.stages),
        layer_type="preactivation",
        num_groups=spec.groups,
        num_labels=spec.num_classes,
    )
    return BitForImageClassification(config)


def _bert(spec: ModelSpec) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_sizes(spec), **_tables(spec), num_labels=spec.num_classes)
    return BertForSequenceClassification(config)


def _roberta(spec: ModelSpec) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    more: dict[str, Any] = {
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }  # those of the published model
    config = RobertaConfig(**_sizes(spec), **_tables(spec), **more, num_labels=spec.num_classes)
    return RobertaForSequenceClassification(config)


def _distilbert(spec: ModelSpec) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        **_tables(spec),
        dim=spec.width,
        n_layers=spec.blocks,
        n_heads=spec.heads,
        hidden_dim=spec.mlp,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=spec.num_classes,
    )
    return DistilBertForSequenceClassification(config)


def _gpt2(spec: ModelSpec) -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=spec.vocabulary,
        n_positions=spec.positions,
        n_embd=spec.width,
        n_layer=spec.blocks,
        n_head=spec.heads,
        n_inner=spec.mlp,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        pad_token_id=spec.pad,
        bos_token_id=spec.pad,
        eos_token_id=spec.pad,
        num_labels=spec.num_classes,
    )
    return GPT2ForSequenceClassification(config)


_BUILDERS: dict[str, Callable[[ModelSpec], nn.Module]] = {
    "cnn": _cnn,
    "vit": _vit,
    "bit": _bit,
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "gpt2": _gpt2,
}


def preload(spec: ModelSpec) -> None:
    """Import what :func:`build` needs, which takes seconds, and build nothing."""
    if spec.family != "cnn":
        importlib.import_module(f"transformers.models.{spec.family}.modeling_{spec.family}")


def skeleton(spec: ModelSpec) -> nn.Module:
    """The model of ``spec`` with values of no meaning."""
    return _BUILDERS[spec.family](spec)


def build(
    spec: ModelSpec, *, seed: int = 0, weights: str | Path | None = None, device: str = "cpu"
) -> nn.Module:
    """
    The model of ``spec`` in training mode.

    Args:
        spec: a row of :data:`dpsgd.models.MODELS`.
        seed: of the initial weights; the JAX twin gets the same ones.
        weights: a local folder with ``*.safetensors`` in Hugging Face's names.
        device: where to put it.

    Raises:
        ValueError: the checkpoint does not fit the model; the message names the parameter.
    """
    model = skeleton(spec)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    values = initial_weights(shapes, seed=seed, checkpoint=weights)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(values[name]))
            p.requires_grad_(spec.trains(name))
    return model.train().to(device)


def logits(model, inputs: Any) -> torch.Tensor:
    """[P, classes] of ``inputs``, a tensor [P, ...] or a dict of them."""
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(output, "logits", output)


def cross_entropy(model, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Per-example cross-entropy, [P]; ``inputs`` as in :func:`logits`, ``targets`` int64 [P]."""
    return functional.cross_entropy(logits(model, inputs), targets, reduction="none")


def optimizer(model: nn.Module, name: str, learning_rate: float) -> torch.optim.Optimizer:
    """``adam`` or ``sgd`` over the trainable parameters."""
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    if name not in kinds:
        raise ValueError(f"unknown optimizer {name!r}; use one of {', '.join(kinds)}")
    trained = [p for p in model.parameters() if p.requires_grad]
    return kinds[name](trained, lr=learning_rate, fused=True)


@torch.no_grad()
def predict(step, inputs: Any, batch_size: int = 256) -> np.ndarray:
    """Predicted classes, int64 [n], of NumPy ``inputs`` (n rows) by the model in ``step``."""
    device = next(step.model.parameters()).device
    step.model.eval()
    chunks = []
    for start in range(0, length(inputs), batch_size):
        chunk = take(inputs, slice(start, start + batch_size))
        placed = tree_map(lambda array: torch.from_numpy(array).to(device), chunk)
        chunks.append(logits(step.model, placed).argmax(-1).cpu().numpy())
    step.model.train()
    return np.concatenate(chunks)
