"""Any other layer: its own forward, differentiated for one example at a time by vmap."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from dpsgd.torch.layers.base import Rule, Seen, fold


class Other(Rule):
    """Correct for every layer that torch.func can differentiate, for that layer alone."""

    note = " (no rule: one by one)"
    more: tuple[Any, ...] = ()  # what the module got after x: the same for all examples
    named: dict[str, Any] = {}  # noqa: RUF012
    busy = False

    def gradients(self, seen: Seen) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        params = {name: getattr(self.module, name).detach() for name in self.trained}

        def one(x, g):
            def forward(params):
                return functional_call(self.module, params, (x, *self.more), self.named)

            with torch.enable_grad():
                return vjp(forward, params)[1](g)[0]

        x, g = (fold(t, seen.examples) for t in (seen.x, seen.g))
        self.busy = True  # this call of the module is not one of the model's
        try:
            found = vmap(one, randomness="different")(x, g)
        except RuntimeError as error:
            error.add_note(
                f"in layer {self.name!r}, for which there is no rule: torch.func differentiates "
                "its forward for one example at a time; freeze it, or use another method"
            )
            raise
        finally:
            self.busy = False
        return [found[name] for name in self.trained]
