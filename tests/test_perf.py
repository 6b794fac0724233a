"""The measurements: pairing, rows, checks, comparison, what is saved when things fail."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpsgd import METHODS, methods
from perf import check, compare, outcome, protocol, runner, saved, table
from perf.profiles import PROFILES, Case, cases

ROOT = Path(__file__).parent.parent
CNN = Case(model="digits-cnn", physical_batch=64, method="torch-vmap")


# Pairing


class Clock:
    """Time that passes only when a step runs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeStep:
    compiles = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda: None)
    accumulate = staticmethod(lambda *_: None)
    update = staticmethod(lambda: None)
    parameters = staticmethod(lambda: {"w": np.zeros(1)})


def fake_prepared(clock, seconds_per_example, drift):
    """A machine that grows slower all the time; a method costs a multiple of SGD on it."""

    class Prepared:
        def __init__(self, case, device, *, ragged, checked=True):
            self.case, self.step = case, FakeStep()
            self.sizes, self.padding_fraction = [500, 520, 480], 0.0
            self.batches = [[()]] * 3
            self.reference = type("R", (), {"problem": lambda *_: ("", 1.0), "tolerance": 1e-4})()

        def run(self, draw):
            speed = (1 + drift) ** clock.now
            clock.now += seconds_per_example[self.case.method] * self.sizes[draw % 3] * speed

    return Prepared


def replay(clock):
    def pedantic(target, *, setup, rounds, warmup_rounds):
        found = []
        for _ in range(rounds + warmup_rounds):
            args, _ = setup()
            start = clock()
            target(*args)
            found.append(clock() - start)
        return found[warmup_rounds:]

    return pedantic


def test_pairing_cancels_a_machine_that_grows_slower(monkeypatch):
    clock = Clock()
    costs = {"torch-vmap": 0.003, "torch-sgd": 0.001}
    monkeypatch.setattr(protocol, "Prepared", fake_prepared(clock, costs, drift=0.01))
    row = protocol.blank(CNN, "smoke")
    protocol.Bench("cpu", 9, clock).measure(CNN, replay(clock), row)
    assert row["status"] == "ok"
    assert row["rounds"] == len(row["seconds"]) == len(row["ratios"]) == 9
    assert len(row["baseline_s"]) == 10
    assert row["seconds"][-1] > 1.15 * row["seconds"][0], "the drift is really there"
    # Two SGD steps and one of 3x: the drift within one round is all that is left.
    assert abs(row["slowdown"] / 3 - 1) < 0.02
    low, high = row["slowdown_ci"]
    assert low <= row["slowdown"] <= high


def test_a_faster_sgd_is_paired_with_plain_sgd_and_never_stands_in_for_it(monkeypatch):
    clock, built = Clock(), []
    costs = {"jax-sgd": 0.004, "jax-sgd-tuned": 0.002, "jax-masked": 0.006}
    kind = fake_prepared(clock, costs, drift=0)

    def counted(case, *args, **options):
        built.append(case.method)
        return kind(case, *args, **options)

    monkeypatch.setattr(protocol, "Prepared", counted)
    bench, found = protocol.Bench("cpu", 7, clock), {}
    for method in ("jax-sgd", "jax-sgd-tuned", "jax-masked"):
        case = Case(model="digits-cnn", physical_batch=64, method=method, compile=True)
        found[method] = protocol.blank(case, "smoke")
        bench.measure(case, replay(clock), found[method])
    assert built == ["jax-sgd", "jax-sgd-tuned", "jax-masked"], "one plain SGD serves all"
    assert "slowdown" not in found["jax-sgd"]
    slow = [found[m]["slowdown"] for m in ("jax-sgd-tuned", "jax-masked")]
    assert slow == pytest.approx([0.5, 1.5])
    saved.best_sgd(found.values())
    assert [row["vs_best_sgd"] for row in found.values()] == pytest.approx([2, 1, 3])


def test_the_best_sgd_is_that_of_the_same_logical_batch():
    rows = [row for run in (canned(), canned(sgd=0.0005)) for row in run["rows"]]
    for row in rows[2:]:
        row["expected_batch"] *= 8
    saved.best_sgd(rows)
    assert [row["vs_best_sgd"] for row in rows] == pytest.approx([1, 3, 1, 3])


