"""The fused kernels without a GPU: their twins, their code for real devices, their tracing."""

import functools
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from dpsgd.torch import kernels

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    triton = None

OLD = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
needs_triton = pytest.mark.skipif(triton is None, reason="no Triton: pip install triton")
STACK_BYTES = 64  # a few scalars; a tile that spills takes hundreds
# Tuning tries it for the sake of newer devices, and will not choose it there.
SPILLS = {(80, "tf32", (128, 64))}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that one block may have


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_twins_are_the_formulas():
    X, G = random(3, 6, 4), random(3, 6, 5)
    gradients = torch.einsum("etd,etp->epd", X, G)
    squares, bias = gradients.square().sum((1, 2)), G.sum(1).square().sum(1)
    torch.testing.assert_close(kernels.gram_squares(X, G), squares)
    torch.testing.assert_close(kernels.gram_squares(X, G, Xbias=True), squares + bias)
    out = torch.empty(3, 5, 4, dtype=X.dtype)
    got, norms = kernels.weight_gradient_squares(X, G, out)
    assert got is out
    torch.testing.assert_close(out, gradients)
    torch.testing.assert_close(norms, squares)
    nothing, norms = kernels.weight_gradient_squares(X, G)
    assert nothing is None
    torch.testing.assert_close(norms, squares)


def test_twin_leaves_out_rows_by_select():
    rows, into = torch.ones(4, 3), torch.ones(3)
    rows[1:, 0] = float("nan")
    factors = torch.tensor([0.5, 0.0, float("nan"), float("inf")])
    got = kernels.weighted_rows(rows, factors, into)
    assert got is into
    assert got.tolist() == [1.5, 1.5, 1.5]


def test_low_precision_has_norms_in_float32():
    X, G = random(2, 9, 5, dtype=torch.bfloat16), random(2, 9, 3, dtype=torch.bfloat16)
    want = torch.einsum("etd,etp->epd", X.double(), G.double()).square().sum((1, 2))
    for got in (kernels.gram_squares(X, G), kernels.weight_gradient_squares(X, G)[1]):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kernels.gram_squares(torch.ones(2, 3, 4), torch.ones(2, 5, 4)), "reshape"),
        (lambda: kernels.gram_squares(torch.ones(2, 3, 4), torch.ones(2, 3, 4).half()), "cast"),
        (
            lambda: kernels.weight_gradient_squares(
                torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(2, 4, 5)
            ),
            r"must be \[P, p, d\] = \(2, 5, 4\)",
        ),
        (
            lambda: kernels.weighted_rows(torch.ones(2, 3), torch.ones(3), torch.ones(3)),
            "flatten",
        ),
    ],
)
def test_wrong_shapes_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import dpsgd.torch.kernels as k, torch; "
    code += "print(k.gram_squares(torch.ones(1, 2, 3), torch.ones(1, 2, 3)).item())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "36.0", run.stderr


@needs_triton
def test_strides_that_32_bits_cannot_take_go_to_the_twin():
    from dpsgd.torch.kernels.common import unfit

    near, far = (torch.empty(2, 3, size, device="meta") for size in ((1 << 24) - 1, 1 << 24))
    assert not unfit(near, near)
    assert unfit(near, far)


@needs_triton
@pytest.mark.skipif(OLD, reason="its interpreter does not run with NumPy 2.4: triton>=3.7 does")
def test_kernels_under_the_interpreter():
    path = pathlib.Path(__file__).with_name("interpreted_kernels.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@functools.cache
def compiled(module, capability, dtype, precision, blocks, warps, stages, ones=False):
    """The kernel's code for a device that need not be here, in rows aligned to 16 bytes."""
    kernel = module.kernel
    constants = dict(blocks)
    flags = {"BIAS": True, "WRITE": True, "PRECISION": precision}
    unit = ["x_number", "g_number", "o_column", "per_column", "per_factor", "per_sum"]
    unit += ["T", "d", "p", "P", "n", "slots"] if ones else []
    constants |= {name: value for name, value in flags.items() if name in kernel.arg_names}
    constants |= {name: 1 for name in unit if name in kernel.arg_names}
    pointers = dict.fromkeys(["parts", "into", "factors"], "*fp32")
    pointers |= dict.fromkeys(["X", "G", "out", "rows"], f"*{dtype}")
    names = list(enumerate(kernel.arg_names))
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for _, name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names if name not in constants}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def code(module, capability, precision, config, ones=False):
    dtype = "bf16" if precision == "bf16" else "fp32"
    dot = "tf32" if precision != "ieee" else "ieee"
    blocks = tuple(config.kwargs.items())
    return compiled(
        module, capability, dtype, dot, blocks, config.num_warps, config.num_stages, ones
    )


