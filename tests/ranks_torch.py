"""What every rank of a torch launch computes; ``test_torch_distributed`` looks at the results."""

import hashlib
import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpsgd import METHODS, LogicalBatch, PrivacyConfig, models
from dpsgd.ranks import Disagreement, Ranks
from dpsgd.torch import models as torch_models
from dpsgd.torch import step as step_module
from dpsgd.torch.distributed import connect, disconnect
from dpsgd.torch.methods.bookkeeping import Bookkeeping
from dpsgd.torch.noise import Noise
from dpsgd.torch.sharded import Sharded

P = 2
# Sizes of three logical batches: with 4 ranks uneven, with empty ranks, and empty.
SIZES = (21, 2, 0)
METHOD_NAMES = [name for name, row in METHODS.items() if row.framework == "torch"]


def build(kind, ranks, *, double=False, sigma=0.0, clip=1.0, seed=None, **more):
    spec = models.get("digits-cnn")
    model = torch_models.build(spec, seed=1)
    if double:
        model = model.double()
    privacy = PrivacyConfig(
        num_examples=1000, sample_rate=0.01, steps=10, noise_multiplier=sigma, clip_norm=clip
    )
    make = METHODS[kind].build if isinstance(kind, str) else kind
    return make(
        model,
        torch_models.optimizer(model, "sgd", 1.0),
        privacy,
        loss=torch_models.cross_entropy,
        physical_batch_size=P,
        seed=seed,
        ranks=ranks,
        **more,
    )


def data(double=False):
    spec, rng = models.get("digits-cnn"), np.random.default_rng(0)
    inputs = rng.standard_normal((max(SIZES), *spec.input_shape))
    targets = rng.integers(0, spec.num_classes, max(SIZES))
    return inputs.astype(np.float64 if double else np.float32), targets


def drive(step, ranks, sizes=SIZES, examples=None, *, double=False, even=False):
    """The ordinary loop, over this rank's share of each logical batch."""
    inputs, targets = examples or data(double)
    for size in sizes:
        whole = LogicalBatch(indices=np.arange(size), physical_batch_size=P)
        logical = whole.share(ranks.rank, ranks.world, even=even)
        step.declare(draw=logical.drawn)
        for part in logical:
            step.accumulate(*step.put(inputs[part.indices], targets[part.indices], part.mask))
        step.update()
    return step


def vector(step):
    return np.concatenate([p.detach().numpy().ravel() for p in step.params])


