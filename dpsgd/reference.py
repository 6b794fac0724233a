"""
The oracle: one DP-SGD update in NumPy float64, given one example's gradient at a time.

    g = (1/L) · ( Σ_{i∈B} g_i · min(1, C/‖g_i‖₂) + N(0, σ²C² I) )

‖g_i‖ is over all parameters together (flat clipping). ‖g_i‖ = 0 has factor 1. An example whose
squared norm is not finite in float32 contributes 0, and so does a masked one, whatever it holds.

Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, with a Poisson-drawn B and a constant L.
"""

from collections.abc import Iterable, Mapping

import numpy as np

Gradient = Mapping[str, np.ndarray]


def norm(gradient: Gradient) -> float:
    """L2 norm over all parameters of one example's ``gradient``, {name: array}."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(
            np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values()))
        )


def clip_factor(length: float, clip_norm: float) -> float:
    """min(1, C/‖g‖); 1 at ‖g‖ = 0; 0 where ‖g‖² is not finite in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(np.float32(np.square(length))):
            return 0.0
    return 1.0 if length <= clip_norm else clip_norm / length


def clipped_sum(
    gradients: Iterable[Gradient], mask: Iterable[bool], clip_norm: float
) -> dict[str, np.ndarray]:
    """Σ g_i · min(1, C/‖g_i‖) over unmasked examples, float64, the shapes of one gradient."""
    total: dict[str, np.ndarray] = {}
    for gradient, real in zip(gradients, mask, strict=True):
        factor = clip_factor(norm(gradient), clip_norm) if real else 0.0
        for name, g in gradient.items():
            total.setdefault(name, np.zeros(g.shape))
            if factor:
                total[name] += factor * np.asarray(g, np.float64)
    return total


def update_direction(
    total: Gradient,
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """(total + N(0, σ²C²)) / L: what the optimizer is given, once per logical batch."""
    std = noise_multiplier * clip_norm
    return {
        name: (g + std * rng.standard_normal(g.shape)) / expected_batch_size
        for name, g in total.items()
    }
