"""
Train one model with one method: ``python -m dpsgd.train``, or :func:`train` from Python.

By default nothing that depends on the training data is shown: no training loss, no size of a draw.
Only the final model, seen through the test accuracy, is released, and ε is stated for it. How long
a step takes is a side channel outside that statement.
"""

import argparse
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from dpsgd import data as datasets
from dpsgd import methods, models, privacy
from dpsgd.methods import METHODS, Method, Step
from dpsgd.privacy import PrivacyConfig
from dpsgd.sampling import poisson_batches

_RELATIONS = {"add_remove": "add/remove one", "replace_one": "replace one"}
_TEST_CHUNK = 1024  # images in memory at once: 0.6 GB at 3x224x224


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    What a run gives.

    Attributes:
        test_accuracy: in [0, 1].
        epsilon: spent by all steps; inf at σ = 0 and for a method without privacy.
        delta: δ that ``epsilon`` belongs to.
        neighbours: the relation that ``epsilon`` is stated for.
        accountant: how ``epsilon`` was computed.
        noise_multiplier: σ, given or calibrated; 0 for a method without privacy.
        seconds: wall time of the steps alone.
        step: holds the trained model (``step.model``, ``step.parameters()``).
    """

    test_accuracy: float
    epsilon: float
    delta: float
    neighbours: str
    accountant: str
    noise_multiplier: float
    seconds: float
    step: Step


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during the steps: ``steps`` updates were begun, which spent ``epsilon``."""

    def __init__(self, steps: int, epsilon: float):
        super().__init__(steps, epsilon)
        self.steps, self.epsilon = steps, epsilon


