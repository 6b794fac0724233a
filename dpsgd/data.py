"""
The data sets, framework-free: digits (in scikit-learn), CIFAR-100 (a local folder), synthetic
images and text.

Images stay in memory as they are stored, and one batch at a time is normalised and resized to what
the model takes, so that 50,000 images at 224x224 never exist at once. The constants of the
normalisation are public: nothing is computed from the training data.
"""

import functools
import hashlib
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsgd.models import ModelSpec
from dpsgd.text import labelled_text
from dpsgd.tree import take

_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
_BINARY_ROWS = {"train.bin": 50_000, "test.bin": 10_000}
_ROW_BYTES = 2 + 3 * 32 * 32  # coarse label, fine label, pixels
_LAYOUT = (
    "it must hold cifar-100-python/train and cifar-100-python/test, or "
    "cifar-100-binary/train.bin and cifar-100-binary/test.bin (the unpacked archives of "
    "https://www.cs.toronto.edu/~kriz/cifar.html), or be one of these two folders"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """
    A training and a test set.

    Attributes:
        name: as in :func:`load`.
        train_inputs: as stored, uint8 or float32 [N, c, h, w]; of text a dict of int64 [N, T].
        train_targets: int64 [N].
        test_inputs: as stored, with M rows.
        test_targets: int64 [M].
        num_classes: targets are below it.
        shape: (C, H, W) or (T,) of what :meth:`batch` gives.
        scale: stored values are divided by it, then normalised by ``mean`` and ``std``.
        mean: one for each of the c channels.
        std: one for each of the c channels.
    """

    name: str
    train_inputs: Any
    train_targets: np.ndarray
    test_inputs: Any
    test_targets: np.ndarray
    num_classes: int
    shape: tuple[int, ...]
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def batch(self, indices: np.ndarray) -> tuple[Any, np.ndarray]:
        """Training examples ``indices`` [P]: float32 [P, C, H, W], or text, and int64 [P]."""
        return self._inputs(take(self.train_inputs, indices)), self.train_targets[indices]

    def test_batches(self, size: int) -> Iterator[tuple[Any, np.ndarray]]:
        """The test set in order, at most ``size`` examples at a time, each as by :meth:`batch`."""
        for start in range(0, len(self.test_targets), size):
            part = slice(start, start + size)
            yield self._inputs(take(self.test_inputs, part)), self.test_targets[part]

    def _inputs(self, stored: Any) -> Any:
        return stored if isinstance(stored, dict) else self._images(stored)

    def _images(self, stored: np.ndarray) -> np.ndarray:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        images = (stored.astype(np.float32) / np.float32(self.scale) - mean) / std
        channels, side, _ = self.shape
        if images.shape[-1] != side:
            rows = _interpolation(images.shape[-1], side)
            images = rows @ images @ rows.T
        return images if images.shape[1] == channels else np.repeat(images, channels, axis=1)


@functools.cache
def _interpolation(size: int, new_size: int) -> np.ndarray:
    # Bilinear as a matrix, float32 [new_size, size]; its filter widens where the image shrinks.
    width = max(1.0, size / new_size)
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    weights = np.clip(1 - np.abs(centres[:, None] - np.arange(size)) / width, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def load(
    name: str, spec: ModelSpec, *, data_dir: str | Path | None = None, seed: int = 0
) -> Dataset:
    """
    The data set called ``name``, in the shape that the model ``spec`` takes.

    Args:
        name: ``digits``, ``cifar100`` or ``synthetic``.
        spec: gives the image side and the channels, or the tokens; may have more classes than the
            data.
        data_dir: the folder of CIFAR-100; the others need none.
        seed: of the synthetic data; the split of the digits is always the same one.

    Raises:
        FileNotFoundError: no data in ``data_dir``; the message gives the layout.
        ValueError: unknown name, a damaged file, or data that does not fit the model.
    """
    if spec.is_text and name in ("digits", "cifar100"):
        raise ValueError(f"{name} holds images and {spec.name} takes text: use synthetic")
    if name == "digits":
        dataset = _digits(spec)
    elif name == "cifar100":
        dataset = _cifar100(spec, data_dir)
    elif name == "synthetic":
        dataset = _synthetic_text(spec, seed) if spec.is_text else _synthetic(spec, seed)
    else:
        raise ValueError(f"unknown data {name!r}; use one of digits, cifar100, synthetic")
    if dataset.num_classes > spec.num_classes:
        raise ValueError(
            f"{name} has {dataset.num_classes} classes and {spec.name} only {spec.num_classes}: "
            "choose another model"
        )
    channels = 1 if spec.is_text else dataset.train_inputs.shape[1]
    if channels not in (1, spec.channels):
        raise ValueError(
            f"{name} has {channels} channels and {spec.name} takes {spec.channels}: "
            "choose another model"
        )
    return dataset


def _dataset(train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray], **facts) -> Dataset:
    names = ("train_inputs", "train_targets", "test_inputs", "test_targets")
    return Dataset(**dict(zip(names, (*train, *test), strict=True)), **facts)


def _digits(spec: ModelSpec) -> Dataset:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = found.images.astype(np.uint8)[:, None]
    targets = found.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(targets))
    train, test = order[:1437], order[1437:]
    return _dataset(
        (images[train], targets[train]),
        (images[test], targets[test]),
        name="digits",
        num_classes=10,
        shape=spec.input_shape,
        scale=16.0,
        mean=(0.305,),
        std=(0.376,),
    )


