"""What README promises: its code runs, and its tables are those of the committed baselines."""

import ast
import re
import sys
import types
from pathlib import Path

import hf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpsgd import METHODS
from dpsgd.methods import Method
from perf import saved, table
from perf.profiles import Case
from perf.protocol import Prepared

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOOP, OWN, NNX, FILE, ROW = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_training_loop_runs(capsys):
    exec(compile(LOOP, "README.md", "exec"), {})
    assert re.fullmatch(r"ε = 7\.\d\d at δ = 1e-05\n|ε = 8\.00 .*\n", capsys.readouterr().out)


def test_a_model_of_hugging_face_in_ten_lines(capsys):
    model = hf.build("bert")
    before = [p.clone() for p in model.parameters()]
    inputs, labels = hf.batch("bert", 60)
    exec(compile(OWN, "README.md", "exec"), {"model": model, "inputs": inputs, "labels": labels})
    assert "classifier" in capsys.readouterr().out
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
    assert statements(OWN) <= 11


def statements(code):
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    return sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in found)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(8))
        self.one, self.two = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x * self.scale[...])))


def test_a_model_of_nnx_in_ten_lines(capsys):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((600, 8), np.float32)
    given = {"model": Net(nnx.Rngs(0)), "inputs": inputs, "labels": (inputs[:, 0] > 0).astype(int)}
    exec(compile(NNX, "README.md", "exec"), given)
    assert "Net (autodiff)" in capsys.readouterr().out
    assert (given["model"](inputs).argmax(1) == given["labels"]).mean() > 0.8
    assert statements(NNX) <= 11


def test_a_method_is_one_file_and_one_row(monkeypatch):
    row = eval(ROW, {"Method": Method})
    module = types.ModuleType(row.target.partition(":")[0])
    exec(compile(FILE, "README.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, row.name, row)
    case = Case(model="digits-cnn", physical_batch=8, method=row.name, compile=True)
    prepared = Prepared(case, "cpu", ragged=False)
    assert prepared.reference.problem(prepared.step)[0] == ""
    assert len(FILE.strip().splitlines()) < 10


PAGES = {
    "quick": "README.md",
    "full": "docs/results.md",
    "full-torch": "docs/fast.md",
    "full-jax": "docs/fast.md",
}


def baseline(profile):
    return saved.load(ROOT / ".benchmarks" / "cpu" / f"{profile}.json")


def shown(page, name):
    return (ROOT / page).read_text().partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]


@pytest.mark.parametrize("profile", PAGES)
def test_the_tables_are_those_of_the_baselines(profile):
    assert shown(PAGES[profile], profile) == table.markdown(baseline(profile))


def test_the_headline_is_that_of_the_baselines():
    runs = [baseline("full-torch"), baseline("full-jax")]
    assert shown("README.md", "headline") == table.headline(runs)
    methods = {row["method"] for run in runs for row in saved.steps(run)}
    assert {*table.HEADLINE} <= methods
