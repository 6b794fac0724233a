"""
The Triton kernels, run by Triton's interpreter on the CPU, against their twins and float64.

``test_kernels`` runs this file in a process of its own: TRITON_INTERPRET has to be set before
triton is imported.
"""

import importlib.util
import itertools
import os
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="pip install triton")

from triton.runtime import interpreter

from dpsgd.torch import kernels
from dpsgd.torch.kernels import gram, rows, weight_gradient

SMALL, LARGE = 16, 32  # edges of tiles; the interpreter has no need of more
SIZES = st.sampled_from([1, 3, 16, 17, 40])
LAYOUTS = st.sampled_from(["rows", "columns", "examples inside", "every second"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# Of float32 sums; of the Gram's, which cancel, relative to ‖X‖²‖G‖².
RELATIVE, CANCELLED = 2e-5, 2e-6


@pytest.fixture(autouse=True, scope="module")
def _environment():
    """torch.empty gives NaN, so that nothing unwritten is used; bfloat16 products are products."""
    real = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # the interpreter's own multiplies the bits, as integers
        def widened(t):
            if t.dtype.scalar.name != "bf16":
                return t
            bits = t.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

        return real(self, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def made(seed, shape, dtype, layout):
    """Numbers of ``shape``, laid out in memory as named."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "columns":
        return t.mT.contiguous().mT
    if layout == "examples inside":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second":
        return t.repeat_interleave(2, -1)[..., ::2]
    return t


def pair(T, d, p, dtype, layouts=("rows", "rows"), P=3):
    return made(1, (P, T, d), dtype, layouts[0]), made(2, (P, T, p), dtype, layouts[1])


def assert_gram(module, X, G, bias, tile=SMALL):
    got = module.launch(module.kernel, SMALL, X, G, bias, BLOCK=tile, DEPTH=16)
    wide_X, wide_G = X.double(), G.double()
    if bias:
        wide_X = torch.cat([wide_X, torch.ones_like(wide_X[..., :1])], -1)
    want = torch.einsum("etd,etp->epd", wide_X, wide_G).square().sum((1, 2))
    allowed = CANCELLED * wide_X.square().sum((1, 2)) * wide_G.square().sum((1, 2))
    assert ((got - want).abs() <= RELATIVE * want + allowed).all()
    twin = kernels.gram_squares_plain(X, G, bias)
    assert ((got - twin).abs() <= RELATIVE * want + allowed).all()
    assert got.dtype == twin.dtype == torch.float32


def assert_weight_gradient(module, X, G, out, tile=SMALL):
    tiles = {"ROWS": SMALL, "COLUMNS": tile, "DEPTH": 16}
    got = module.launch(module.kernel, (SMALL, SMALL), X, G, out, **tiles)
    want = torch.einsum("etd,etp->epd", X.double(), G.double())
    if out is not None:
        rounding = torch.finfo(out.dtype).eps
        scale = torch.einsum("etd,etp->epd", X.double().abs(), G.double().abs())
        assert ((out.double() - want).abs() <= rounding * want.abs() + 1e-6 * scale).all()
        want = out.double()  # the norm is of what was written
    want = want.square().sum((1, 2))
    torch.testing.assert_close(got.double(), want, rtol=RELATIVE, atol=1e-9)
    if X.dtype == torch.float32:
        twin = kernels.weight_gradient_squares_plain(X, G, None)[1]
        torch.testing.assert_close(got, twin, rtol=RELATIVE, atol=1e-9)


def assert_rows(module, values, factors, into):
    got = into.clone()
    module.launch(module.kernel, values, factors, got, ROWS=4, COLUMNS=128)
    want = into.double()
    for row, factor in zip(values.double(), factors.tolist(), strict=True):
        if factor and np.isfinite(factor):
            want = want + factor * row
    torch.testing.assert_close(got.double(), want, rtol=RELATIVE, atol=1e-5)
    twin = kernels.weighted_rows_plain(values, factors, into.clone())
    torch.testing.assert_close(got, twin, rtol=RELATIVE, atol=1e-5)


@given(SIZES, SIZES, SIZES, DTYPES, st.tuples(LAYOUTS, LAYOUTS), st.booleans())
def test_gram(T, d, p, dtype, layouts, bias):
    X, G = pair(T, d, p, dtype, layouts)
    for tile in (SMALL, LARGE):
        assert_gram(gram, X, G, bias, tile)


@given(SIZES, SIZES, SIZES, DTYPES, st.tuples(LAYOUTS, LAYOUTS, LAYOUTS))
def test_weight_gradient(T, d, p, dtype, layouts):
    X, G = pair(T, d, p, dtype, layouts[:2])
    for tile in (SMALL, LARGE):
        assert_weight_gradient(weight_gradient, X, G, None, tile)
        assert_weight_gradient(weight_gradient, X, G, made(3, (3, p, d), dtype, layouts[2]), tile)


def spoiled(dtype=torch.float32):
    """Rows, and factors half of which must not be used, with what would show if they were."""
    values, factors = made(4, (9, 300), dtype, "rows"), torch.linspace(0.1, 1, 9)
    for i, factor in enumerate([0.0, float("nan"), float("inf"), -float("inf")]):
        factors[2 * i] = factor
        values[2 * i, 7] = float("nan")
    return values, factors, made(5, (300,), torch.float32, "rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weighted_rows(dtype):
    values, factors, into = spoiled(dtype)
    assert_rows(rows, values, factors, into)
    assert_rows(rows, values.t().contiguous().t()[:1], factors[:1], into)


def test_many_tiles():
    X, G = pair(16 * 20, 2, 1, torch.float32, P=1)
    assert_gram(gram, X, G, False)
    X, G = pair(2, 32, 16 * 11, torch.float32, P=1)  # more rows of tiles than are grouped
    assert_weight_gradient(weight_gradient, X, G, torch.empty(1, 176, 32))


def test_nan_stays_with_its_example():
    X, G = pair(40, 17, 20, torch.float32)
    X[1, 3], G[1, 39] = float("nan"), float("inf")
    others = [0, 2]
    out = torch.empty(3, 20, 17)
    blocks = {"ROWS": SMALL, "COLUMNS": SMALL, "DEPTH": 16}
    both = (
        gram.launch(gram.kernel, SMALL, X, G, True, BLOCK=SMALL, DEPTH=16),
        weight_gradient.launch(
            weight_gradient.kernel, (SMALL, SMALL), X, G, out, **blocks
        ),
    )  # fmt: skip
    for got in both:
        assert not got[1].isfinite()
    assert_gram(gram, X[others], G[others], True)
    torch.testing.assert_close(both[0][others], kernels.gram_squares_plain(X, G, True)[others])
    torch.testing.assert_close(both[1][others], out[others].square().sum((1, 2)))


COUNT = itertools.count()


def changed(module, tmp_path, right, wrong):
    """``module`` with a mistake in it."""
    source = pathlib.Path(module.__file__).read_text()
    assert right in source
    path = tmp_path / "mistaken.py"
    path.write_text(source.replace(right, wrong).replace('"dpsgd::', f'"mistaken{next(COUNT)}::'))
    spec = importlib.util.spec_from_file_location(f"mistaken{next(COUNT)}", path)
    mistaken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mistaken)
    return mistaken


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("2.0 * total", "total"),  # off-diagonal tiles counted once
        ("column * (column + 1) // 2\n\n", "column\n\n"),  # another order of the tiles
        ("pairs += 1.0", "pairs += 0.5"),
        ("left += DEPTH * per_number", "left += 0"),
        ("number < width - start", "number < width"),
        ("range(tile + tiles, slots, tiles)", "range(slots, slots, tiles)"),  # parts left over
    ],
)
def test_rejects_a_mistaken_gram(tmp_path, right, wrong):
    mistaken = changed(gram, tmp_path, right, wrong)
    X, G = pair(70, 20, 17, torch.float32, P=2)
    with pytest.raises(AssertionError):
        assert_gram(mistaken, X, G, True, LARGE)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("total = written.to(tl.float32)", "total += 0"),  # the norm before rounding
        ("total * total", "tl.abs(total)"),
        ("g += DEPTH * g_position", "g += 0"),
        ("down, across, 8)", "across, down, 8)"),  # tiles left out
        ("range(tile + tiles, slots, tiles)", "range(slots, slots, tiles)"),
    ],
)
def test_rejects_a_mistaken_weight_gradient(tmp_path, right, wrong):
    mistaken = changed(weight_gradient, tmp_path, right, wrong)
    X, G = pair(40, 50, 170, torch.bfloat16, P=1)
    with pytest.raises(AssertionError):
        assert_weight_gradient(mistaken, X, G, torch.empty(1, 170, 50, dtype=X.dtype), LARGE)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.where(used, factor, 0.0)", "factor"),  # 0 · NaN
        ('(factor != 0.0) & (tl.abs(factor) < float("inf"))', "factor == factor"),
        ("range(0, P, ROWS)", "range(0, ROWS, ROWS)"),
        ("total = tl.load(where, mask=inside, other=0.0) +", "total ="),
    ],
)
def test_rejects_mistaken_rows(tmp_path, right, wrong):
    with pytest.raises(AssertionError):
        assert_rows(changed(rows, tmp_path, right, wrong), *spoiled())
