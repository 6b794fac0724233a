"""
What every process of a JAX launch computes; ``test_jax_distributed`` looks at the results.

There are four devices in all.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

# Programs that are run a few times need no fast code.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from launch import fated

from dpsgd import METHODS, PrivacyConfig, poisson_batches
from dpsgd.jax.distributed import connect, disconnect
from dpsgd.jax.step import JaxStep
from dpsgd.ranks import Disagreement, Ranks
from dpsgd.sampling import LogicalBatch, side_by_side
from dpsgd.train import train

P, L, RATE = 2, 10, 0.125
OURS = ("jax-sgd", "jax-masked", "jax-bookkeeping", "jax-ghost")
FASTEST = ("jax-bookkeeping",)
COLLECTIVE = r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
SIZES = (21, 0, 1, 3, 8, 9)  # of logical batches: none, fewer than ranks, uneven numbers of trips


class Model(nnx.Module):
    """Layers with a rule, one without, one with scanned weights."""

    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(6, 5, rngs=rngs), nnx.LayerNorm(5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        def step(carry, part):
            return carry + part, None

        x = jnp.tanh(self.norm(self.first(x)))
        x, _ = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))  # from a constant
        return self.last(x)


class Small(nnx.Module):
    """Compiles quickly."""

    def __init__(self, rngs):
        self.only = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.only(x.mean(1))


def loss(model, inputs, targets):
    return jnp.square(model(inputs) - targets[:, None]).sum(1)


def examples(rows=64):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, 4, 6), np.float32), np.arange(rows) % 3


def privacy(sigma=0.0, clip_norm=1.0):
    return PrivacyConfig(
        num_examples=1000,
        sample_rate=L / 1000,
        noise_multiplier=sigma,
        clip_norm=clip_norm,
        steps=10,
    )


def build(method, model=None, config=None, dtype="float32", **options):
    graph, state = nnx.split(model or Model(nnx.Rngs(0)))
    state = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), state)
    options = {"loss": loss, "physical_batch_size": P, "seed": 1} | options
    optimizer = optax.sgd(RATE, momentum=0.5)
    return METHODS[method].build(nnx.merge(graph, state), optimizer, config or privacy(), **options)


def logical(size, seed=0):
    indices = np.random.default_rng([seed, size]).choice(64, size, replace=False)
    return LogicalBatch(indices=indices, physical_batch_size=P)


def drive(step, batch):
    """One logical batch on all devices."""
    inputs, targets = examples()
    inputs = inputs.astype(jax.tree.leaves(step.params)[0].dtype)
    place = step.place
    shares = [batch.share(w, place.world, even=place.even) for w in place.device_ranks]
    step.declare(draw=shares[0].drawn)
    for part in side_by_side(shares):
        step.accumulate(*step.put(inputs[part.indices], targets[part.indices], part.mask))
    step.update()


def finals(step):
    """Parameters after each of a few updates."""
    after = []
    for size in SIZES:
        drive(step, logical(size))
        after.append({n: a.astype(np.float64) for n, a in step.parameters().items()})
    return after


def distance(one, two):
    """Largest difference, relative to that of the parameters over the run."""
    scale = max(np.abs(one[-1][n] - one[0][n]).max() for n in one[0])
    return float(
        max(np.abs(a[n] - b[n]).max() for a, b in zip(one, two, strict=True) for n in a) / scale
    )


def alike(step):
    """Whether all devices of this process hold the same bits of the same part."""
    for a in jax.tree.leaves((step.params, step.opt_state)):
        seen = {}
        for shard in a.addressable_shards:
            seen.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
        if any(len(bits) > 1 for bits in seen.values()):
            return False
    return True


def held(step):
    """Numbers of parameters and optimizer on the first device, relative to those of the model."""
    leaves = jax.tree.leaves((step.params, step.opt_state))
    whole = 2 * sum(a.size for a in jax.tree.leaves(step.like))  # the optimizer has one copy
    return sum(a.addressable_shards[0].data.size for a in leaves) / whole


class Compiled:
    """A jitted function compiled once, for the arguments it is first called with."""

    def __init__(self, jitted):
        self.jitted, self.program = jitted, None

    def lower(self, *args):
        self.program = self.program or self.jitted.lower(*args).compile()
        return self

    def compile(self):
        return self.program

    def __call__(self, *args):
        self.lower(*args)
        return self.program(*args)  # refuses arguments of other shapes or in other places

    def collectives(self):
        """Their names in the compiled program."""
        return re.findall(COLLECTIVE, self.program.as_text())


def compared(method, want, dtype="float32", **options):
    """A run on many devices: how far from ``want``, and what was compiled."""
    step = build(method, dtype=dtype, ranks=options.pop("ranks", Ranks()), **options)
    before = step.compiles()
    step._accumulate, step._update = Compiled(step._accumulate), Compiled(step._update)
    found = finals(step)
    compiles = step.compiles() - before
    return {
        "distance": distance(want, found),
        "alike": alike(step),
        "compiles": compiles,
        "world": step.place.world,
        "held": held(step),
        "total": float(sum(a.sum() for a in found[-1].values())),
        "accumulate": step._accumulate.collectives(),
        "update": step._update.collectives(),
    }


def noise(size, count, fault=None, sigma=2.0, clip_norm=0.5, **options):
    """{mean square, numbers, mean product of two updates} of the noise in units of σC."""
    options["loss"] = lambda model, inputs, targets: jnp.square(model(inputs)).sum((1, 2))
    updates = []
    for level in (0.0, sigma) if size else (sigma,):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4000, rngs=rngs))
        config = privacy(level, clip_norm)
        step = build("jax-masked", model, config, devices=jax.devices()[:count], **options)
        if fault:
            fault(step)
        seen = [step.parameters()]
        for _ in range(2):
            drive(step, logical(size))
            seen.append(step.parameters())
        flat = [np.concatenate([a.ravel() for a in s.values()]).astype(float) for s in seen]
        first = flat[1] - flat[0]
        updates.append([first, flat[2] - flat[1] - 0.5 * first])
    if not size:
        updates.insert(0, [0.0, 0.0])
    scale = RATE / L * sigma * clip_norm
    one, two = ((b - a) / scale for a, b in zip(*updates, strict=True))
    square, product = float(np.mean(one**2)), float(np.mean(one * two))
    return {"square": square, "product": product, "numbers": one.size}


def one_key(step):
    """A mistake: all devices draw with one key."""
    key = step.place.keys(1)
    step._key = jax.device_put(jnp.stack([key[0]] * step.place.shards), key.sharding)


def too_little(step):
    """A mistake: each of W devices adds noise of σC/W."""
    step.place.noise_share = 1 / step.place.world


def local_ranks(step):
    """A mistake: each process takes its devices for the first ones."""
    step.place.device_ranks = tuple(range(step.place.shards))
    step._key = step.place.keys(1)


def devices(ranks, found):
    """All methods, by one process with up to four devices."""
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            for method in OURS if dtype == "float64" else FASTEST:
                want = finals(build(method, dtype=dtype))
                for count in (2, 4) if method in FASTEST and dtype == "float64" else (4,):
                    some = {"dtype": dtype, "devices": jax.devices()[:count]}
                    found[f"{method} {dtype} {count}"] = compared(method, want, **some)
                if method == "jax-sgd":
                    found["every"] = compared(method, want, **some, sync="every")


def sharded(ranks, found):
    """Our fastest method with the model cut into two and four."""
    with jax.enable_x64(True):
        want = finals(build("jax-bookkeeping", dtype="float64"))
        for shards in (2, 4):
            options = {"ranks": ranks, "model_shards": shards}
            found[shards] = compared("jax-bookkeeping", want, "float64", **options)


def noises(ranks, found):
    """The noise of up to four devices, and mistakes in it."""
    for count in (1, 2, 4):
        found[f"{count} devices"] = noise(0, count)
    found["two examples"] = noise(2, 4)
    found["rank0"] = noise(3, 4, noise_placement="rank0")
    found["2 shards"] = noise(2, 4, model_shards=2)
    found["4 shards"] = noise(0, 4, model_shards=4)
    found["rank0, 2 shards"] = noise(0, 4, noise_placement="rank0", model_shards=2)
    found["one key"] = noise(0, 4, one_key)
    found["too little"] = noise(0, 4, too_little)
    found["too little, 2 shards"] = noise(0, 4, too_little, model_shards=2)


def poisson(ranks, found):
    """Many draws, and how often something was compiled."""
    step = build("jax-bookkeeping", Small(nnx.Rngs(0)), privacy(1.0), ranks=ranks)
    before, sizes = step.compiles(), set()
    for batch in poisson_batches(64, 0.04, P, 60, seed=1):
        sizes.add(batch.size)
        drive(step, batch)
    found |= {"compiles": step.compiles() - before, "sizes": sorted(sizes)}


def processes(ranks, found):
    """All methods, by several processes that drive two devices each."""
    with jax.enable_x64(True):
        for method in (*FASTEST, "jax-sgd"):
            want = finals(build(method, dtype="float64"))
            options = {"dtype": "float64", "ranks": ranks}
            found[f"{method} float64"] = compared(method, want, **options)
            if method in FASTEST:
                name = f"{method} float64, cut"
                found[name] = compared(method, want, **options, model_shards=4)
            else:
                found["every"] = compared(method, want, **options, sync="every")


def joint_noises(ranks, found):
    """The noise of several processes, and mistakes in it."""
    for placement in ("split", "rank0"):
        options = {"ranks": ranks, "noise_placement": placement}
        found[placement] = noise(1, 4, **options)
        found[f"{placement}, local ranks"] = noise(0, 4, local_ranks, **options)
    found["2 shards"] = noise(0, 4, ranks=ranks, model_shards=2)


def disagree(ranks, found):
    """Each matter in which rank 1 may differ, and what all ranks say."""
    odd = ranks.rank == 1
    for name in ("draw", "config", "parameters", "step", "nothing"):
        config = privacy(clip_norm=2.0 if odd and name == "config" else 1.0)
        step = build("jax-sgd", Small(nnx.Rngs(0)), config, ranks=ranks)
        if odd and name == "parameters":
            step.params = jax.tree.map(lambda a: a * (1 + 1e-7), step.params)
        if odd and name == "step":
            step.place._updates += 1
        batch = logical(5, seed=odd and name == "draw")
        try:
            drive(step, batch)
            drive(step, logical(0))
            found[name] = "agreed"
        except Disagreement as error:
            found[name] = str(error)


def _fated(ranks, fated, end, **options):
    step = build("jax-bookkeeping", ranks=ranks, **options)
    drive(step, logical(9))
    drive(step, logical(1))
    if ranks.rank == fated:
        end()
    drive(step, logical(8))


def dies(ranks, found):
    """Rank 1 is killed between two updates."""
    _fated(ranks, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def first_dies(ranks, found):
    """Rank 0, with the store of all, is killed between two updates."""
    _fated(ranks, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hangs(ranks, found):
    """Rank 1 does nothing any more."""
    _fated(ranks, 1, lambda: time.sleep(1000))


def sharded_hangs(ranks, found):
    """The same where the others wait for it at each physical batch."""
    _fated(ranks, 1, lambda: time.sleep(1000), model_shards=4)


def trains(folder, method, sigma, optimizer, learning_rate):
    """The whole of a run, as the command line would start it; $KILL is ``rank:update``."""
    fated(JaxStep)
    result = train(
        method=method,
        steps=4,
        sample_rate=0.03,
        noise_multiplier=float(sigma),
        physical_batch_size=8,
        optimizer=optimizer,
        learning_rate=float(learning_rate),
        seed=3,
        device="cpu",
        sync="every" if method == "jax-sgd" else "once",
        checkpoint=Path(folder, "run"),
        checkpoint_every=2,
        resume=True,
    )
    found = {n: a.tolist() for n, a in result.step.parameters().items()}
    return found | {"accuracy": result.test_accuracy, "shards": result.step.shards}


def main(folder, *checks):
    jax.config.update("jax_num_cpu_devices", 4 // int(os.environ["WORLD_SIZE"]))
    if checks[0] == "trains":  # connects by itself
        found = trains(folder, *checks[1:])
        Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    patience_s = 10 if set(checks) & {"dies", "hangs", "sharded_hangs", "first_dies"} else 60
    ranks, found = connect(device="cpu", timeout_s=patience_s), {}
    for check in checks:
        globals()[check](ranks, found.setdefault(check, {}))
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(found))
    disconnect(ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
