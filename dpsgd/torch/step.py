"""
What every torch method shares: checks, precision, one flat sum, noise once, the optimizer.

The sum of a logical batch lives in one flat buffer with a view per parameter, so that noise is one
in-place pass and clearing is one call.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from dpsgd.ranks import Ranks
from dpsgd.torch.distributed import Reducer, noise_share
from dpsgd.torch.noise import Noise

PRECISIONS = ("fp32", "tf32", "bf16")


def check_model(model: nn.Module) -> None:
    """
    Refuse what cannot be clipped per example.

    Raises:
        ValueError: a BatchNorm layer, named, or no trainable parameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}, which mixes examples, so no "
                "per-example gradient exists: replace it by GroupNorm"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: set requires_grad on some")


def unique_graphs() -> int:
    """Graphs that torch.compile has built in this process (the one use of a private counter)."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def check_losses(losses: torch.Tensor, count: int) -> torch.Tensor:
    """
    ``losses``, one for each of ``count`` examples.

    Raises:
        ValueError: they are not [count]: broadcast against the mask, they would mix examples.
    """
    if losses.shape != (count,):
        raise ValueError(
            f"the loss of {count} examples has shape {list(losses.shape)}; return one loss per "
            f"example, [{count}], and neither their mean nor their sum"
        )
    return losses


def fill_rows(mask: torch.Tensor, tree: Any) -> Any:
    """
    The first unmasked row in place of every masked one, by select, in every tensor of ``tree``.

    A row of zeros may give NaN where no real one does (attention to no token, an image divided by
    its deviation), and 0 · NaN would spread. If all are masked, they are zeros nevertheless.
    """
    first, some = mask.int().argmax(), mask.any()

    def filled(t):
        row = t.index_select(0, first[None])
        row = torch.where(some, row, torch.zeros_like(row))
        return torch.where(mask.view(-1, *[1] * (t.ndim - 1)), t, row)

    return tree_map(filled, tree)


class TorchStep:
    """
    Base of the torch steps; a method adds its sums to ``self.views`` in ``accumulate``.

    Args, beyond those that README shows:
        ranks: this process among those of the default process group; None is alone.
        noise_placement: ``split`` over the ranks, or all on ``rank0``.
        sync: ``once`` per logical batch; SGD also at ``every`` physical batch.

    Attributes:
        done: updates so far; the noise of an update depends on its number.

    Raises:
        ValueError: BatchNorm, no trainable parameter, dtypes that are mixed or of 16 bits, or an
            unknown option; in ``accumulate``, a loss that is not [P].
    """

    private = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        privacy: Any,
        *,
        loss: Callable[..., torch.Tensor],
        physical_batch_size: int,
        precision: str = "fp32",
        compile: bool = False,
        memory_budget_bytes: int | None = None,
        seed: int | None = None,
        ranks: Ranks | None = None,
        noise_placement: str = "split",
        sync: str = "once",
    ) -> None:
        check_model(model)
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
        if physical_batch_size < 1:
            raise ValueError(f"physical_batch_size is {physical_batch_size}; it must be at least 1")
        self.model, self.optimizer, self.privacy, self.loss = model, optimizer, privacy, loss
        self.physical_batch_size, self.precision, self.compile = (
            physical_batch_size,
            precision,
            compile,
        )
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.params = [p for _, p in named]
        if len({(p.dtype, p.device) for p in self.params}) > 1:
            raise ValueError("trainable parameters must share one dtype and one device")
        first = self.params[0]
        if first.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"trainable parameters are {first.dtype}, in which a sum of many clipped gradients "
                "and its noise are rounded away: train model.float(); precision='bf16' computes in "
                "bf16 all the same, and frozen parameters may stay as they are"
            )
        self.device = first.device
        sizes = [p.numel() for p in self.params]
        self._check_sync(sync)
        self.ranks, self.done = ranks or Ranks(), 0
        shapes = [(n, tuple(p.shape), p.dtype) for n, p in named]
        facts: tuple = (type(self).__name__, privacy, physical_batch_size, precision, shapes)
        facts += (type(optimizer).__name__, optimizer.defaults, noise_placement, sync)
        self.reduce = Reducer(self.ranks, sum(sizes), first, facts)
        self.flat = self.reduce.flat
        self.views = [
            v.view_as(p) for v, p in zip(self.flat.split(sizes), self.params, strict=True)
        ]
        self.noise = Noise(self.device, seed, self.ranks.rank)
        self.noise_share = noise_share(noise_placement, self.ranks) if self.private else 0.0
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"

    def compiled(self, function: Callable) -> Callable:
        """``function``, through torch.compile where asked for; a graph break is an error."""
        if not self.compile:
            return function
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs
        return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast where the precision asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def losses(self, inputs: Any, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[P]; those of masked rows are of another row, and are to be dropped by select."""
        with self.autocast():
            found = self.loss(self.model, *fill_rows(mask, (inputs, targets)))
        return check_losses(found, len(mask))

    def put(self, inputs: Any, targets: np.ndarray, mask: np.ndarray) -> tuple[Any, Any, Any]:
        """NumPy arrays to tensors on the model's device."""
        return tree_map(lambda a: torch.as_tensor(a).to(self.device), (inputs, targets, mask))

    def accumulate(self, inputs: Any, targets: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the clipped gradients of the unmasked examples."""
        self.ranks.progress()
        self._accumulate(inputs, targets, mask)

    def _accumulate(self, inputs, targets, mask) -> None:
        raise NotImplementedError

    def declare(self, **facts: int) -> None:
        """Digests (``draw``) that must be the same on all ranks at the next ``update``."""
        self.reduce.agreement.declare(**facts)

    @torch.no_grad()
    def update(self) -> None:
        """Noise once, divide by L, sum over the ranks, the optimizer, clear."""
        self.done += 1
        std = self.noise_share * self.privacy.noise_multiplier * self.privacy.clip_norm
        if std > 0:
            self.noise.add(self.flat, std, self.privacy.expected_batch_size, self.done)
        else:
            self.flat.div_(self.privacy.expected_batch_size)
        self._reduce()
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view
        self.optimizer.step()
        self.flat.zero_()

    def _reduce(self) -> None:
        self.reduce(self.done, self.params)

    def _check_sync(self, sync: str) -> None:
        if sync != "once":
            raise ValueError(f"sync is {sync!r}; a private method sums 'once' per logical batch")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clipped_sum(self, inputs: Any, targets: Any, mask: Any) -> dict[str, np.ndarray]:
        """Clipped sum of one physical batch, {name: array}; the running sum is left as it was."""
        saved = self.flat.clone()
        self.flat.zero_()
        self.accumulate(inputs, targets, mask)
        result = self._numpy(self.views)
        self.flat.copy_(saved)
        return result

    def state(self) -> dict[str, np.ndarray]:
        """Model and optimizer, by name; nothing secret."""
        found = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    found[f"optimizer/{number}/{name}"] = value
        return {name: torch.as_tensor(value).cpu().numpy() for name, value in found.items()}

    def restore(self, state: Mapping[str, np.ndarray], done: int) -> None:
        """Come back to ``state`` after ``done`` updates; the noise goes on from there."""
        model: dict[str, torch.Tensor] = {}
        optimizer: dict[int, dict[str, torch.Tensor]] = {}
        for path, array in state.items():
            kind, name = path.split("/", 1)
            if kind == "model":
                model[name] = torch.from_numpy(array)
            else:
                number, name = name.split("/")
                optimizer.setdefault(int(number), {})[name] = torch.from_numpy(array)
        self.model.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        self.done = done

    def parameters(self) -> dict[str, np.ndarray]:
        """Trainable parameters now, {name: array}."""
        return self._numpy(self.params)

    def compiles(self) -> int:
        """Graphs built so far; 0 in eager mode."""
        return unique_graphs() if self.compile else 0

    def _numpy(self, tensors: list) -> dict[str, np.ndarray]:
        return {
            n: t.detach().cpu().numpy().copy() for n, t in zip(self.names, tensors, strict=True)
        }