def train(
    *,
    method: str = "torch-vmap",
    model: str = "digits-cnn",
    data: str = "digits",
    data_dir: str | Path | None = None,
    weights: str | Path | None = None,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float = 1e-5,
    sample_rate: float = 256 / 1437,
    steps: int = 200,
    clip_norm: float = 1.0,
    optimizer: str = "adam",
    learning_rate: float = 0.01,
    physical_batch_size: int = 64,
    seed: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
    compile: bool = False,
    report: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Result:
    """
    Train, and measure the accuracy on the test set.

    Args:
        method: a name of :data:`dpsgd.METHODS`.
        model: a name of :data:`dpsgd.models.MODELS`, with overrides or not.
        data: ``digits``, ``cifar100`` or ``synthetic``, which is text for a text model.
        data_dir: the folder of CIFAR-100.
        weights: a local checkpoint folder to start from.
        epsilon: the ε to spend, from which σ is calibrated; 8 if neither it nor σ is given.
        noise_multiplier: σ itself, instead of ``epsilon``.
        delta: δ.
        sample_rate: q.
        steps: T.
        clip_norm: C.
        optimizer: ``adam`` or ``sgd``.
        learning_rate: of the optimizer.
        physical_batch_size: P, examples on the device at once; no effect on the result or on ε.
        seed: None draws from the operating system. A number makes the run repeatable, and voids
            the guarantee, since whoever knows it knows the noise.
        device: ``cpu``, ``cuda`` or None for the best one there is.
        precision: ``fp32``, ``tf32`` or ``bf16``.
        compile: torch.compile; JAX always compiles.
        report: called with one line of diagnostics per step, which depends on the training data
            and is outside the privacy guarantee.
        progress: show a progress bar on stderr.

    Raises:
        KeyError, ValueError, FileNotFoundError, ModuleNotFoundError: an option cannot work; the
            message says why.
        Interrupted: Ctrl-C after the first step had begun.
    """
    row, spec = methods.get(method), models.get(model)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; it must be finite and above 0")
    sampling_seed, noise_seed = _seeds(seed)
    dataset = datasets.load(data, spec, data_dir=data_dir)
    framework = _framework(row)
    net = framework.build(
        spec.replace(num_classes=dataset.num_classes),
        seed=seed or 0,
        weights=weights,
        device=_device(row, device),
    )
    draws = poisson_batches(
        len(dataset.train_targets),
        sample_rate,
        physical_batch_size,
        steps,
        seed=sampling_seed,
        padded=not row.accepts_ragged,
    )
    config = _config(
        row,
        epsilon,
        noise_multiplier,
        num_examples=len(dataset.train_targets),
        sample_rate=sample_rate,
        clip_norm=clip_norm,
        steps=steps,
        delta=delta,
    )
    step = row.build(
        net,
        framework.optimizer(net, optimizer, learning_rate),
        config,
        loss=framework.cross_entropy,
        physical_batch_size=physical_batch_size,
        precision=precision,
        compile=compile,
        seed=noise_seed,
    )
    seconds = _run(step, draws, dataset, config, report if row.private else None, progress)
    return Result(
        test_accuracy=_accuracy(framework, step, dataset),
        epsilon=config.epsilon() if row.private else math.inf,
        delta=delta,
        neighbours=config.neighbours,
        accountant="PLD",
        noise_multiplier=config.noise_multiplier,
        seconds=seconds,
        step=step,
    )


def _seeds(seed: int | None) -> tuple[np.random.SeedSequence | None, int | None]:
    # Of the sampling and of the noise: independent streams, both from the system without a seed.
    if seed is None:
        return None, None
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    sampling, noise = np.random.SeedSequence(seed).spawn(2)
    return sampling, int(noise.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _framework(row: Method) -> ModuleType:
    try:
        return importlib.import_module(f"dpsgd.{row.framework}.models")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{row.name} needs {error.name}: pip install 'dpsgd[{row.framework}]'"
        ) from error


def _device(row: Method, device: str | None) -> str | None:
    if row.framework == "torch":
        import torch

        there = torch.cuda.is_available()
        device = device or ("cuda" if there else "cpu")
        if device == "cuda" and not there:
            raise ValueError("torch finds no CUDA device here: use --device cpu")
    elif device:
        import jax

        try:
            jax.devices(device)
        except RuntimeError as error:
            raise ValueError(f"JAX finds no {device} device here: drop --device") from error
    return device


def _config(
    row: Method, epsilon: float | None, noise_multiplier: float | None, **public
) -> PrivacyConfig:
    if epsilon is not None and noise_multiplier is not None:
        raise ValueError("epsilon and noise_multiplier are both given: choose one")
    if not row.private:  # only q, N and T matter to it
        return PrivacyConfig(noise_multiplier=0.0, **public)
    if noise_multiplier is not None:
        return PrivacyConfig(noise_multiplier=noise_multiplier, **public)
    return PrivacyConfig.for_epsilon(8.0 if epsilon is None else epsilon, **public)


def _run(step, draws, dataset, config, report, progress) -> float:
    # All logical steps; the seconds they took.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    begun = 0
    start = time.perf_counter()
    try:
        with Progress(
            "steps",
            BarColumn(),
            MofNCompleteColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not progress,
        ) as bar:
            for number, logical in enumerate(bar.track(draws, total=config.steps), 1):
                if report:
                    report(f"step {number}: B = {logical.size}")
                for i, physical in enumerate(logical):
                    inputs, targets = dataset.batch(physical.indices)
                    placed = step.put(inputs, targets, physical.mask)
                    if report and i == 0:
                        clipped = step.norms(*placed)[physical.mask] > config.clip_norm
                        report(f"step {number}: clipped fraction {np.mean(clipped):.2f} (one P)")
                    step.accumulate(*placed)
                begun += 1  # before the update: interrupted in it, the noisy sum may be out already
                step.update()
            step.synchronize()
    except KeyboardInterrupt:
        raise Interrupted(begun, _spent(config, begun)) from None
    return time.perf_counter() - start


def _spent(config: PrivacyConfig, steps: int) -> float:
    if steps == 0:
        return 0.0
    return privacy.epsilon(
        sample_rate=config.sample_rate,
        noise_multiplier=config.noise_multiplier,
        steps=steps,
        delta=config.delta,
        neighbours=config.neighbours,
    )


def _accuracy(framework: ModuleType, step: Step, dataset: datasets.Dataset) -> float:
    right = sum(
        int((framework.predict(step, inputs) == targets).sum())
        for inputs, targets in dataset.test_batches(_TEST_CHUNK)
    )
    return right / len(dataset.test_targets)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpsgd.train",
        description="Train one model with DP-SGD and state its test accuracy and its ε.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", default="torch-vmap", help=", ".join(METHODS))
    add("--model", default="digits-cnn", help=", ".join(models.MODELS))
    add("--data", default="digits", choices=("digits", "cifar100", "synthetic"), help="data set")
    add("--data-dir", help="folder of CIFAR-100")
    add("--weights", help="checkpoint folder to start from (*.safetensors)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epsilon", type=float, help="ε to spend; 8 where σ is not given either")
    budget.add_argument("--noise-multiplier", type=float, help="σ itself; 0 means no privacy")
    add("--delta", type=float, default=1e-5, help="δ, below 1/N")
    add("--sample-rate", type=float, default=256 / 1437, help="q, of each example in each step")
    add("--steps", type=int, default=200, help="T, logical steps")
    add("--clip-norm", type=float, default=1.0, help="C, bound on each example's gradient")
    add("--optimizer", default="adam", choices=("adam", "sgd"), help="what the gradient drives")
    add("--learning-rate", type=float, default=0.01, help="of the optimizer")
    add("--physical-batch-size", type=int, default=64, help="P, on the device at once; not in ε")
    add("--seed", type=int, help="makes the run repeatable and voids the guarantee; for tests")
    add("--device", choices=("cpu", "cuda"), help="None: the best one there is")
    add("--precision", default="fp32", choices=("fp32", "tf32", "bf16"), help="of the arithmetic")
    add("--compile", action="store_true", help="torch.compile; JAX always compiles")
    add(
        "--diagnostics",
        action="store_true",
        help="show the size of each draw and the clipped fraction: outside the privacy guarantee",
    )
    return parser


