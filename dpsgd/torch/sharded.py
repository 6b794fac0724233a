"""
Book-keeping on a model whose parameters and optimizer state are sharded: FSDP2's ``fully_shard``.

Each block (a child of a ModuleList) is one unit and the rest another; a unit is gathered where it
is used. A rank sees the whole gradient of its own examples, so norms are local. Once per logical
batch the sums of each unit are reduce-scattered, and every rank adds N(0, σ²C²) to the coordinates
that it owns: each coordinate of the sum gets its noise once.

The optimizer has to be elementwise (SGD, Adam, AdamW): a rank gives it its own elements only.
Every rank gathers at each physical batch, so all need the same number of them:
``logical.share(rank, world, even=True)``. Memory per rank: a flat sum of all parameters, and 1/W of
parameters and optimizer state. The model is built whole, and with the same weights, on each rank.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpsgd.ranks import Ranks
from dpsgd.torch.distributed import fingerprint
from dpsgd.torch.layers.base import fold
from dpsgd.torch.methods.bookkeeping import Bookkeeping
from dpsgd.torch.record import Run


class Sharded(Bookkeeping):
    """
    Exact flat clipping with sharded parameters.

    Raises:
        ValueError: an option that does not go with shards.
    """

    def __init__(self, model, optimizer, privacy, *, ranks: Ranks, **options) -> None:
        super().__init__(model, optimizer, privacy, ranks=ranks, **options)
        if self.compile:
            raise ValueError("FSDP's hooks break the graph: run it eager")
        if options.get("noise_placement", "split") != "split":
            raise ValueError("each rank adds the noise of its own shard: noise_placement='split'")
        if optimizer.state:
            raise ValueError("give an optimizer that has not stepped: its state will be sharded")
        self.reduce.agreement.declare(parameters=fingerprint(self.params))
        self._units: list[list[int]] = []  # numbers of the parameters of each
        self._local: list[nn.Parameter] = []
        self._shard_of_sum = self.flat[:0]

    def _accumulate(self, inputs, targets, mask) -> None:
        # All ranks call it equally often.
        if len(mask) != self.physical_batch_size:
            raise ValueError(f"{len(mask)} rows: give padded batches of {self.physical_batch_size}")
        if not self._ready(inputs, targets, mask):  # the plan, and its check, on the whole model
            raise ValueError("the first batch has no example with a finite gradient to plan by")
        with self.ranks.waiting(self.done + 1):  # for others, wherever a unit is gathered
            self._shard()
            self.model.unshard()  # parameters that no layer owns are used before the forward pass
            with self._normed(inputs, targets, mask) as (run, losses, squares):
                finite = squares.isfinite()
                if not bool(finite.all()):  # no second run, as others would have to join in it
                    with torch.no_grad():
                        _silence(run, finite)
                    mask = mask & finite
                factors = self._factors(squares, mask, self.privacy.clip_norm)
                self._add(run, losses, factors, self.views)

    @torch.no_grad()
    def update(self) -> None:
        """Reduce-scatter, noise once on each shard, divide by L, the optimizer, clear."""
        self._shard()
        self.done += 1
        agreement = self.reduce.agreement
        agreement.declare(step=self.done)
        slots = torch.from_numpy(agreement.slots()).to(self.flat)
        with self.ranks.waiting(self.done):
            start = 0
            for number, unit in enumerate(self._units):
                last = number == len(self._units) - 1
                parts = [self._rows(n) for n in unit]
                parts += [slots.expand(self.ranks.world, -1)] if last else []
                given = torch.cat(parts, 1)
                own = self._shard_of_sum[start : start + given.shape[1]]
                dist.reduce_scatter_tensor(own, given.flatten())
                start += given.shape[1]
            tail = self._shard_of_sum[-len(slots) :].cpu()
        agreement.check(tail.numpy())
        agreement.declare(parameters=0)
        own = self._shard_of_sum[: -len(slots)]
        std = self.privacy.noise_multiplier * self.privacy.clip_norm
        if std > 0:
            self.noise.add(own, std, self.privacy.expected_batch_size, self.done)
        else:
            own.div_(self.privacy.expected_batch_size)
        self._step(own)
        self.flat.zero_()

    def state(self):
        """Not there yet."""
        raise ValueError("a sharded run cannot be resumed: leave the checkpoint out")

    def _numpy(self, tensors) -> dict:
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
        return super()._numpy(whole)

    def _shard(self) -> None:
        if self._units:
            return
        plain, model = dict(zip(self.params, self.names, strict=True)), self.model
        mesh = init_device_mesh(self.device.type, (self.ranks.world,))
        blocks = self._blocks()
        for _, block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False, recurse=False)
        sharded = dict(model.named_parameters())
        self.params = [sharded[name] for name in self.names]
        # Most fused optimizers know no DTensor; elementwise ones need none, but its own elements.
        self._local = [nn.Parameter(p.to_local().detach()) for p in self.params]
        local = dict(zip(self.names, self._local, strict=True))
        for group in self.optimizer.param_groups:
            group["params"] = [local[plain[p]] for p in group["params"]]
        self.recorder.params = {name: sharded[name] for name in self.recorder.params}
        for p in self.params:
            p.requires_grad_(False)  # nor do the gathered ones: their gradients are the taps' work
        prefixes = [*(name + "." for name, _ in blocks), ""]
        units: list[list[int]] = [[] for _ in prefixes]
        for number, name in enumerate(self.names):
            first = next(k for k, prefix in enumerate(prefixes) if name.startswith(prefix))
            units[first].append(number)
        self._units = [unit for unit in units if unit]
        numel = sum(self._width(n) for unit in self._units for n in unit)
        self._shard_of_sum = self.flat.new_empty(numel + len(self.reduce.agreement.slots()))

    def _blocks(self) -> list[tuple[str, nn.Module]]:
        bare = [module for _, module, _ in self.recorder.bare]
        found: list[tuple[str, nn.Module]] = []
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList):
                continue
            for own, block in module.named_children():
                inside = any(True for _ in block.parameters())
                alone = not any(m in bare for m in block.modules())
                nested = any(name.startswith(outer + ".") for outer, _ in found)
                if inside and alone and not nested:
                    found.append((f"{name}.{own}", block))
        return found

    def _width(self, number: int) -> int:
        # Elements of a rank's part of one parameter: rows of its first axis, padded.
        view = self.views[number]
        return math.ceil(len(view) / self.ranks.world) * view[0].numel()

    def _rows(self, number: int) -> Tensor:
        # [W, width]: what each rank owns of one parameter's sum.
        view, width = self.views[number], self._width(number)
        padded = view.new_zeros(self.ranks.world * width)
        padded[: view.numel()] = view.reshape(-1)
        return padded.view(self.ranks.world, width)

    def _step(self, own: Tensor) -> None:
        self.model.reshard()
        numbers = [n for unit in self._units for n in unit]
        pieces = own.split([self._width(n) for n in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            p = self._local[number]
            p.grad = piece[: p.numel()].view_as(p)
        self.optimizer.step()


def _silence(run: Run, finite: Tensor) -> None:
    # Zeros, by select, in place of all that is held of the examples that are left out.
    def kept(t: Tensor) -> Tensor:
        rows = finite.view(-1, *[1] * t.ndim)
        whole = fold(t, run.examples)
        return torch.where(rows, whole, torch.zeros_like(whole)).reshape(t.shape)

    for use in run.uses:
        use.found = [kept(t) for t in use.found]
        use.x = None if use.x is None else kept(use.x)
        use.y = None if use.y is None else kept(use.y)
    run.shared = {number: kept(rows) for number, rows in run.shared.items()}