def test_ratios_are_per_real_example():
    assert protocol.ratios([6.0], [3], [2.0, 2.0]) == pytest.approx([3.0])
    assert protocol.ratios([6.0, 4.0], [3, 2], [1.0, 4.0, 1.0]) == pytest.approx(
        [2 / np.sqrt(1 / 3 * 2), 2 / np.sqrt(2 * 0.5)]
    )
    with pytest.raises(ValueError, match="zip"):
        protocol.ratios([1.0], [1], [1.0])


def test_a_recompile_after_warm_up_is_wrong(monkeypatch):
    clock, case = (
        Clock(),
        Case(model="digits-cnn", physical_batch=64, method="jax-masked", compile=True),
    )
    kind = fake_prepared(clock, {"jax-masked": 0.003, "jax-sgd": 0.001}, drift=0)
    monkeypatch.setattr(FakeStep, "compiles", lambda self: int(clock.now), raising=False)
    monkeypatch.setattr(protocol, "Prepared", kind)
    with pytest.raises(outcome.WrongResult, match="after warm-up"):
        protocol.Bench("cpu", 9, clock).measure(case, replay(clock), protocol.blank(case, "smoke"))


# The check before timing


@pytest.fixture(scope="module", params=["torch-vmap", "torch-opacus", "jax-masked"])
def prepared(request):
    compiled = request.param.startswith("jax")
    case = Case(model="digits-cnn", physical_batch=8, method=request.param, compile=compiled)
    return protocol.Prepared(case, "cpu", ragged=False)


def test_the_check_accepts_right_steps_and_rejects_planted_ones(prepared, monkeypatch):
    step, reference = prepared.step, prepared.reference
    assert reference.problem(step)[0] == ""
    real = step.clipped_sum

    def scaled(*args):
        got = real(*args)
        return got | {"linear.bias": 1.5 * got["linear.bias"]}

    with monkeypatch.context() as patch:
        patch.setattr(step, "clipped_sum", scaled)
        assert "away from the reference" in reference.problem(step)[0]
    with monkeypatch.context() as patch:
        patch.setattr(step, "clipped_sum", lambda *a: {"conv1.bias": real(*a)["conv1.bias"]})
        assert "left out" in reference.problem(step)[0]
    update = step.update
    with monkeypatch.context() as patch:
        wrong = type(reference)(prepared.case, None, None, prepared)
        wrong.privacy = type("P", (), vars(wrong.privacy) | {"noise_multiplier": 1.1})()
        wrong.privacy.expected_batch_size = prepared.privacy.expected_batch_size
        assert "noise std is off" in wrong.problem(step)[0]
    assert update == step.update


def test_the_tolerance_is_relative_to_the_reference():
    assert check.TOLERANCE["fp32"] <= 1e-4


@pytest.mark.parametrize("method", ["torch-sgd", "jax-sgd"])
def test_only_where_the_reference_sways_is_the_tolerance_wider(method, monkeypatch):
    case = Case(model="digits-cnn", physical_batch=8, method=method, compile=method == "jax-sgd")

    def problem(factor):
        """Of a step whose sum is ``factor`` too long; and what it was held to."""
        check._CACHE.clear()
        found = protocol.Prepared(case, "cpu", ragged=False)
        real = found.step.clipped_sum
        found.step.clipped_sum = lambda *a: {n: factor * g for n, g in real(*a).items()}
        return found.reference.problem(found.step)[0], found.reference.tolerance

    assert problem(1) == ("", check.TOLERANCE["fp32"])
    assert "away from the reference" in problem(1 + 3e-4)[0]
    last_bit = check._nudge

    def further(value, seed):
        value = np.asarray(value)
        return value + 1000 * (last_bit(value, seed) - value)

    monkeypatch.setattr(check, "_nudge", further)
    text, held_to = problem(1 + 3e-4)
    assert (text, problem(1)) == ("", ("", check.TOLERANCE["fp32"]))
    assert 3e-4 < held_to < check.LOOSEST
    assert "away from the reference" in problem(1.1)[0]
    check._CACHE.clear()


