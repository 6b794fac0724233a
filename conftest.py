"""Options of the benchmarks, registered here so that pytest knows them wherever it starts."""


def pytest_addoption(parser):
    """Options of `python -m pytest perf`, and of the perf sessions of nox after `--`."""
    group = parser.getgroup("perf", "DP-SGD benchmarks")
    names = "smoke, quick (default), full, full-torch, full-jax, gpu, gpu-torch, gpu-jax"
    group.addoption("--profile", default=None, help=names)
    group.addoption("--methods", default=None, help="comma-separated; default: all registered")
    group.addoption(
        "--models", default=None, help="comma-separated, overrides too: vit-b16-4blocks"
    )
    group.addoption("--precision", default=None, help="comma-separated: fp32, tf32, bf16")
    group.addoption("--compile", default=None, help="torch mode: eager, compiled or both")
    group.addoption(
        "--rounds", type=int, default=None, help="timed rounds of each case: 9, or 3 of long steps"
    )
    group.addoption("--device", default="auto", help="auto, cpu or cuda")
    group.addoption("--data-dir", default=None, help="CIFAR-100's folder: load it, not digits")
    group.addoption("--save-baseline", action="store_true", help="save as the profile's baseline")
    group.addoption(
        "--resume",
        action="store_true",
        help="keep each finished case, take over those of an earlier call, measure the rest",
    )
    group.addoption(
        "--any-commit", action="store_true", help="with --resume: also those of another commit"
    )
    group.addoption("--framework", default=None, help="torch or jax: one, in this process")
