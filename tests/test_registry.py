"""The registry, the model table, and that importing the package imports no framework."""

import subprocess
import sys

import pytest

from dpsgd import METHODS, methods, models


def test_import_is_light():
    code = "import sys, dpsgd; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_give_the_nearest():
    with pytest.raises(KeyError, match="torch-opacus"):
        methods.get("torch-opacuss")
    with pytest.raises(KeyError, match="vit-ti16"):
        models.get("vit-ti")


def test_every_row_names_an_sgd_of_its_framework():
    for name, row in METHODS.items():
        assert name == row.name
        assert METHODS[row.baseline].framework == row.framework
        assert not METHODS[row.baseline].private


def test_a_missing_package_is_named():
    row = methods.Method(
        name="torch-x", target="x:X", baseline="torch-sgd", source="", requires=("no_such_package",)
    )
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        row.build(None, None, None)


def test_overrides_cut_a_model_and_stay_in_its_name():
    spec = models.get("vit-b16-4blocks-64px")
    assert (spec.blocks, spec.image_size, spec.width) == (4, 64, 768)
    assert spec.name == "vit-b16-4blocks-64px"
    with pytest.raises(ValueError, match="no multiple of the patch"):
        models.get("vit-ti16-65px")
    with pytest.raises(ValueError, match="takes no override"):
        models.get("digits-cnn-16px")