def _rounded_up(epsilon: float) -> str:
    # ε is an upper bound and stays one when it is shown.
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "inf"


def _statement(args: argparse.Namespace, epsilon: float, steps: int) -> str:
    if not METHODS[args.method].private:
        return "no privacy: plain SGD"
    return (
        f"ε = {_rounded_up(epsilon)} at δ = {args.delta:g} "
        f"({_RELATIONS['add_remove']}, Poisson q={args.sample_rate:.4g}, T={steps}, PLD)"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, 2 if an option cannot work, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _main(args)


def _warn(message, *_, **__) -> None:
    print("dpsgd.train: warning:", message, file=sys.stderr)


def _main(args: argparse.Namespace) -> int:
    options = {name: value for name, value in vars(args).items() if name != "diagnostics"}
    try:
        result = train(
            **options,
            report=print if args.diagnostics else None,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, KeyError, FileNotFoundError, ModuleNotFoundError) as error:
        words = error.args[0] if isinstance(error, KeyError) else error
        print("dpsgd.train:", " ".join(str(words).split()), file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"interrupted after {stop.steps} of {args.steps} steps")
        print(f"spent so far: {_statement(args, stop.epsilon, stop.steps)}")
        return 130
    except KeyboardInterrupt:
        print("interrupted before the first step: nothing is spent")
        return 130
    if METHODS[args.method].private:
        print(f"σ = {result.noise_multiplier:.4g}, C = {args.clip_norm:g}")
    print(f"test accuracy {result.test_accuracy:.4f}")
    print(_statement(args, result.epsilon, args.steps))
    if args.seed is not None and METHODS[args.method].private:
        print("the seed is fixed: this ε holds for nobody who knows it")
    if args.diagnostics:
        print("diagnostics were shown: this run is outside the privacy guarantee")
    return 0


if __name__ == "__main__":
    sys.exit(main())
