"""
One rule per kind of layer: its per-example gradients, their norms, and their weighted sum.

A rule is chosen by the exact type of the module: a subclass may compute something else. What no
rule knows gets :class:`~dpsgd.torch.layers.other.Other`, correct and slower, for that layer alone.
"""

from torch import nn

from dpsgd.torch.layers.base import Rule
from dpsgd.torch.layers.conv import Conv
from dpsgd.torch.layers.embedding import Embedding
from dpsgd.torch.layers.linear import Linear, TransposedLinear
from dpsgd.torch.layers.norm import (
    ActivatedGroupNorm,
    EitherLayerNorm,
    GroupNorm,
    LayerNorm,
    LlamaRMSNorm,
    RMSNorm,
)
from dpsgd.torch.layers.other import Other
from dpsgd.torch.layers.standardized import StandardizedConv

# By type, or by qualified name where the type lives in a library that need not be there.
RULES: dict[type | str, type[Rule]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.LayerNorm: LayerNorm,
    nn.GroupNorm: GroupNorm,
    nn.RMSNorm: RMSNorm,
    nn.Embedding: Embedding,
    "transformers.pytorch_utils.Conv1D": TransposedLinear,
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d": StandardizedConv,
    "transformers.models.bit.modeling_bit.BitGroupNormActivation": ActivatedGroupNorm,
    "transformers.models.convnext.modeling_convnext.ConvNextLayerNorm": EitherLayerNorm,
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": LlamaRMSNorm,
}


def rule_for(name: str, module: nn.Module, trained: list[str]) -> Rule:
    """The rule of ``module``, whose own parameters ``trained`` (``weight``, ``bias`` …) train."""
    kind = type(module)
    found = RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}") or Other
    return found(name, module, trained) if found.takes(module) else Other(name, module, trained)