def _synthetic(spec: ModelSpec, seed: int) -> Dataset:
    # One random 8x8 pattern per class plus as much noise: learnable, and small at any image side.
    rng = np.random.default_rng(seed)
    shape = (spec.channels, 8, 8)
    patterns = rng.standard_normal((spec.num_classes, *shape), np.float32)

    def sample(count):
        targets = rng.integers(0, spec.num_classes, count)
        return patterns[targets] + rng.standard_normal((count, *shape), np.float32), targets

    return _dataset(
        sample(2000),
        sample(500),
        name="synthetic",
        num_classes=spec.num_classes,
        shape=spec.input_shape,
        mean=(0.0,) * spec.channels,
        std=(2**0.5,) * spec.channels,
    )


def _synthetic_text(spec: ModelSpec, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    return _dataset(
        labelled_text(spec, 2000, rng),
        labelled_text(spec, 500, rng),
        name="synthetic",
        num_classes=spec.num_classes,
        shape=spec.input_shape,
    )


def _cifar100(spec: ModelSpec, data_dir: str | Path | None) -> Dataset:
    if data_dir is None:
        raise FileNotFoundError(f"cifar100 needs a data folder (--data-dir): {_LAYOUT}")
    train, test = _cifar100_files(Path(data_dir))
    read = _read_binary if train.suffix else _read_python
    return _dataset(
        read(train),
        read(test),
        name="cifar100",
        num_classes=100,
        shape=spec.input_shape,
        scale=255.0,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


def _cifar100_files(root: Path) -> tuple[Path, Path]:
    for folder, names in (("cifar-100-python", _MD5), ("cifar-100-binary", _BINARY_ROWS)):
        for place in (root / folder, root):
            train, test = (place / name for name in names)
            if train.is_file() and test.is_file():
                return train, test
    raise FileNotFoundError(f"no CIFAR-100 in {root}: {_LAYOUT}")


def _read_python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = file.read_bytes()
    has, expected = hashlib.md5(content, usedforsecurity=False).hexdigest(), _MD5[file.name]
    if has != expected:
        raise ValueError(f"{file} has MD5 {has}, not {expected}: download and unpack it again")
    found = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    images = np.asarray(found[b"data"], np.uint8).reshape(-1, 3, 32, 32)
    return images, np.array(found[b"fine_labels"], np.int64)


def _read_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    # No checksum of the unpacked binary files is published: the exact size and the labels' range
    # are what can be checked.
    rows, size = _BINARY_ROWS[file.name], file.stat().st_size
    if size != rows * _ROW_BYTES:
        raise ValueError(
            f"{file} has {size} bytes, not {rows * _ROW_BYTES}: download and unpack it again"
        )
    content = np.fromfile(file, np.uint8).reshape(rows, _ROW_BYTES)
    targets = content[:, 1].astype(np.int64)
    if targets.max() >= 100:
        raise ValueError(f"{file} has the label {targets.max()}: it is not CIFAR-100's binary file")
    return content[:, 2:].reshape(-1, 3, 32, 32), targets


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle may call anything it names, and MD5 can be forged: only arrays are let through."""

    def find_class(self, module: str, name: str):
        reconstruct = np.empty(0).__reduce__()[0]  # its module moved between NumPy 1 and 2
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise ValueError(f"the pickle asks for {module}.{name}, which no array needs: refused")
        return allowed[module, name]
