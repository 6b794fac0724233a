"""
Standard normals of a secret key: Threefry-2x32-20 in counter mode, then Box–Muller.

(a, b) = Threefry(k₀k₁, (k₂, k₃ ⊕ i)),   u = (a + 1/2)/2³²,   θ = 2πb/2³²
z_i = √(-2 ln u) cos θ,   z'_i = √(-2 ln u) sin θ

The cipher of JAX's default generator, all rounds written out; sine and cosine as polynomials of an
exactly reduced angle: plain arithmetic throughout, of which XLA makes one vector loop.
``jax.random.normal`` takes several times as long on a CPU.

Guarantees:
    - 32 bits of radius and 32 of angle for each pair; float32 arithmetic. |z| is at most
      √(66 ln 2) = 6.76, beyond which a normal has probability 1.3e-11 (``jax.random.normal`` in
      float32: 5.42, 6e-8).
    - Up to 2³² pairs a key [4], none repeated: the cipher is a bijection of its second argument.
      ``JaxStep`` derives the key of each draw from its own and the number of the update.
    - Threefry-2x32-20 passes BigCrush (Salmon et al., SC 2011). It is not cryptographic, and
      float32 noise is not proof against attacks on its least significant bits (Mironov, CCS 2012).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
LARGEST = float(np.sqrt(66 * np.log(2)))


def threefry(key: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The words (a, b) encrypted, elementwise; all uint32, ``key`` [2]."""
    keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    a, b = a + keys[0], b + keys[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(bits)) | (b >> np.uint32(32 - bits)))
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def normals(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """
    Twice ``size`` independent standard normals, float32; ``key`` is uint32 [4].

    Two arrays, as they are made: XLA would make one of them twice, by a branch for each number.
    """
    index = lax.iota(jnp.uint32, size)
    return polar(*threefry(key[:2], key[2], key[3] ^ index))


def polar(radius: jax.Array, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two normals from two words, by Box–Muller."""
    length = jnp.sqrt(-2 * jnp.log(radius.astype(jnp.float32) * 2**-32 + 2**-33))
    sine, cosine = _sine_and_cosine(angle)
    return length * cosine, length * sine


def halves(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """([(which of two arrays, offset)] for parts of these sizes, the arrays' common length)."""
    places, used = [(0, 0)] * len(sizes), [0, 0]
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        which = int(used[1] < used[0])
        places[n] = which, used[which]
        used[which] += sizes[n]
    return places, max(used)


def _sine_and_cosine(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Of 2π·angle/2³². Without its quarter turns |x| ≤ π/4 is left: Cephes' polynomials.
    quarter = (angle + np.uint32(1 << 29)) >> np.uint32(30)
    rest = lax.bitcast_convert_type(angle - (quarter << np.uint32(30)), jnp.int32)
    x = rest.astype(jnp.float32) * (2 * np.pi / 2**32)
    y = x * x
    sine = x + x * y * (-1.6666654611e-1 + y * (8.3321608736e-3 - y * 1.9515295891e-4))
    fourth = 4.166664568298827e-2 + y * (-1.388731625493765e-3 + y * 2.443315711809948e-5)
    cosine = 1 - y / 2 + y * y * fourth
    swapped = (quarter & np.uint32(1)) == 1
    sine, cosine = jnp.where(swapped, cosine, sine), jnp.where(swapped, sine, cosine)
    sine = jnp.where((quarter & np.uint32(2)) == 2, -sine, sine)
    other = (quarter + np.uint32(1)) & np.uint32(2)
    return sine, jnp.where(other == 2, -cosine, cosine)
