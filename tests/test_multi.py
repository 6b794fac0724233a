"""Several world sizes: what is planned, launched, taken over, and shown."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from perf import chart, device, fabric, multi, outcome, plan, results, saved, share, worker
from perf.plan import Setting
from perf.results import Job

ROOT = Path(__file__).parent.parent
SETTING = Setting(
    model="digits-cnn",
    method="torch-vmap",
    world_size=2,
    scaling="strong",
    physical_batch=64,
    expected_batch=512,
    num_examples=50_000,
)
SGD = Setting(**vars(SETTING) | {"method": "torch-sgd"})


# What is planned


def planned(**more):
    options = {"model": "digits-cnn", "physical_batch": 8, "times": 4, **more}
    return plan.settings("torch", [1, 2, 4], **options)


def test_strong_keeps_the_batch_and_weak_that_of_a_rank():
    found = planned()
    strong = {s.world_size: s.expected_batch for s in found if s.scaling == "strong"}
    weak = {s.world_size: s.expected_batch for s in found if s.scaling == "weak"}
    assert strong == {1: 128, 2: 128, 4: 128}
    assert weak == {1: 32, 2: 64, 4: 128}
    kinds = {(s.method, s.sync) for s in found}
    assert kinds == {("torch-sgd", "once"), ("torch-sgd", "every"), ("torch-bookkeeping", "once")}
    assert len({s.id for s in found}) == len(found) == 3 * 2 * 3
    for world in (1, 2, 4):
        first = next(s for s in found if s.world_size == world)
        assert (first.method, first.sync) == ("torch-sgd", "once"), (
            "what the others are paired with"
        )


def test_epsilon_grows_with_q_and_not_with_n_nor_with_the_ranks(monkeypatch):
    monkeypatch.setattr(plan, "_epsilon", lambda sample_rate: sample_rate)

    def spent(**more):
        rows = [s for s in planned(**more) if s.case.row.private]
        return {(s.scaling, s.world_size): s.epsilon() for s in rows}

    q, n = spent(num_examples=10_000), spent(num_examples=10_000, grows="N")
    assert len({q["strong", world] for world in (1, 2, 4)}) == 1
    assert q["weak", 1] < q["weak", 2] < q["weak", 4] == q["strong", 4]
    assert len({n["weak", world] for world in (1, 2, 4)}) == 1
    assert all(s.grows == "" for s in planned() if s.scaling == "strong")
    assert SGD.epsilon() is None


@pytest.mark.parametrize("syncs", [["every"], ["every", "once"]])
def test_sgd_that_reduces_once_is_always_first(syncs):
    found = [(s.method, s.sync) for s in planned(syncs=syncs, scalings=["weak"])]
    each = [("torch-sgd", "once"), ("torch-sgd", "every"), ("torch-bookkeeping", "once")]
    assert found == each * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_examples": 100}, "--num-examples"),
        ({"grows": "both"}, "use q or N"),
        ({"scalings": ["strongly"]}, "use strong, weak"),
        ({"syncs": ["never"]}, "use once, every"),
        ({"placements": ["rank1"]}, "use split, rank0"),
    ],
)
def test_plans_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        planned(**options)


def test_sizes_double_and_end_with_all():
    assert plan.sizes(1) == [1]
    assert plan.sizes(8) == [1, 2, 4, 8]
    assert plan.sizes(20) == [1, 2, 4, 8, 16, 20]


# What a launch leaves behind


def job(tmp_path, *settings, world=2):
    return Job(
        path=tmp_path / f"torch-w{world}.json",
        framework="torch",
        device="cpu",
        world_size=world,
        rounds=3,
        sizes_bytes=[1024],
        settings=settings or [SGD, SETTING],
    )


def test_a_spec_comes_back_as_it_was(tmp_path):
    wanted = job(tmp_path)
    wanted.write()
    assert Job.load(wanted.path) == wanted
    spec = json.loads(wanted.path.read_text())
    assert [Setting(**fields) for fields in spec["settings"]] == [SGD, SETTING]


CHILD = """
import json, sys
from pathlib import Path
spec = json.loads(Path(sys.argv[1]).read_text())
first = spec["settings"][0]["method"]
if first == "torch-vmap":
    Path(spec["result"] + ".failed").write_text('{"status": "oom", "reason": "no memory"}')
    sys.exit(1)
