"""What the Triton kernels share."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor


def configs(names: Sequence[str], *rows: Sequence[int]) -> list[triton.Config]:
    """One for each row: the sizes that ``names`` names, then warps and stages."""
    return [
        triton.Config(dict(zip(names, sizes, strict=True)), num_warps=warps, num_stages=stages)
        for *sizes, warps, stages in rows
    ]


def exact(t: Tensor) -> bool:
    """Whether products of ``t`` are float32's own, which no tensor core has."""
    return t.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def unfit(*tensors: Tensor) -> bool:
    """Whether the device lacks bfloat16 and TF32, or a tile spans more than 32 bits can count."""
    first = tensors[0]
    if first.is_cuda and torch.cuda.get_device_capability(first.device) < (8, 0):
        return True
    return any(stride >= 1 << 24 for t in tensors for stride in t.stride()[1:])  # tiles of 128


def smallest(configs: Sequence[triton.Config], name: str) -> int:
    """The smallest ``name`` that tuning may choose."""
    return min(config.kwargs[name] for config in configs)
