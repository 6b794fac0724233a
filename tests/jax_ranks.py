"""
Checks over several devices or processes, in a process of their own: ``jax_ranks.py WHAT FILE``.

XLA's flags are read once, at the first import of JAX; the results are numbers in a JSON file, which
``test_jax_distributed.py`` judges.
"""

import json
import os
import re
import sys
from pathlib import Path

DEVICES = {"devices": 4, "processes": 2}
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES.get(sys.argv[1], 1)}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from dpsgd import METHODS, PrivacyConfig, poisson_batches  # noqa: E402
from dpsgd.ranks import Ranks  # noqa: E402
from dpsgd.sampling import LogicalBatch, side_by_side  # noqa: E402

P, L = 2, 10
OURS = ("jax-sgd", "jax-masked", "jax-bookkeeping", "jax-ghost")
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
    optimizer = optax.sgd(1.0, momentum=0.5)
    return METHODS[method].build(nnx.merge(graph, state), optimizer, config or privacy(), **options)


def logical(size, seed=0):
    indices = np.random.default_rng([seed, size]).choice(64, size, replace=False)
    return LogicalBatch(indices=indices, physical_batch_size=P)


def drive(step, batch, even=False):
    """One logical batch on all devices."""
    inputs, targets = examples()
    inputs = inputs.astype(next(iter(step.parameters().values())).dtype)
    options = {"even": True} if even else {}
    place = step.place
    shares = [batch.share(w, place.world, **options) for w in place.device_ranks]
    for part in side_by_side(shares):
        step.accumulate(*step.put(inputs[part.indices], targets[part.indices], part.mask))
    step.update()


def finals(step, **options):
    """Parameters after each of a few updates."""
    after = []
    for size in SIZES:
        drive(step, logical(size), **options)
        after.append({n: a.astype(np.float64) for n, a in step.parameters().items()})
    return after


def distance(one, two):
    """Largest difference, relative to that of the parameters over the run."""
    scale = max(np.abs(one[-1][n] - one[0][n]).max() for n in one[0])
    return float(
        max(np.abs(a[n] - b[n]).max() for a, b in zip(one, two, strict=True) for n in a) / scale
    )


def alike(step):
    """Whether all devices of this process hold the same bits."""
    return all(
        len({np.asarray(s.data).tobytes() for s in a.addressable_shards}) == 1
        for a in jax.tree.leaves((step.params, step.opt_state))
    )


class Recorder:
    """A jitted function that remembers what it was called with first."""

    def __init__(self, jitted):
        self.jitted, self.seen = jitted, None

    def __call__(self, *args):
        if self.seen is None:
            self.seen = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), args
            )
        return self.jitted(*args)

    def collectives(self):
        """Their names in the compiled program."""
        return re.findall(COLLECTIVE, self.jitted.lower(*self.seen).compile().as_text())


def compared(method, want, dtype="float32", **options):
    """A run on many devices: how far from ``want``, and what was compiled."""
    even = options.get("sync") == "every"
    step = build(method, dtype=dtype, ranks=options.pop("ranks", Ranks()), **options)
    before = step.compiles()
    step._accumulate, step._update = Recorder(step._accumulate), Recorder(step._update)
    found = finals(step, even=even)
    compiles = step.compiles() - before
    return {
        "distance": distance(want, found),
        "alike": alike(step),
        "compiles": compiles,
        "accumulate": step._accumulate.collectives(),
        "update": step._update.collectives(),
        "world": step.place.world,
        "bytes": float(sum(a.sum() for a in found[-1].values())),
    }


def noise(size, count, fault=None, sigma=2.0, clip_norm=0.5, **options):
    """{mean square, numbers, mean product of two updates} of the noise in units of σC."""
    options["loss"] = lambda model, inputs, targets: jnp.square(model(inputs)).sum((1, 2))
    updates = []
    for level in (0.0, sigma):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4000, rngs=rngs))
        config = privacy(level, clip_norm)
        step = build("jax-masked", model, config, devices=jax.devices()[:count], **options)
        if fault:
            fault(step, config)
        seen = [step.parameters()]
        for _ in range(2):
            drive(step, logical(size))
            seen.append(step.parameters())
        flat = [np.concatenate([a.ravel() for a in s.values()]).astype(float) for s in seen]
        first = flat[1] - flat[0]
        updates.append([first, flat[2] - flat[1] - 0.5 * first])
    one, two = ((b - a) * L / (sigma * clip_norm) for a, b in zip(*updates, strict=True))
    return {
        "square": float(np.mean(one**2)),
        "numbers": one.size,
        "product": float(np.mean(one * two)),
    }


def one_key(step, config):
    """A mistake: all devices draw with one key."""
    key = step.place.keys(1)
    step._key = jax.device_put(jnp.stack([key[0]] * step.place.shards), key.sharding)


def too_little(step, config):
    """A mistake: each of W devices adds noise of σC/W."""
    step.place.noise_share = 1 / step.place.world


def devices():
    """One process with four devices."""
    found = {}
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            for method in OURS if dtype == "float64" else OURS[2:3]:
                want = finals(build(method, dtype=dtype))
                for count in (2, 4) if method == "jax-bookkeeping" else (4,):
                    some = jax.devices()[:count]
                    name = f"{method} {dtype} {count}"
                    found[name] = compared(method, want, dtype, devices=some)
                if method == "jax-sgd":
                    every = compared(method, want, dtype, devices=some, sync="every")
                    found["every"] = every
    for count in (1, 2, 4):
        for size in (0, 2):
            found[f"noise {count} {size}"] = noise(size, count)
    found["noise rank0"] = noise(3, 4, noise_placement="rank0")
    found["noise one key"] = noise(0, 4, one_key)
    found["noise too little"] = noise(0, 4, too_little)
    step = build("jax-bookkeeping", config=privacy(1.0), ranks=Ranks())
    before, sizes = step.compiles(), set()
    for batch in poisson_batches(64, 0.1, P, 60, seed=1):
        sizes.add(batch.size)
        drive(step, batch)
    found["poisson"] = {"compiles": step.compiles() - before, "sizes": sorted(sizes)}
    return found


if __name__ == "__main__":
    what, file = sys.argv[1], Path(sys.argv[2])
    found = {"devices": devices}[what]()
    file.write_text(json.dumps(found))