rows = {sys.argv[2]: {"status": "ok", "reason": "", "examples_per_s": 1.0}}
Path(spec["result"]).write_text(json.dumps(
    {"rows": rows, "hosts": ["a"], "machine_info": {}, "all_reduce": [{"bytes": 1}]}))
sys.exit(1)
"""


def test_a_launch_that_dies_loses_the_setting_it_was_at(tmp_path, monkeypatch):
    last = Setting(**vars(SGD) | {"sync": "every"})
    dying, starts = job(tmp_path, SGD, SETTING, last), []

    def command(it):
        starts.append([s.method for s in it.left()])
        return [sys.executable, "-c", CHILD, str(it.path), it.left()[0].id], os.environ

    monkeypatch.setattr(multi, "command", command)
    multi.launch(dying, 60)
    # The first launch gave SGD and died at the method; the next one had only the last to do.
    assert starts == [["torch-sgd", "torch-vmap", "torch-sgd"], ["torch-sgd"]]
    assert dying.rows[SGD.id]["status"] == "ok"
    assert dying.rows[SETTING.id] == {
        "status": "error",
        "reason": "the launch ended with status 1",
    }
    alone = job(tmp_path, SETTING)
    multi.launch(alone, 60)
    assert alone.rows[SETTING.id] == {"status": "oom", "reason": "no memory"}


def test_a_launch_without_end_is_ended(tmp_path, monkeypatch):
    hanging = job(tmp_path, SETTING)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(multi, "command", lambda it: (sleep, os.environ))
    multi.launch(hanging, 0.5)
    assert "--timeout" in hanging.rows[SETTING.id]["reason"]


def test_a_rank_that_cannot_connect_says_why(tmp_path, monkeypatch):
    def connect(*_):
        raise ModuleNotFoundError("No module named 'jax'")

    dying = job(tmp_path)
    dying.write()
    monkeypatch.setattr(fabric, "connect", connect)
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["perf.worker", str(dying.path)])
    with pytest.raises(ModuleNotFoundError):
        worker.main()
    dying.read("the launch ended with status 1")
    assert dying.rows == {SGD.id: {"status": "missing", "reason": "No module named 'jax'"}}


def test_torch_without_cuda_is_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch does not see the device 'cuda'"):
        fabric.Torch("cuda")


# What a rank measures


class Fabric:
    """Two ranks, of which the other one takes ``slower`` times as long."""

    ranks = SimpleNamespace(rank=0, world=2)

    def __init__(self, slower=3.0, other_parameters=False):
        self.slower, self.other = slower, other_parameters

    def barrier(self):
        pass

    def gather(self, values):
        mine = np.array(values)
        digest = mine.size == 9  # 8 words and a flag
        return np.stack([mine, mine + self.other if digest else mine * self.slower])

    def all_reduce_s(self, size_bytes):
        assert size_bytes == 4 * 10
        return [0.25] * 7


def fake_share(monkeypatch):
    class Step:
        update = synchronize = staticmethod(lambda: None)
        compiles = staticmethod(lambda: 0)
        parameters = staticmethod(lambda: {"w": np.zeros(10, np.float32)})

    class Share:
        def __init__(self, setting, ranks, device):
            self.step, self.sizes = Step(), [500, 520, 480]
            self.trips = [[4, 5], [5, 5], [4, 4]]

        run = accumulate = staticmethod(lambda draw, wait=False: None)
        in_parts = staticmethod(lambda draw: ([1.0], 2.0))

    monkeypatch.setattr(worker, "Share", Share)
    monkeypatch.setattr(worker, "timed", lambda function, draw=0: 0.1 * (1 + draw % 3))


def test_a_step_takes_as_long_as_on_the_slowest_rank(monkeypatch):
    fake_share(monkeypatch)
    row, subject = worker.measure(SETTING, Fabric(), "cpu", 3, None)
    assert row["seconds"] == pytest.approx([0.3, 0.6, 0.9])
    assert row["seconds_per_step"] == pytest.approx(0.6)
    assert row["examples_per_s"] == pytest.approx(520 / 0.6)
    assert row["wait_s"] == pytest.approx(3.0 - 2.0), "the mean rank arrives after 2 s"
    assert row["update_s"] == pytest.approx(9.0 - 3.0)
    assert row["comm_s"] == pytest.approx(0.75)
    assert row["bytes_reduced"] == 40
    assert row["trips_max"] == pytest.approx(14 / 3)
    assert row["trips_mean"] == pytest.approx(27 / 6)
    paired, _ = worker.measure(SETTING, Fabric(), "cpu", 3, subject)
    assert len(paired["baseline_s"]) == 4
    expected = [0.3 / 500, 0.6 / 520, 0.9 / 480, 0.9 / 480]
    assert paired["ratios"] == pytest.approx(
        [expected[k] / np.sqrt(expected[k] * expected[k + 1]) for k in range(3)]
    )
    every, _ = worker.measure(Setting(**vars(SGD) | {"sync": "every"}), Fabric(), "cpu", 3, None)
    assert every["bytes_reduced"] == pytest.approx(40 * 14 / 3)


def test_ranks_that_drift_apart_are_wrong(monkeypatch):
    fake_share(monkeypatch)
    with pytest.raises(outcome.WrongResult, match="differ"):
        worker.measure(SETTING, Fabric(other_parameters=True), "cpu", 3, None)


def test_a_rank_that_cannot_build_leaves_no_other_waiting(monkeypatch):
    def broken(*_):
        raise ValueError("layer 'x' is unknown")

    monkeypatch.setattr(worker, "Share", broken)
    row, subject = worker.measure(SETTING, Fabric(), "cpu", 3, None)
    assert (row["status"], row["reason"]) == ("unsupported", "layer 'x' is unknown")
    assert subject is None


def test_methods_are_paired_with_plain_sgd_whatever_else_is_measured(tmp_path, monkeypatch):
    names = ["jax-sgd", "jax-sgd-tuned", "jax-bookkeeping"]
    settings = [Setting(**vars(SETTING) | {"method": name}) for name in names]
    wanted, pairs = job(tmp_path, *settings), []
    wanted.write()

    def measure(setting, fabric, device, rounds, sgd):
        pairs.append((setting.method, sgd))
        return {}, setting.method

    monkeypatch.setattr(worker, "measure", measure)
    monkeypatch.setattr(device, "describe", lambda device: {})
    spec = json.loads(wanted.path.read_text()) | {"bytes": []}
    worker.work(spec, Fabric(), ["a"])
    assert pairs == [("jax-sgd", None), ("jax-sgd-tuned", None), ("jax-bookkeeping", "jax-sgd")]


@pytest.mark.parametrize("sync", ["once", "every"])
def test_shares_make_the_draw_and_reduce_as_often_as_all(sync):
    from dpsgd.sampling import LogicalBatch

    logical = LogicalBatch(indices=np.arange(100, 133), physical_batch_size=4)
    parts = [share.local(logical, [rank], 4, sync) for rank in range(4)]
    real = [p.indices[p.mask] for own in parts for p in own]
    assert sorted(np.concatenate(real)) == list(range(100, 133))
    assert [len(own) for own in parts] == ([3, 3, 3, 3] if sync == "every" else [3, 2, 2, 2])
    (both,) = [share.local(logical, [0, 1], 4, sync)]
    assert {p.mask.shape for p in both} == {(8,)}


# What is made of it


def rows(job_, rate):
    for setting in job_.settings:
        job_.rows[setting.id] = {
            "status": "ok",
            "reason": "",
            "seconds_per_step": 0.5,
            "examples_per_s": rate,
            "comm_s": 0.05,
            "wait_s": 0.025,
        }
    job_.hosts = ["a", "b"][: setting.world_size]
    return job_


@pytest.fixture
def run(tmp_path):
    jobs = []
    for world, rate in ((1, 1000.0), (2, 1800.0), (4, 2800.0)):
        settings = [s for s in planned() if s.world_size == world]
        jobs.append(rows(job(tmp_path, *settings, world=world), rate))
    return results.run(jobs)


def test_efficiency_is_per_rank_against_the_smallest_world(run):
    for row in run["rows"]:
        assert row["efficiency"] == pytest.approx({1: 1.0, 2: 0.9, 4: 0.7}[row["world_size"]])
        assert row["reference_world"] == 1
        assert row["label"].startswith("CPU ranks: a check of the code")
        for name in ("epsilon", "delta", "accountant", "neighbours", "grows", "sample_rate"):
            assert name in row


def test_a_setting_that_failed_is_a_row_and_nobodys_reference(tmp_path):
    jobs = [job(tmp_path, *[s for s in planned() if s.world_size == w], world=w) for w in (1, 2)]
    rows(jobs[1], 1800.0)
    found = results.run(jobs)
    assert [row["status"] for row in found["rows"]] == ["missing"] * 6 + ["ok"] * 6
    assert {row.get("efficiency") for row in found["rows"]} == {None, 1.0}
    assert {row.get("reference_world") for row in found["rows"]} == {None, 2}


def test_table_and_plots(run, tmp_path, capsys):
    pictures = chart.plot(run, tmp_path / "one-multi")
    assert [path.name for path in pictures] == ["one-multi-torch-digits-cnn-fp32.png"]
    from matplotlib import image

    assert image.imread(pictures[0])[..., :3].std() > 0.05, "something is drawn"
    chart.show(run)
    text = capsys.readouterr().out
    assert "strong" in text
    assert "weak, q grows with W" in text
    assert "a check of the code, not a measurement of scaling" in text
    assert "70%" in text
    assert "add_remove" in text


def test_the_run_is_saved_as_others_are_and_is_no_run_to_compare(run, tmp_path, monkeypatch):
    from perf import table

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chart, "plot", lambda *_: [])
    assert results.finish(run) == 0
    (path,) = Path(".benchmarks").glob("*/runs/*-multi.json")
    assert saved.load(path)["rows"] == json.loads(json.dumps(run["rows"]))
    with pytest.raises(saved.Unusable, match="no saved run"):
        table.newest()
    both = results.merge([run, run])
    assert len(both["rows"]) == 2 * len(run["rows"])


# The command


class Stopped:
    """A launch that has measured one setting when the user stops it."""

    def __init__(self, line, **_):
        spec = json.loads(Path(line[-1]).read_text())
        found = job(Path(), Setting(**spec["settings"][0]))
        rows(found, 1000.0)
        info = {"device": "cpu", "names": ["a processor"]}
        result = {"rows": found.rows, "hosts": ["a"], "machine_info": info, "all_reduce": []}
        Path(spec["result"]).write_text(json.dumps(result))

    def wait(self, timeout_s):
        raise KeyboardInterrupt

    def poll(self):
        return -2


def test_what_was_measured_is_kept_when_the_user_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "_epsilon", lambda sample_rate: 1.0)
    monkeypatch.setattr(chart, "plot", lambda *_: [])
    fake = SimpleNamespace(Popen=Stopped, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(multi, "subprocess", fake)
    line = ["--devices", "cpu", "--framework", "torch", "--scaling", "strong", "--part", "part"]
    assert multi.main(line) == 130
    (path,) = Path(".benchmarks/cpu/runs").iterdir()
    run = saved.load(path)
    assert [row["status"] for row in run["rows"]] == ["ok"] + ["interrupted"] * 5
    assert {row["reason"] for row in run["rows"][1:]} == {"stopped by the user"}
    assert saved.load("part")["rows"] == run["rows"]
    assert "stopped by the user" in capsys.readouterr().out


def test_it_ends_at_once_without_two_gpus(monkeypatch, capsys):
    monkeypatch.setattr(multi, "visible", lambda: 1)
    assert multi.main([]) == 2
    said = capsys.readouterr().err
    assert "1 GPUs here" in said
    assert "nox -s perf_gpu" in said
    assert "--devices cpu" in said
    monkeypatch.setattr(multi, "visible", lambda: 4)
    assert multi.worlds(None, "cuda") == [1, 2, 4]
    with pytest.raises(ValueError, match="has 4 GPUs"):
        multi.worlds("1,8", "cuda")


@pytest.mark.parametrize(
    ("listed", "count"), [(None, 4), ("", 0), ("-1", 0), ("0,2", 2), ("0,1,2,3,4,5", 4)]
)
def test_gpus_that_are_hidden_do_not_count(listed, count, monkeypatch):
    monkeypatch.setattr(device, "nvidia", lambda query: ["a GPU"] * 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert multi.visible() == count


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--times", "0"], "--times"),
        (["--methods", "torch-nothing"], "did you mean"),
        (["--ranks", "0,1"], "at least 1"),
        (["--ranks", "two"], "two"),
    ],
)
def test_wrong_options_are_named(options, words, capsys):
    assert multi.main(["--devices", "cpu", *options]) == 2
    assert words in capsys.readouterr().err


def test_each_launch_has_as_many_devices_as_ranks(tmp_path, monkeypatch):
    line, environment = multi.command(job(tmp_path, world=4))
    assert "--nproc-per-node=4" in line
    assert environment["OMP_NUM_THREADS"] == "1"
    alone = job(tmp_path, world=4)
    alone.framework = "jax"
    _, environment = multi.command(alone)
    assert "device_count=4" in environment["XLA_FLAGS"]
    alone.device = "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3")
    assert multi.command(alone)[1]["CUDA_VISIBLE_DEVICES"] == "7,6,5,4"


class Session:
    """A session of nox; what it runs leaves a part, or names the parts that it is given."""

    venv_backend, posargs = "none", ("--devices", "cpu")

    def run(self, *line, **_):
        for word, after in zip(line, [*line[1:], ""], strict=True):
            part = after if word == "--part" else word.partition("--benchmark-json=")[2]
            if part:
                Path(part).write_text("{}")
        self.given = [Path(word).stem for word in line if word.endswith(".json")]


@pytest.mark.parametrize("name", ["perf_gpu", "perf_multi_gpu"])
def test_nox_merges_no_part_of_an_earlier_run(name, tmp_path, monkeypatch):
    nox = ModuleType("nox")
    nox.options, nox.Session = SimpleNamespace(), Session
    nox.session, nox.parametrize = lambda f: f, lambda *_: lambda f: f
    monkeypatch.setitem(sys.modules, "nox", nox)
    monkeypatch.chdir(tmp_path)

    def merged(*legs):
        found = {}
        exec(compile((ROOT / "noxfile.py").read_text(), "noxfile.py", "exec"), found)
        found["gpus"] = lambda: 2
        for framework in legs:
            session = Session()
            found[name](session, framework)
        return session.given

    assert merged("torch", "jax") == ["torch", "jax"]
    assert merged("jax") == ["jax"]


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_cpu_ranks_end_to_end(framework, tmp_path):
    command = [sys.executable, "-m", "perf.multi", "--devices", "cpu", "--ranks", "1,2"]
    command += ["--framework", framework, "--physical-batch", "8", "--times", "2", "--rounds", "2"]
    command += ["--noise-placement", "split,rank0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob(".benchmarks/cpu/runs/*-multi.json")
    found = saved.load(path)
    assert len(found["rows"]) == 2 * 2 * 4
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert row["seconds_per_step"] > 0
        assert row["parameters"] > 9_000
        assert ("slowdown" in row) == (row["method"] != f"{framework}-sgd")
    assert {entry["world_size"] for entry in found["all_reduce"]} == {1, 2}
    assert list(tmp_path.glob(".benchmarks/cpu/runs/*.png"))
