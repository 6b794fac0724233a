"""
One rule per kind of layer: what its gradients by example are, their norm and weighted sum.

A rule is chosen by the exact type of the module, and by the method that is called: a subclass may
compute something else. All else (bare parameters, what no rule knows) is left to autodiff under
vmap, which is exact for whatever it is, and costs P gradients of it alone.
"""

from flax import nnx

from dpsgd.jax.layers.base import Rule
from dpsgd.jax.layers.conv import Conv
from dpsgd.jax.layers.embed import Attend, Lookup
from dpsgd.jax.layers.linear import Linear, LinearGeneral
from dpsgd.jax.layers.norm import Norm
from dpsgd.jax.layers.standardized import StandardizedConv

# By method; of several rules, the first that takes the module.
RULES: dict[type, dict[str, tuple[type[Rule], ...]]] = {
    nnx.Linear: {"__call__": (Linear,)},
    nnx.LinearGeneral: {"__call__": (LinearGeneral,)},
    nnx.Conv: {"__call__": (Conv, StandardizedConv)},
    **{kind: {"__call__": (Norm,)} for kind in (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm)},
    nnx.Embed: {"__call__": (Lookup,), "attend": (Attend,)},
}