def assert_fits(made, capability, tmp_path):
    """It has the shared memory it asks for and keeps its tiles in registers; no atomics."""
    assert made.metadata.shared <= SHARED_BYTES[capability]
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", made.asm["ptx"], re.MULTILINE)
    tool = triton.knobs.nvidia.cuobjdump
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    shown = subprocess.run(
        [tool.path, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    (stack,) = re.findall(r"STACK:(\d+)", shown)
    assert int(stack) <= STACK_BYTES, shown
    assert re.findall(r"LOCAL:(\d+)", shown) == ["0"], shown


def tuned(capability, precision, largest):
    """The configurations that tuning chooses from; or the largest of each kernel."""
    from dpsgd.torch.kernels import gram, weight_gradient

    for module in (gram, weight_gradient):
        configs = module.CONFIGS_EXACT if precision == "ieee" else module.CONFIGS
        for config in configs[-1:] if largest else configs:
            if (capability, precision, tuple(config.kwargs.values())) not in SPILLS:
                yield module, config


def assert_all_fit(capability, precision, largest, tmp_path):
    for module, config in tuned(capability, precision, largest):
        made = code(module, capability, precision, config)
        assert_fits(made, capability, tmp_path)
        ptx = made.asm["ptx"]
        products = re.findall(r"^\s*(wgmma\.mma_async|mma\.sync)\S*", ptx, re.MULTILINE)
        if precision == "ieee":  # never TF32 where float32 was asked for
            assert not products
            assert "fma.rn.f32" in ptx
        elif capability == 90 and min(list(config.kwargs.values())[:-1]) >= 64:
            assert set(products) == {"wgmma.mma_async"}
        else:
            assert set(products) == {"mma.sync"}


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Triton's compiler and its tools, with an empty cache."""
    for tool in ("ptxas", "cuobjdump"):
        try:
            assert pathlib.Path(getattr(triton.knobs.nvidia, tool).path).exists()
        except (RuntimeError, AssertionError):
            pytest.skip(f"this Triton has no {tool}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_devices_without_spills(capability, precision, tmp_path):
    assert_all_fit(capability, precision, True, tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_all_that_tuning_tries_compiles_without_spills(capability, precision, tmp_path):
    assert_all_fit(capability, precision, False, tmp_path)


@needs_triton
@pytest.mark.usefixtures("compiler")
def test_a_tile_that_spills_is_rejected(tmp_path):
    from dpsgd.torch.kernels import gram

    # Two tiles of 128 × 128 in 128 threads: 256 registers each, one more than there are.
    large = triton.Config({"BLOCK": 128, "DEPTH": 16}, num_warps=4, num_stages=3)
    with pytest.raises(AssertionError, match="STACK"):
        assert_fits(code(gram, 90, "bf16", large), 90, tmp_path)


@needs_triton
@pytest.mark.usefixtures("compiler")
def test_compiles_for_sizes_of_one_and_for_rows(tmp_path):
    from dpsgd.torch.kernels import gram, rows, weight_gradient

    for module in (gram, weight_gradient):  # Triton makes constants of arguments that are 1
        assert_fits(code(module, 90, "bf16", module.CONFIGS[0], ones=True), 90, tmp_path)
    for dtype in ("fp32", "bf16"):
        made = compiled(rows, 90, dtype, "ieee", tuple(rows.BLOCKS.items()), 4, 3)
        assert_fits(made, 90, tmp_path)
        assert "ld.global.v4" in made.asm["ptx"]  # 16 bytes at a time


class Device:
    """What tracing asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


X, G = torch.ones(2, 5, 7), torch.ones(2, 5, 3)
CALLS = {
    "gram": (lambda X, G: kernels.gram_squares(X, G, True) + 1, (X, G), 1),
    "norms": (lambda X, G: kernels.weight_gradient_squares(X, G)[1], (X, G), 1),
    "product": (kernels.weight_gradient_squares, (X, G, torch.ones(2, 3, 7)), 2),
    "rows": (kernels.weighted_rows, (X[0], torch.ones(5), torch.ones(7)), 1),
}


@needs_triton
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", CALLS)
def test_traced_without_a_break_and_nothing_is_thought_changed(name, monkeypatch):
    """`torch.compile` sees the kernel itself, and that it writes only to what it writes to."""
    call, arguments, written = CALLS[name]
    monkeypatch.setattr(kernels, "available", lambda t: True)
    monkeypatch.setattr(triton.runtime, "driver", types.SimpleNamespace(active=Device()))
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        values = [node.meta["val"] for node in graph.graph.output_node().args[0]]
        return lambda *_: [torch.zeros(v.shape, dtype=v.dtype) for v in values]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record))(*arguments)
    (graph,) = graphs
    (node,) = [n for n in graph.graph.nodes if "triton_kernel" in str(n.target)]
    assert len(node.kwargs["tensors_to_clone"]) == written
