"""
Train one model with one method: ``python -m dpsgd.train``, or :func:`train` from Python.

By default nothing that depends on the training data is shown: no training loss, no size of a draw.
Only the final model, seen through the test accuracy, is released, and ε is stated for it. How long
a step takes is a side channel outside that statement.
"""

import argparse
import dataclasses
import importlib
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from dpsgd import data as datasets
from dpsgd import loop, methods, models
from dpsgd.checkpoint import Folder, Keys
from dpsgd.loop import Interrupted, Unsaved
from dpsgd.memory import keep_freed_memory
from dpsgd.methods import METHODS, Method, Step
from dpsgd.privacy import PrivacyConfig
from dpsgd.ranks import Disagreement, Ranks, digest, joined
from dpsgd.sampling import PLACEMENTS, check_arguments, rank_batches

_TEST_CHUNK = 256  # images in memory at once, and for which the other ranks have patience


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    What a run gives.

    Attributes:
        test_accuracy: in [0, 1]; of rank 0, nan on the others.
        epsilon: spent by all steps; inf at σ = 0 and for a method without privacy; as above.
        delta: δ that ``epsilon`` belongs to.
        neighbours: the relation that ``epsilon`` is stated for.
        accountant: how ``epsilon`` was computed.
        noise_multiplier: σ, given or calibrated; 0 for a method without privacy.
        steps: those that are charged: T, and more where a resumed run had lost its keys.
        seconds: wall time of the steps alone.
        seeded: whether draws and noise came from a seed: ε holds for nobody who knows it.
        step: holds the trained model (``step.model``, ``step.parameters()``).
    """

    test_accuracy: float
    epsilon: float
    delta: float
    neighbours: str
    accountant: str
    noise_multiplier: float
    steps: int
    seconds: float
    seeded: bool
    step: Step


def train(
    *,
    method: str = "torch-bookkeeping",
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
    placement: str = "round-robin",
    noise_placement: str = "split",
    sync: str = "once",
    timeout_s: float = 40.0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    report: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Result:
    """
    Train, and measure the accuracy on the test set; on all ranks where torchrun started several.

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
        placement: ``round-robin`` deals one global draw to the ranks; with ``shard`` each draws
            from a part of the data of its own.
        noise_placement: ``split`` over the ranks, or all on ``rank0``.
        sync: SGD sums over ranks ``once`` per logical batch, or at ``every`` physical batch.
        timeout_s: of :class:`dpsgd.watch.Watch`, which ends all ranks where one dies or hangs.
        checkpoint: a folder that the run can be resumed from; it holds its secret keys too.
        checkpoint_every: updates from one checkpoint to the next.
        resume: go on with the run in ``checkpoint``, or begin it if it holds none.
        report: called with one line of diagnostics per step, which depends on the training data
            and is outside the privacy guarantee.
        progress: show a progress bar on stderr.

    Raises:
        KeyError, ValueError, ModuleNotFoundError, OSError: an option cannot work; the message says
            why.
        Unsaved: the folder cannot be written any more; the message says what was spent.
        Interrupted: Ctrl-C after the first step had begun.
    """
    row, spec = methods.get(method), models.get(model)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; it must be finite and above 0")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    if resume and checkpoint is None:
        raise ValueError("resume needs the checkpoint folder of the run")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}; it must be at least 1")
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s is {timeout_s}; it must be finite and above 0")
    public = {
        "method": method,
        "model": model,
        "data": data,
        "weights": weights and str(weights),
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "physical_batch_size": physical_batch_size,
        "precision": precision,
        "compile": compile,
        "placement": placement,
        "noise_placement": noise_placement,
        "sync": sync,
    }
    dataset = datasets.load(data, spec, data_dir=data_dir)
    num_examples = len(dataset.train_targets)
    check_arguments(num_examples, sample_rate, physical_batch_size, steps)
    framework = _framework(row)
    tally = loop.Tally()
    with tally.stated(), joined(row.framework, device, timeout_s) as ranks:
        place = _device(row, device)  # JAX must not look for devices before it has joined
        net = framework.build(
            spec.replace(num_classes=dataset.num_classes),
            seed=seed or 0,
            weights=weights,
            device=place,
        )
        config = _config(
            row,
            epsilon,
            noise_multiplier,
            ranks,
            num_examples=num_examples,
            sample_rate=sample_rate,
            clip_norm=clip_norm,
            steps=steps,
            delta=delta,
        )
        folder = None
        if checkpoint is not None:
            public |= {"device": place, **dataclasses.asdict(config)}
            folder = Folder(checkpoint, ranks, public, resume=resume)
        tally.open(folder, config, seed is not None)
        shares = _shares(row, place, ranks)
        keys = folder.keys(seed, shares, _digest(dataset)) if folder else Keys.fresh(ranks, seed)
        draws = rank_batches(
            num_examples,
            sample_rate,
            physical_batch_size,
            steps,
            ranks=ranks,
            seed=keys.sampling,
            placement=placement,
            even=sync == "every",
            padded=row.pads(compile),
            done=folder.done if folder else 0,
        )
        alone = row.framework == "jax" and not row.static_shapes and ranks.world == 1
        many = {"ranks": ranks, "noise_placement": noise_placement, "sync": sync}
        step = row.build(
            net,
            framework.optimizer(net, optimizer, learning_rate),
            config,
            loss=framework.cross_entropy,
            physical_batch_size=physical_batch_size,
            precision=precision,
            compile=compile,
            seed=keys.noise,
            **({} if alone else many),
        )
        if folder:
            folder.restore(step)
        seconds = loop.run(
            step,
            draws,
            dataset,
            config,
            ranks=ranks,
            tally=tally,
            folder=folder,
            every=checkpoint_every,
            report=report if row.private and ranks.rank == 0 else None,
            progress=progress and ranks.rank == 0,
        )
        accuracy = spent = math.nan
        if ranks.rank == 0:
            accuracy = _accuracy(framework, step, dataset, ranks)
            with ranks.busy():
                spent = config.epsilon(tally.steps) if row.private else math.inf
        with ranks.waiting("the evaluation"):  # none leaves before
            ranks.exchange("evaluated", "", timeout_s=math.inf)
        return Result(
            test_accuracy=accuracy,
            epsilon=spent,
            delta=delta,
            neighbours=config.neighbours,
            accountant="PLD",
            noise_multiplier=config.noise_multiplier,
            steps=tally.steps,
            seconds=seconds,
            seeded=tally.seeded,
            step=step,
        )


def _shares(row: Method, device: str, ranks: Ranks) -> int:
    # Devices that the noise is split over: in JAX, one process may drive several.
    if row.framework == "torch" or not row.static_shapes:
        return ranks.world
    import jax

    return len(jax.devices(device))


def _framework(row: Method) -> ModuleType:
    try:
        return importlib.import_module(f"dpsgd.{row.framework}.models")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{row.name} needs {error.name}: pip install 'dpsgd[{row.framework}]'"
        ) from error


def _device(row: Method, device: str | None) -> str:
    if row.framework == "torch":
        from dpsgd.torch.distributed import best_device

        return best_device(device)
    import jax

    try:
        return jax.devices(device)[0].platform
    except RuntimeError as error:
        if device is None:
            raise
        raise ValueError(f"JAX finds no {device} device here: drop --device") from error


def _config(
    row: Method,
    epsilon: float | None,
    noise_multiplier: float | None,
    ranks: Ranks,
    **public,
) -> PrivacyConfig:
    if epsilon is not None and noise_multiplier is not None:
        raise ValueError("epsilon and noise_multiplier are both given: choose one")
    if not row.private:  # only q, N and T matter to it
        return PrivacyConfig(noise_multiplier=0.0, **public)
    if noise_multiplier is not None:
        return PrivacyConfig(noise_multiplier=noise_multiplier, **public)
    config = None
    if ranks.rank == 0:  # one rank calibrates, for all
        with ranks.busy():
            config = PrivacyConfig.for_epsilon(8.0 if epsilon is None else epsilon, **public)
    sigma = config.noise_multiplier if config else math.nan
    (first, *_) = ranks.exchange("noise multiplier", repr(sigma), timeout_s=600)
    return config or PrivacyConfig(noise_multiplier=float(first), **public)


def _digest(dataset: datasets.Dataset) -> int:
    # Of the training data, and so a secret of theirs.
    inputs = dataset.train_inputs
    parts = [*inputs.values()] if isinstance(inputs, dict) else [inputs]
    return digest(*parts, dataset.train_targets)


def _accuracy(framework: ModuleType, step: Step, dataset: datasets.Dataset, ranks: Ranks) -> float:
    right = 0
    for inputs, targets in dataset.test_batches(_TEST_CHUNK):
        with ranks.busy():  # others wait, for so long at most for each chunk
            right += int((framework.predict(step, inputs) == targets).sum())
    return right / len(dataset.test_targets)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpsgd.train",
        description="Train one model with DP-SGD and state its test accuracy and its ε.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", default="torch-bookkeeping", help=", ".join(METHODS))
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
    add("--placement", default="round-robin", choices=PLACEMENTS, help="of the draw on the ranks")
    add("--noise-placement", default="split", choices=("split", "rank0"), help="over the ranks")
    add("--sync", default="once", choices=("once", "every"), help="every physical batch: SGD's")
    add("--timeout", dest="timeout_s", type=float, default=40.0, help="s without a sign of a rank")
    add("--checkpoint", help="folder to resume from; its files 'keys*' are secrets")
    add("--checkpoint-every", type=int, default=10, help="updates from one checkpoint to the next")
    add("--resume", action="store_true", help="go on with the run in --checkpoint, if there is one")
    add(
        "--diagnostics",
        action="store_true",
        help="show the size of each draw and the clipped fraction: outside the privacy guarantee",
    )
    return parser


def _statement(args: argparse.Namespace, epsilon: float, steps: int, seeded: bool) -> str:
    if not METHODS[args.method].private:
        return "no privacy: plain SGD"
    spent = loop.statement(
        epsilon,
        delta=args.delta,
        neighbours="add_remove",
        sample_rate=args.sample_rate,
        steps=steps,
    )
    fixed = "\nthe seed is fixed: this ε holds for nobody who knows it"
    return spent + seeded * fixed


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, 2 if an option cannot work, 70 if the run fails, 130 by Ctrl-C."""
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
    except (Disagreement, TimeoutError, Unsaved) as error:
        print(f"dpsgd.train: {error}", file=sys.stderr)
        return 70
    except (ValueError, KeyError, ModuleNotFoundError, OSError) as error:
        words = error.args[0] if isinstance(error, KeyError) else error
        print("dpsgd.train:", " ".join(str(words).split()), file=sys.stderr)
        return 2
    except Interrupted as stop:
        if Ranks.from_env().rank:
            return 130
        print(f"interrupted after {stop.steps} of {args.steps} steps")
        print(f"spent so far: {_statement(args, stop.epsilon, stop.steps, stop.seeded)}")
        return 130
    except KeyboardInterrupt:
        print("interrupted before the first step: nothing is spent")
        return 130
    if Ranks.from_env().rank:
        return 0
    if METHODS[args.method].private:
        print(f"σ = {result.noise_multiplier:.4g}, C = {args.clip_norm:g}")
    print(f"test accuracy {result.test_accuracy:.4f}")
    print(_statement(args, result.epsilon, result.steps, result.seeded))
    if args.diagnostics:
        print("diagnostics were shown: this run is outside the privacy guarantee")
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