def bits(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


class Counted(TorchDispatchMode):
    """Collectives within the block, whatever calls them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def sums(ranks, found):
    """Parameters after three updates, of all ranks and of one alone, and the collectives."""
    start = vector(build("torch-sgd", Ranks()))
    for name in METHOD_NAMES:
        for double in (False, True):
            if double and "opacus" in name:  # it keeps some of its norms in float32
                continue
            with Counted() as counted:
                many = vector(drive(build(name, ranks, double=double), ranks, double=double))
            one = vector(drive(build(name, None, double=double), Ranks(), double=double))
            found[f"{name} {'float64' if double else 'float32'}"] = {
                "off": float(np.abs(many - one).max() / np.abs(one - start).max()),
                "calls": counted.calls,
                "bits": bits(many),
            }
    with Counted() as counted:
        step = build("torch-sgd", ranks, double=True, sync="every")
        many = vector(drive(step, ranks, double=True, even=True))
    one = vector(drive(build("torch-sgd", None, double=True), Ranks(), double=True))
    found["every"] = {"off": float(np.abs(many - one).max()), "calls": counted.calls}


def noise(ranks, found):
    """Mean square of what an update adds, in units of σC/L, for every placement and draw."""
    sigma, clip = 2000.0, 1e-3

    def excess(name, size, seed=None, **options):
        step = build(name, ranks, sigma=sigma, clip=clip, seed=seed, **options)
        before = vector(step)
        moved = (vector(drive(step, ranks, [size])) - before).astype(np.float64)
        return float(np.mean(np.square(moved / (sigma * clip / 10))))

    for name in ("torch-opacus", "torch-opacus-ghost", "torch-bookkeeping", "torch-vmap"):
        for placement in ("split", "rank0"):
            for size in SIZES if name == "torch-bookkeeping" else (2,):
                of = f"{name} {placement} {size}"
                found[of] = excess(name, size, noise_placement=placement)
    name = "torch-bookkeeping"
    found["one seed for all ranks"] = excess(name, 0, seed=7)
    # Planted mistakes.
    with mock.patch.object(step_module, "noise_share", return_value=1 / ranks.world):
        found["planted: std / W"] = excess(name, 0)
    with mock.patch.object(step_module, "Noise", lambda device, seed, rank: Noise(device, seed, 0)):
        found["planted: one key for all ranks"] = excess(name, 0, seed=7)
    with mock.patch.object(step_module, "noise_share", return_value=1.0):
        found["planted: all noise on every rank"] = excess(name, 0)


def agreement(ranks, found):
    """What each rank is told if one of them (the last) differs."""
    odd = ranks.rank == ranks.world - 1

    def told(step, sizes=(4,)):
        try:
            drive(step, ranks, sizes)
        except Disagreement as error:
            return str(error)
        return ""

    name = "torch-bookkeeping"
    found["nothing"] = told(build(name, ranks))
    found["draw"] = told(build(name, ranks), sizes=(5 if odd else 4,))
    found["config"] = told(build(name, ranks, clip=2.0 if odd else 1.0))
    step = build(name, ranks)
    step.params[0].data += float(odd)
    found["parameters"] = told(step)
    step = build(name, ranks)
    drive(step, ranks, (4,))
    step.params[0].data += float(odd)
    found["parameters after an update"] = told(step)
    step = build(name, ranks)
    step.done += odd
    found["step"] = told(step)


def opacus_traps(ranks, found):
    """How often Opacus' own sampler yields on this rank, and at which positions."""
    from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler as Sampler

    torch.set_rng_state(torch.Generator().get_state())  # that of a process that seeded nothing
    sampler = Sampler(total_size=40, sample_rate=0.05, shuffle=False, steps=200)
    found["positions"] = [(batch // ranks.world).tolist() for batch in sampler]
    own = torch.Generator().manual_seed(ranks.rank)
    sampler = Sampler(total_size=40, sample_rate=0.05, shuffle=False, steps=200, generator=own)
    found["yielded"] = len(list(sampler))


def sharded(ranks, found):
    """A transformer with its parameters on all ranks, against one rank that has them whole."""
    spec = models.get("vit-test")
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((21, *spec.input_shape), np.float32)
    targets = rng.integers(0, spec.num_classes, 21)
    bad = inputs.copy()
    bad[13] = np.inf  # on one rank only, which must not gather once more than the others

    def trained(kind, ranks, inputs, sigma=0.0, lr=1.0):
        model = torch_models.build(spec, seed=1)
        step = kind(
            model,
            torch_models.optimizer(model, "adam" if lr < 1 else "sgd", lr),
            PrivacyConfig(
                num_examples=1000, sample_rate=0.01, steps=9, noise_multiplier=sigma, clip_norm=1.0
            ),
            loss=torch_models.cross_entropy,
            physical_batch_size=P,
            ranks=ranks,
        )
        drive(step, ranks, (21, 3, 0), (inputs, targets), even=True)
        return np.concatenate([p.ravel() for p in step.parameters().values()]), step

    start, _ = trained(Bookkeeping, Ranks(), inputs, lr=1e-30)
    for name, given, lr in (("sgd", inputs, 1.0), ("bad", bad, 1.0), ("adam", inputs, 1e-3)):
        with Counted() as counted:
            many, step = trained(Sharded, ranks, given, lr=lr)
        one, _ = trained(Bookkeeping, Ranks(), given, lr=lr)
        found[name] = {
            "off": float(np.abs(many - one).max() / np.abs(one - start).max()),
            "bits": bits(many),
            "calls": counted.calls,
            "units": len(step._units),
            "owned": sum(p.to_local().numel() for p in step.params) / len(many),
        }
    before, _ = trained(Bookkeeping, Ranks(), inputs)
    noisy, _ = trained(Sharded, ranks, inputs, sigma=1e4)
    moved = (noisy - before).astype(np.float64)
    found["mean square"] = float(np.mean(np.square(moved / (1e4 / 10))) / 3)  # of three updates
    found["size"] = len(moved)


def main(folder, *checks):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks, found = connect(device="cpu", timeout_s=60), {}
    for check in checks:
        globals()[check](ranks, found.setdefault(check, {}))
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(found))
    disconnect(ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