# What becomes of a case


def test_outcomes_are_told_apart():
    class OutOfMemoryError(RuntimeError):
        pass

    for error, status in (
        (OutOfMemoryError("CUDA"), "oom"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), "oom"),
        (RuntimeError("shape mismatch"), "error"),
        (ModuleNotFoundError("opacus"), "missing"),
        (ValueError("layer 'x'"), "unsupported"),
        (outcome.WrongResult("sum"), "wrong"),
        (KeyboardInterrupt(), "interrupted"),
    ):
        assert outcome.outcome(error)[0] == status
    for error, status in (
        (RuntimeError("stack expects each tensor to be equal size"), "unsupported"),
        (OutOfMemoryError("CUDA"), "oom"),
        (outcome.WrongResult("sum"), "wrong"),
        (KeyboardInterrupt(), "interrupted"),
    ):
        found = outcome.outcome(error, peer=True)
        assert found[0] == status
        assert str(error) in found[1] or status == "interrupted"


def child(tmp_path, *options):
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "perf", "--framework=torch", "--device=cpu"]
    command += ["--profile=smoke", "--rounds=2", f"--benchmark-json={path}", "-k", "test_step"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done, path


def test_every_case_ends_as_a_row_even_when_the_run_is_stopped(tmp_path):
    done, path = child(tmp_path, "-p", "planted")
    rows = {row["method"]: row for row in saved.load(path)["rows"]}
    assert done.returncode == 2, done.stdout
    assert {name: row["status"] for name, row in rows.items()} == {
        "torch-sgd": "ok",
        "torch-opacus": "oom",
        "torch-opacus-ghost": "unsupported",
        "torch-vmap": "interrupted",
        "torch-bookkeeping": "interrupted",
        "torch-ghost": "interrupted",
    }
    assert rows["torch-sgd"]["examples_per_s"] > 0
    assert "conv1" in rows["torch-opacus-ghost"]["reason"]


def test_rows_are_saved_when_nothing_was_timed(tmp_path):
    done, path = child(tmp_path, "-p", "planted", "--methods=torch-opacus")
    assert done.returncode == 0, done.stdout
    assert [row["status"] for row in saved.load(path)["rows"]] == ["oom"]


def test_a_real_run_fills_every_field(tmp_path):
    done, path = child(tmp_path, "--methods=torch-opacus")
    assert done.returncode == 0, done.stdout
    (row,) = saved.load(path)["rows"]
    assert row["status"] == "ok", row["reason"]
    assert row["checked"]
    for field in ("slowdown", "update_s", "first_step_s", "peak_bytes", "examples_per_s"):
        assert row[field] > 0, field
    assert row["padding_fraction"] == 0, "Opacus takes any size, so it is given no padding"


def test_unknown_names_are_usage_errors(tmp_path):
    done, _ = child(tmp_path, "--methods=torch-opacuss")
    assert done.returncode == 4
    assert "did you mean torch-opacus" in done.stdout + done.stderr


# Profiles


def test_profiles_are_nested_and_ids_go_there_and_back():
    sets = [{case.id for case in cases(name)} for name in ("smoke", "quick", "full")]
    assert sets[0] < sets[1] < sets[2]
    for name in PROFILES:
        for case in cases(name):
            assert Case.parse(case.id) == case


def test_the_expected_batch_is_in_the_id_where_it_is_unusual():
    usual = Case(model="vit-ti16", physical_batch=16, method="torch-vmap")
    assert usual == Case.parse("vit-ti16-p16-fp32-eager-torch-vmap")
    assert dataclasses.replace(usual, wanted_batch=64) == usual, "4P is the usual L of a ViT"
    long = dataclasses.replace(usual, wanted_batch=1024)
    assert long.id == "vit-ti16-p16-l1024-fp32-eager-torch-vmap"
    assert Case.parse(long.id) == long
    assert long.baseline.id == "vit-ti16-p16-l1024-fp32-eager-torch-sgd"
    assert protocol.blank(long, "full-torch")["expected_batch"] == 1024
    larger = dataclasses.replace(usual, wanted_batch=128)
    found = [(c.rounds, c.warm_up, c.draws) for c in (usual, larger, long)]
    assert found == [(9, 2, 3), (7, 1, 3), (3, 0, 1)]
    assert larger.rounds >= compare.MINIMUM_ROUNDS
    assert long.rounds < compare.MINIMUM_ROUNDS, "so that its verdict is unclear"


def test_a_long_step_is_measured_in_few_rounds_that_say_so(monkeypatch):
    clock, case = Clock(), dataclasses.replace(CNN, wanted_batch=64 * 64)
    kind = fake_prepared(clock, {"torch-vmap": 0.003, "torch-sgd": 0.001}, drift=0)
    monkeypatch.setattr(protocol, "Prepared", kind)
    row = protocol.blank(case, "full-torch")
    protocol.Bench("cpu", None, clock).measure(case, replay(clock), row)
    assert row["rounds"] == len(row["ratios"]) == 3
    assert row["sizes"] == [500] * 3
    assert row["slowdown"] == pytest.approx(3)


def test_a_profile_takes_what_is_registered(monkeypatch):
    before = cases("full-torch")
    assert {case.row.framework for case in before} == {"torch"}
    new = methods.Method(name="torch-new", target="x:X", baseline="torch-sgd", source="")
    monkeypatch.setitem(METHODS, new.name, new)
    monkeypatch.delitem(METHODS, "torch-bookkeeping")
    after = cases("full-torch")
    assert len(after) == len(before)
    assert [c.method for c in after].count("torch-new") == 7
    assert all(case.row.ours for case in cases("gpu-torch"))
    with pytest.raises(ValueError, match="no case of jax-masked"):
        cases("full-torch", methods_wanted=["jax-masked"])


def test_full_jax_has_two_rows_of_torch_for_each_model():
    found = cases("full-jax")
    for model in {case.model for case in found}:
        rows = [case for case in found if case.model == model]
        torch = [case.method for case in rows if case.row.framework == "torch"]
        assert torch == ["torch-sgd", "torch-bookkeeping"]
        assert {"jax-sgd", "jax-sgd-tuned", "jax-bookkeeping"} < {case.method for case in rows}
    assert {case.expected_batch / case.physical_batch for case in found} == {8}
    few = {case.model for case in found if case.rounds < compare.MINIMUM_ROUNDS}
    assert few == {"vit-b16-4blocks", "bit-r50x1-128px", "distilbert-64tok"}
    assert {case.precision for case in cases("gpu-jax")} == {"fp32", "tf32", "bf16"}


def test_selection_errors():
    with pytest.raises(ValueError, match="smoke, quick, full, full-torch, full-jax, gpu"):
        cases("fast")
    with pytest.raises(KeyError, match="vit-ti16"):
        cases("quick", models_wanted=["vit-ti"])
    options = type("O", (), {"rounds": 0, "device": "cpu"})
    with pytest.raises(ValueError, match="--rounds is 0"):
        runner.selected(options)


def test_a_framework_whose_process_is_killed_is_no_success(monkeypatch, capsys):
    class Killed:
        def __init__(self, *args, **options):
            pass

        def wait(self):
            return -9

    monkeypatch.setattr(runner.subprocess, "Popen", Killed)
    asked = dict.fromkeys(("rounds", "methods", "models", "precision", "compile", "resume"))
    options = type("O", (), asked | {"profile": "smoke", "device": "cpu"})
    assert runner.run(options, []) == 128 + 9
    assert "jax: its process was killed by signal 9" in capsys.readouterr().out


def test_a_part_of_a_profile_is_no_baseline(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner.saved, "FOLDER", tmp_path)
    whole = saved.load(Path(__file__).parent.parent / ".benchmarks" / "cpu" / "smoke.json")
    few = whole | {"rows": whole["rows"][:3]}
    runner.finish([few], baseline=True)
    assert not (tmp_path / "cpu" / "smoke.json").exists()
    assert "the baseline stays" in capsys.readouterr().out
    runner.finish([whole], baseline=True)
    assert saved.load(tmp_path / "cpu" / "smoke.json")["rows"][-1] == whole["rows"][-1]


# Comparing


def canned(ratios=None, *, sgd=0.001, device="cpu", fingerprint="a", rounds=9):
    """A saved run of one SGD and some private methods with given slowdowns."""
    rng = np.random.default_rng(0)
    rows = []
    for method, ratio in {"torch-sgd": None, **(ratios or {"torch-vmap": 3.0})}.items():
        row = protocol.blank(Case(model="digits-cnn", physical_batch=64, method=method), "smoke")
        noise = 1 + 0.01 * rng.standard_normal(rounds)
        seconds = sgd * 500 * (ratio or 1) * noise
        row |= {"status": "ok", "seconds": list(seconds), "sizes": [500] * rounds}
        row |= {"examples_per_s": 1 / (sgd * (ratio or 1)), "iqr_fraction": 0.01, "compiles": 0}
        row |= {"first_step_s": 1.0, "update_s": 1e-3, "padding_fraction": 0.0}
        if ratio:
            row |= {"ratios": list(ratio * noise), "slowdown": ratio}
            row |= {"slowdown_q1": ratio, "slowdown_q3": ratio}
        rows.append(row)
    info = {"device": device, "fingerprint": fingerprint, "names": ["x"], "threads": 2}
    return {"rows": rows, "benchmarks": [], "machine_info": info | {"libraries": {}}}


def verdicts(base, new, **options):
    lines, same_machine, _ = compare.compare(base, new, **options)
    return {line.case.split("eager-")[1]: line.verdict for line in lines}, same_machine


def test_verdicts():
    base = canned({"torch-vmap": 3.0, "torch-opacus": 2.0, "torch-opacus-ghost": 4.0})
    new = canned({"torch-vmap": 3.6, "torch-opacus": 2.1, "torch-opacus-ghost": 3.0})
    assert verdicts(base, new)[0] == {
        "torch-sgd": "same",
        "torch-vmap": "slower",
        "torch-opacus": "same",
        "torch-opacus-ghost": "faster",
    }
    assert set(verdicts(base, base)[0].values()) == {"same"}
    assert verdicts(base, new, threshold=0.5)[0]["torch-vmap"] == "same"


def test_a_slower_sgd_is_seen_by_its_seconds():
    slow = canned()
    slow["rows"][0]["seconds"] = [1.5 * s for s in slow["rows"][0]["seconds"]]
    assert verdicts(canned(), slow)[0]["torch-sgd"] == "slower"


def test_a_slower_machine_is_not_a_slower_method():
    names = {"torch-vmap": 3.0, "torch-opacus": 2.0, "torch-opacus-ghost": 4.0}
    found, _ = verdicts(canned(names), canned(names, sgd=0.0013))
    assert set(found.values()) == {"same"}


def test_noise_and_few_rounds_are_unclear():
    base, noisy = canned(), canned()
    noisy["rows"][1]["ratios"] = [2.0, 5.0, 2.2, 4.8, 3.6, 5.2, 2.1, 3.6, 4.9]
    assert verdicts(base, noisy)[0]["torch-vmap"] == "unclear"
    few = canned({"torch-vmap": 9.0}, rounds=3)
    assert verdicts(base, few)[0]["torch-vmap"] == "unclear"


def test_new_missing_and_wrong_rows_are_named():
    base, new = canned({"torch-vmap": 3.0}), canned({"torch-opacus": 2.0})
    assert verdicts(base, new)[0]["torch-vmap"] == "missing"
    assert verdicts(base, new)[0]["torch-opacus"] == "new"
    bad = canned()
    bad["rows"][1] |= {"status": "wrong", "reason": "sum"}
    lines, *_ = compare.compare(canned(), bad)
    assert compare.exit_code(lines, gates=False, strict=False) == 1


def test_another_fingerprint_is_advisory(tmp_path):
    base, new = canned(), canned({"torch-vmap": 4.0}, fingerprint="b", sgd=0.1)
    found, same_machine = verdicts(base, new)
    assert found == {"torch-sgd": "unclear", "torch-vmap": "slower"}
    assert not same_machine
    paths = [str(saved.save(run, tmp_path / f"{n}.json")) for n, run in enumerate((base, new))]
    assert compare.main(paths) == 0
    assert compare.main([*paths, "--strict"]) == 1


def test_exit_codes_and_markdown(tmp_path, capsys):
    base, new = canned(), canned({"torch-vmap": 4.0})
    paths = [str(saved.save(run, tmp_path / f"{n}.json")) for n, run in enumerate((base, new))]
    assert compare.main([*paths, "--markdown", str(tmp_path / "out.md")]) == 1
    assert "+33" in (tmp_path / "out.md").read_text()
    assert compare.main([*paths, "--advisory"]) == 0
    assert compare.main([paths[0], paths[0]]) == 0
    other = str(saved.save(canned(device="nvidia-h200"), tmp_path / "gpu.json"))
    assert compare.main([paths[0], other]) == 2
    assert "cannot be compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("{", "not JSON"), ("[]", "no rows"), ('{"rows": [{}]}', "schema")],
)
def test_unusable_files_say_so(tmp_path, capsys, text, words):
    path = tmp_path / "base.json"
    if text is not None:
        path.write_text(text)
    good = str(saved.save(canned(), tmp_path / "new.json"))
    assert compare.main([str(path), good]) == 2
    assert words in capsys.readouterr().err


# Merging and showing


def test_merge_finds_the_best_sgd_of_any_mode():
    eager, compiled = canned(), canned(sgd=0.0005)
    for row in compiled["rows"]:
        row["case"] = row["case"].replace("eager", "compiled")
        row["compile"] = True
    compiled["machine_info"]["fingerprint"] = "b"
    merged = saved.merge([eager, copy.deepcopy(compiled)])
    assert merged["machine_info"]["fingerprint"] == "a+b"
    assert [row["vs_best_sgd"] for row in merged["rows"]] == pytest.approx([2, 6, 1, 3])


def test_the_table_compares_the_frameworks_fastest_rows():
    run = canned({"torch-vmap": 3.0, "torch-bookkeeping": 1.25})
    assert table.across(run) == []
    for row in copy.deepcopy(run["rows"]):
        method = row["method"].replace("torch-vmap", "jax-masked").replace("torch", "jax")
        row |= {"method": method, "framework": "jax", "baseline": "jax-sgd"}
        run["rows"].append(row | {"examples_per_s": row["examples_per_s"] / 2})
    (line,) = table.across(run)
    assert "SGD 0.50 (jax-sgd / torch-sgd)" in line
    assert "private 0.50 (jax-bookkeeping / torch-bookkeeping)" in line
    assert line in table.markdown(run)


def test_the_table_shows_what_padding_costs(capsys):
    run, row = canned(), {"kind": "padding", "case": "p", "schema": 1, "size": "digits-cnn P=16"}
    row |= {"method": "multiple", "compiles": 5, "padding_fraction": 0.125, "status": "ok"}
    row |= {"examples_per_s": 12_345, "examples_per_s_with_compiles": 67.8, "call_s": 1.0}
    run["rows"] += [row, {**row, "method": "dynamic", "status": "oom", "reason": "too large"}]
    table.show(run)
    assert "| multiple | 5 | 12% | 12,345 | 67.8 |" in table.markdown(run)
    assert "| dynamic | oom" in table.markdown(run)
    assert "12,345" in capsys.readouterr().out
    assert table.calls(run) == []


def test_the_table_names_every_row_and_reason(capsys):
    run = canned({"torch-vmap": 3.0, "torch-opacus": 2.0})
    run["rows"][1] |= {"status": "oom", "reason": "tried to allocate 10 TB"}
    table.show(run)
    text = capsys.readouterr().out + table.markdown(run)
    for words in ("torch-sgd", "torch-vmap", "oom", "10 TB", "2.00 (2.00–2.00)", "norm+1e-6"):
        assert text.count(words) >= 2, words
    json.dumps(run)
