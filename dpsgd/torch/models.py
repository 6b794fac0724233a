"""The torch models, their loss, optimizers and predictions."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dpsgd.models import ModelSpec, initial_weights


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


def _vit(spec: ModelSpec) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=spec.width,
        num_hidden_layers=spec.blocks,
        num_attention_heads=spec.heads,
        intermediate_size=spec.mlp,
        image_size=spec.image_size,
        patch_size=spec.patch,
        num_channels=spec.channels,
        num_labels=spec.num_classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


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
    model = {"cnn": _cnn, "vit": _vit}[spec.family](spec)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    values = initial_weights(shapes, seed=seed, checkpoint=weights)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(values[name]))
    return model.train().to(device)


def cross_entropy(model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-example cross-entropy, [P]; ``inputs`` [P, ...], ``targets`` int64 [P]."""
    output = model(inputs)
    return functional.cross_entropy(getattr(output, "logits", output), targets, reduction="none")


def optimizer(model: nn.Module, name: str, learning_rate: float) -> torch.optim.Optimizer:
    """``adam`` or ``sgd`` over the trainable parameters."""
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    if name not in kinds:
        raise ValueError(f"unknown optimizer {name!r}; use one of {', '.join(kinds)}")
    return kinds[name]([p for p in model.parameters() if p.requires_grad], lr=learning_rate)


@torch.no_grad()
def predict(step, inputs: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Predicted classes, int64 [n], of NumPy ``inputs`` [n, ...] by the model in ``step``."""
    device = next(step.model.parameters()).device
    step.model.eval()
    chunks = []
    for start in range(0, len(inputs), batch_size):
        output = step.model(torch.from_numpy(inputs[start : start + batch_size]).to(device))
        chunks.append(getattr(output, "logits", output).argmax(-1).cpu().numpy())
    step.model.train()
    return np.concatenate(chunks)
