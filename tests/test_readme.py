"""What README promises: its code runs, and its tables are those of the committed baselines."""

import ast
import re
import sys
import types
from pathlib import Path

import hf
import pytest

from dpsgd import METHODS
from dpsgd.methods import Method
from perf import saved, table
from perf.profiles import Case
from perf.protocol import Prepared

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOOP, OWN, FILE, ROW = re.findall(r"```python\n(.*?)```", README, re.S)


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
    found = [node for node in ast.walk(ast.parse(OWN)) if isinstance(node, ast.stmt)]
    assert sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in found) <= 11


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


PAGES = {"quick": "README.md", "full": "docs/results.md"}


@pytest.mark.parametrize("profile", PAGES)
def test_the_tables_are_those_of_the_baselines(profile):
    run = saved.load(ROOT / ".benchmarks" / "cpu" / f"{profile}.json")
    text = (ROOT / PAGES[profile]).read_text()
    shown = text.partition(f"<!-- {profile} -->\n")[2].partition("<!-- end -->")[0]
    assert shown == table.markdown(run)
