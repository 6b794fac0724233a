"""The data sets: shapes, splits, resizing, and files that are not what they should be."""

import hashlib
import io
import os
import pickle
from typing import ClassVar

import numpy as np
import pytest

from dpsgd import data, models

DIGITS, VIT = models.get("digits-cnn"), models.get("vit-ti16-32px")


class Python2Pickler(pickle._Pickler):
    """Writes every string as Python 2 did, which is how CIFAR-100 was written."""

    def save_string(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + len(value).to_bytes(4, "little") + value)

    dispatch: ClassVar = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def python2(value):
    sink = io.BytesIO()
    Python2Pickler(sink, protocol=2).dump(value)
    return sink.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, 100, count)


def write_python(folder, monkeypatch, dump=python2):
    folder.mkdir()
    for name, count in (("train", 6), ("test", 3)):
        pixels, fine = rows(count)
        content = {b"data": pixels, b"fine_labels": fine.tolist(), b"coarse_labels": [0] * count}
        (folder / name).write_bytes(dump(content))
        sum_ = hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(data._MD5, name, sum_)


def write_binary(folder, monkeypatch):
    folder.mkdir()
    for name, count in (("train.bin", 6), ("test.bin", 3)):
        pixels, fine = rows(count)
        labels = np.stack([np.full(count, 7), fine], 1).astype(np.uint8)
        np.concatenate([labels, pixels], 1).tofile(folder / name)
        monkeypatch.setitem(data._BINARY_ROWS, name, count)


def test_digits_have_their_fixed_split():
    found = data.load("digits", DIGITS)
    assert (len(found.train_targets), len(found.test_targets)) == (1437, 360)
    inputs, targets = found.batch(np.arange(1437))
    assert inputs.shape == (1437, 1, 8, 8)
    assert (inputs.dtype, targets.dtype) == (np.float32, np.int64)
    assert found.num_classes == 10
    assert set(targets) == set(range(10))
    # The constants are public, and right.
    assert abs(inputs.mean()) < 0.02
    assert abs(inputs.std() - 1) < 0.02
    other = data.load("digits", DIGITS, seed=5)
    np.testing.assert_array_equal(other.train_inputs, found.train_inputs)


def test_the_split_of_the_digits_is_disjoint_and_complete():
    from sklearn.datasets import load_digits

    found = data.load("digits", DIGITS)
    parts = [part.reshape(len(part), -1) for part in (found.train_inputs, found.test_inputs)]
    every = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, np.concatenate(parts))) == sorted(map(bytes, every))
    assert len(np.unique(every, axis=0)) == len(every)  # so complete also means disjoint


def test_images_are_enlarged_and_their_channels_repeated():
    small, large = (data.load("digits", spec).batch(np.arange(3))[0] for spec in (DIGITS, VIT))
    assert large.shape == (3, 3, 32, 32)
    assert large.dtype == np.float32
    np.testing.assert_array_equal(large[:, 0], large[:, 2])
    np.testing.assert_allclose(large[..., 0, 0], np.repeat(small[..., 0, 0], 3, 1), atol=1e-6)
    assert small.min() - 1e-5 <= large.min() < large.max() <= small.max() + 1e-5


