"""Efficient, correct DP-SGD in PyTorch and JAX. Importing this imports neither framework."""

from dpsgd import models
from dpsgd.memory import keep_freed_memory, return_freed_memory
from dpsgd.methods import METHODS, Method, Step
from dpsgd.privacy import PrivacyConfig
from dpsgd.sampling import LogicalBatch, PhysicalBatch, poisson_batches

__all__ = [
    "METHODS",
    "LogicalBatch",
    "Method",
    "PhysicalBatch",
    "PrivacyConfig",
    "Step",
    "keep_freed_memory",
    "models",
    "poisson_batches",
    "return_freed_memory",
]
__version__ = "0.1.0"
