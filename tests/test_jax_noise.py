"""The noise of the JAX methods: the cipher, the tails, moments, and that no key serves twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsgd import METHODS, PrivacyConfig, models
from dpsgd.jax import models as zoo
from dpsgd.jax import noise

N = 200_000
QUANTILES = np.array([0.253347, 0.674490, 1.281552, 2.326348])
EDGES = np.concatenate([-QUANTILES[::-1], QUANTILES])
SHARES = np.array([0.01, 0.09, 0.15, 0.15, 0.20, 0.15, 0.15, 0.09, 0.01])


@pytest.mark.parametrize(
    ("key", "plain", "cipher"),  # of the authors' Random123, kat_vectors
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_answers(key, plain, cipher):
    words = [jnp.asarray(np.array(w, np.uint32)) for w in plain]
    got = noise.threefry(jnp.asarray(np.array(key, np.uint32)), *words)
    assert tuple(map(int, got)) == cipher


def test_polar_is_exact_at_its_ends_and_close_between():
    rng = np.random.default_rng(0)
    radius, angle = rng.integers(0, 2**32, (2, 10_000), dtype=np.uint32)
    radius[:2], angle[:8] = (0, 2**32 - 1), np.arange(8) * 2**29
    got = [np.asarray(z, np.float64) for z in noise.polar(jnp.asarray(radius), jnp.asarray(angle))]
    length = np.sqrt(-2 * np.log((radius + 0.5) / 2**32))
    turn = 2 * np.pi * angle / 2**32
    for z, want in zip(got, (length * np.cos(turn), length * np.sin(turn)), strict=True):
        np.testing.assert_allclose(z, want, atol=2e-4)  # √(-2 ln u) where u is next to 1
        far = length > 0.1
        np.testing.assert_allclose(z[far], want[far], atol=2e-6)
    assert got[0][0] == pytest.approx(noise.LARGEST, rel=1e-6)
    assert abs(got[0][1]) < 1e-3


def faults(z):
    """What tells the numbers from independent standard normals, at five standard errors."""
    z, found = np.asarray(z, np.float64), []
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        if abs((z**power).mean() - moment) > 5 * np.sqrt(variance / z.size):
            found.append(f"moment {power}")
    counts = np.bincount(np.searchsorted(EDGES, z.ravel()), minlength=9)
    chi2 = ((counts - z.size * SHARES) ** 2 / (z.size * SHARES)).sum()
    if not 0.3 < chi2 < 40:  # 8 degrees of freedom: outside with probability 1e-5
        found.append("chi²")
    for lag in (1, 2, 1000):
        if abs((z[lag:] * z[:-lag]).mean()) > 5 / np.sqrt(z.size):
            found.append(f"lag {lag}")
    return found


def test_normals_are_normal_and_the_test_can_say_no():
    key = jnp.asarray(np.random.default_rng(3).integers(0, 2**32, 4, dtype=np.uint32))
    one, two = (np.asarray(z) for z in jax.jit(lambda k: noise.normals(k, N))(key))
    other = np.asarray(noise.normals(key.at[2].add(1), N)[0])
    for z in (one, two, other, np.concatenate([one, two])):
        assert faults(z) == []
    for a, b in ((one, two), (one, other), (one**2 - 1, two**2 - 1)):
        assert abs((a.astype(float) * b).mean()) < 10 / np.sqrt(N)
    assert faults(1.02 * one)
    assert faults(np.repeat(one[: N // 2], 2)) == ["lag 1"]
    uniform = np.sqrt(2) * (np.random.default_rng(0).random((6, N)).sum(0) - 3)
    assert "moment 4" in faults(uniform), "a sum of 6 uniforms has tails that are too light"
    assert faults(np.abs(one))


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_parts_of_the_noise_do_not_overlap(sizes):
    places, length = noise.halves(sizes)
    used = np.zeros((2, length), int)
    for (which, start), size in zip(places, sizes, strict=True):
        used[which, start : start + size] += 1
        assert used[which, start : start + size].size == size
    assert used.max() <= 1
    assert length <= max(max(sizes), (sum(sizes) + max(sizes)) / 2)


def test_each_update_has_noise_of_its_own():
    config = PrivacyConfig(
        num_examples=1000, sample_rate=0.01, noise_multiplier=1.0, clip_norm=1.0, steps=10
    )
    model = zoo.build(models.get("digits-cnn"))
    step = METHODS["jax-masked"].build(
        model,
        zoo.optimizer(model, "sgd", 1.0),
        config,
        loss=zoo.cross_entropy,
        physical_batch_size=4,
        seed=1,
    )
    flat = []
    for _ in range(3):
        before = step.parameters()
        step.update()
        after = step.parameters()
        flat.append(np.concatenate([(after[n] - before[n]).ravel() for n in before]) * 10)
    for k, z in enumerate(flat):
        assert faults(z) == []
        for other in flat[:k]:
            assert abs((z * other).mean()) < 5 / np.sqrt(z.size)
            assert not (z == other).any()