@pytest.mark.parametrize(("size", "new"), [(8, 16), (32, 224), (8, 20), (32, 16)])
def test_interpolation_keeps_constants_and_slopes(size, new):
    matrix = data._interpolation(size, new)
    np.testing.assert_allclose(matrix @ np.ones(size), 1, rtol=1e-6)
    slope = (matrix @ np.arange(size))[new // 4 : -new // 4]
    np.testing.assert_allclose(np.diff(slope), size / new, rtol=1e-4)


def test_the_test_set_comes_in_chunks():
    found = data.load("digits", DIGITS)
    chunks = list(found.test_batches(100))
    assert [len(inputs) for inputs, _ in chunks] == [100, 100, 100, 60]
    np.testing.assert_array_equal(np.concatenate([t for _, t in chunks]), found.test_targets)


def test_synthetic_data_follow_their_seed_and_can_be_learned():
    first, again, other = (data.load("synthetic", VIT, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.train_inputs, again.train_inputs)
    np.testing.assert_array_equal(first.test_targets, again.test_targets)
    assert not np.array_equal(first.train_inputs, other.train_inputs)
    assert (len(first.train_targets), len(first.test_targets)) == (2000, 500)
    assert first.batch(np.arange(2))[0].shape == (2, 3, 32, 32)
    means = np.stack([first.train_inputs[first.train_targets == c].mean(0) for c in range(100)])
    distances = ((first.test_inputs[:, None] - means) ** 2).sum((2, 3, 4))
    assert np.mean(distances.argmin(1) == first.test_targets) > 0.95


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("folder", "write"),
    [("cifar-100-python", write_python), ("cifar-100-binary", write_binary)],
)
def test_both_formats_of_cifar100_are_read(tmp_path, monkeypatch, folder, write, inside):
    write(tmp_path / folder, monkeypatch)
    found = data.load("cifar100", VIT, data_dir=tmp_path / folder if inside else tmp_path)
    pixels, fine = rows(6)
    inputs, targets = found.batch(np.arange(6))
    np.testing.assert_array_equal(targets, fine)
    assert targets.dtype == np.int64
    assert inputs.shape == (6, 3, 32, 32)
    red = (pixels[:, :1024].reshape(6, 32, 32) / 255 - 0.5071) / 0.2673
    np.testing.assert_allclose(inputs[:, 0], red, rtol=1e-4, atol=1e-5)
    assert found.train_inputs.dtype == np.uint8
    assert len(found.test_targets) == 3
    assert found.num_classes == 100


def test_arrays_pickled_by_python_3_are_read(tmp_path, monkeypatch):
    write_python(tmp_path / "x", monkeypatch, dump=lambda value: pickle.dumps(value, protocol=3))
    found = data.load("cifar100", VIT, data_dir=tmp_path / "x")
    np.testing.assert_array_equal(found.train_targets, rows(6)[1])


@pytest.mark.parametrize("given", [True, False])
def test_missing_files_are_reported_with_the_layout(tmp_path, given):
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python/train .*train\.bin"):
        data.load("cifar100", VIT, data_dir=tmp_path if given else None)


def test_a_wrong_checksum_names_the_file_and_both_sums(tmp_path, monkeypatch):
    write_python(tmp_path / "x", monkeypatch)
    expected = data._MD5["test"]
    (tmp_path / "x" / "test").write_bytes(b"damaged")
    has = hashlib.md5(b"damaged", usedforsecurity=False).hexdigest()
    with pytest.raises(ValueError, match=f"test has MD5 {has}, not {expected}"):
        data.load("cifar100", VIT, data_dir=tmp_path / "x")


def test_a_wrong_size_and_a_wrong_label_are_refused(tmp_path, monkeypatch):
    write_binary(tmp_path / "x", monkeypatch)
    file = tmp_path / "x" / "test.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"test\.bin has 9221 bytes, not 9222"):
        data.load("cifar100", VIT, data_dir=tmp_path / "x")
    file.write_bytes(content[:1] + b"\xff" + content[2:])
    with pytest.raises(ValueError, match="label 255"):
        data.load("cifar100", VIT, data_dir=tmp_path / "x")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_calls_something_is_refused(tmp_path, monkeypatch):
    made = str(tmp_path / "made")
    write_python(tmp_path / "x", monkeypatch, dump=lambda _: pickle.dumps(Malicious(made)))
    with pytest.raises(ValueError, match=r"asks for \w+\.mkdir.*refused"):
        data.load("cifar100", VIT, data_dir=tmp_path / "x")
    assert not os.path.exists(made)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="digits, cifar100, synthetic"):
        data.load("mnist", DIGITS)
    write_python(tmp_path / "x", monkeypatch)
    with pytest.raises(ValueError, match="100 classes and digits-cnn only 10"):
        data.load("cifar100", DIGITS, data_dir=tmp_path / "x")
    with pytest.raises(ValueError, match="3 channels and digits-cnn takes 1"):
        data.load("cifar100", DIGITS.replace(num_classes=100), data_dir=tmp_path / "x")
