"""
How pytest drives the measurements.

Without ``--framework`` this process only starts one child for each framework and merges what they
saved; with it, it measures that framework's cases.
"""

import datetime
import json
import time
import warnings
from pathlib import Path

import pytest

from dpsgd import METHODS, keep_freed_memory
from dpsgd.memory import trim_freed_memory
from perf import device, memory, runner
from perf.outcome import WrongResult, outcome
from perf.partial import Partial
from perf.profiles import cases
from perf.protocol import SCHEMA, Bench, blank, timed

ROWS = pytest.StashKey[list]()
PARTIAL = pytest.StashKey[Partial | None]()
WANTED = pytest.StashKey[dict]()  # what the first way of the padding study gave
TIMED = pytest.StashKey[dict]()  # case id → pytest-benchmark's entry, as it is kept


def pytest_cmdline_main(config):
    """Be the parent, unless this is a child, or nothing is to be run."""
    options = config.option
    if options.framework or options.collectonly or options.help or options.version:
        return None
    try:
        return runner.run(options, list(config.invocation_params.args))
    except (ValueError, KeyError, RuntimeError) as error:
        raise pytest.UsageError(error.args[0]) from None


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Third parties' warnings are not errors while measuring; the child reports its own way."""
    config.addinivalue_line("filterwarnings", "ignore")
    config.stash[ROWS], config.stash[PARTIAL], config.stash[TIMED] = [], None, {}
    framework = config.option.framework
    if framework:
        config.option.device = device.resolve(config.option.device)
        try:
            config.stash_wanted = runner.selected(config.option)
            if config.option.device == "cpu":
                keep_freed_memory()  # or how often pages are faulted in would be a matter of luck
            device.require(framework, config.option.device)
            if config.option.resume:
                config.stash[PARTIAL] = Partial(
                    config.option.device,
                    config.stash_wanted["profile"],
                    any_commit=config.option.any_commit,
                )
        except (ValueError, KeyError, RuntimeError) as error:
            raise pytest.UsageError(error.args[0]) from None
        config.option.benchmark_quiet = True
        config.clocks_before = device.clocks(config.option.device)


def pytest_generate_tests(metafunc):
    """One test for each case of the profile."""
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        wanted = cases(**runner.selected(config.option), framework=config.option.framework)
        metafunc.parametrize("case", wanted, ids=[case.id for case in wanted])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Every selected case has a row from the start, so that none can vanish; finished ones stay."""
    partial, taken = config.stash[PARTIAL], []
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if not case:
            continue
        if found := partial and partial.take(case.id):
            item.row = found["row"]
            config.stash[TIMED][case.id] = found["benchmark"]
            taken.append(item)
        else:
            item.row = blank(case, runner.selected(config.option)["profile"])
            item.row |= {"status": "interrupted", "reason": "not reached"}
        config.stash[ROWS].append(item.row)
    config.taken = [item.row["case"] for item in taken]
    items[:] = [item for item in items if item not in taken]


def pytest_report_collectionfinish(config):
    """What is taken over from a run that was not finished."""
    if not (partial := config.stash[PARTIAL]):
        return []
    lines = [f"{len(config.taken)} finished cases are taken over from {partial.folder}"]
    if partial.refused:
        lines.append(
            f"{partial.refused} are measured again: they are of another machine, library or commit "
            "(--any-commit takes over those of another commit)"
        )
    return lines


@pytest.fixture(scope="session")
def bench(request):
    """One bench for the process; neighbouring cases share their SGD."""
    return Bench(request.config.option.device, request.config.option.rounds)


@pytest.fixture
def measure(request, benchmark, bench):
    """``measure(case)``: check the case, time it, fill its row; on an error the run goes on."""
    row = request.node.row

    def pedantic(target, **options):
        benchmark.pedantic(target, iterations=1, **options)
        return list(benchmark.stats.stats.data)

    def run(case):
        benchmark.extra_info = row
        row.update(status="error", reason="")
        try:
            if missing := METHODS[case.method].missing():
                raise ModuleNotFoundError(f"pip install {' '.join(missing)}")
            trim_freed_memory()  # or the process keeps what the largest of all cases held
            bench.measure(case, pedantic, row)
            _keep(request.config, row, benchmark.stats)
        except BaseException as error:
            row["status"], row["reason"] = outcome(error, peer=not METHODS[case.method].ours)
            if row["status"] in ("wrong", "error", "interrupted"):
                raise
            _keep(request.config, row, None)
            pytest.skip(f"{row['status']}: {row['reason']}")

    return run


def _keep(config, row, stats) -> None:
    if partial := config.stash[PARTIAL]:
        entry = stats.as_dict(include_data=True) | {"extra_info": {}} if stats else None
        config.stash[TIMED][row["case"]] = entry
        partial.keep(row, entry)


def _line(row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    if row.get("kind") == "padding":
        return f"{row['examples_per_s']:,.0f} real ex/s, {row['compiles']} compiles"
    if "call_s" in row:
        return f"{1e6 * row['call_s']:,.0f} µs a call"
    slow = f", {row['slowdown']:.2f} × SGD" if "slowdown" in row else ""
    return f"{row['examples_per_s']:,.0f} real ex/s{slow}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Progress: one line for each case, with its result."""
    result = yield
    report = result.get_result()
    row = getattr(item, "row", None)
    if report.when == "call" and row:
        rows = item.config.stash[ROWS]
        place = next(n for n, other in enumerate(rows, 1) if other is row)
        report.progress = (
            f"[{place}/{len(rows)}] {row['case']}: {_line(row)} ({call.duration:.0f} s)"
        )


def pytest_runtest_logreport(report):
    """Print the progress line."""
    if hasattr(report, "progress"):
        print_line(report.progress)


def print_line(text: str) -> None:
    """One line to the real terminal, whatever is captured."""
    if _REPORTER:
        _REPORTER[0].ensure_newline()
        _REPORTER[0].write_line(text)


_REPORTER: list = []


def pytest_sessionstart(session):
    """Keep the terminal for the progress lines."""
    session.config.started = time.time()
    _REPORTER[:] = [session.config.pluginmanager.get_plugin("terminalreporter")]


def pytest_report_teststatus(report):
    """No dots: the progress line says more."""
    if hasattr(report, "progress") or report.when != "call":
        return (report.outcome if report.when == "call" else "", "", "")
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    """Peak memory last, before the run is saved; not after Ctrl-C."""
    _measure_memory(session, exitstatus)
    with warnings.catch_warnings():  # that nothing was timed is said by the rows
        warnings.simplefilter("ignore")
        return (yield)


def _measure_memory(session, exitstatus) -> None:
    config = session.config
    done = {
        row["case"]: row
        for row in config.stash[ROWS]
        if row["status"] == "ok"
        and row.get("kind", "step") == "step"
        and "memory_source" not in row
    }
    if not done or exitstatus == 2:
        return
    trim_freed_memory()
    print_line(f"peak memory of {len(done)} cases, each in a process of its own …")
    for case_id, found in memory.measure(list(done), config.option.device):
        if "error" in found:
            done[case_id]["memory_source"] = found["error"]
        else:
            done[case_id] |= found
        if config.stash[PARTIAL]:
            config.stash[PARTIAL].keep(done[case_id], config.stash[TIMED][case_id])


def _extend(config, output: dict) -> None:
    where = config.option.device
    output["machine_info"] = output.get("machine_info", {}) | device.describe(where)
    output["machine_info"]["clocks"] = [config.clocks_before, device.clocks(where)]
    output["machine_info"]["precision_flags"] = (
        "fp32 means IEEE float32 products in both frameworks"
    )
    output["rows"] = config.stash[ROWS]
    rows = {row["case"]: row for row in output["rows"]}
    entries = {case_id: config.stash[TIMED][case_id] for case_id in config.taken}
    output["benchmarks"] = output["benchmarks"] + [
        entry | {"extra_info": rows[case_id]} for case_id, entry in entries.items() if entry
    ]


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Add the rows and the fingerprint to what pytest-benchmark saves."""
    _extend(config, output_json)


def pytest_unconfigure(config):
    """pytest-benchmark writes nothing when nothing was timed; the rows are saved all the same."""
    target = config.getoption("benchmark_json", None)
    if not target or not config.option.framework or not config.stash.get(ROWS, None):
        return
    path = Path(target)
    if path.exists() and path.stat().st_size:
        return
    output = {"benchmarks": [], "datetime": datetime.datetime.now().isoformat(), "version": SCHEMA}
    _extend(config, output)
    path.write_text(json.dumps(output))


@pytest.fixture
def measure_call(request, benchmark):
    """``measure_call(kind, method, size, call)``: time one call outside of a step, in a row."""

    def run(kind, method, size, call, iterations=1):
        row = benchmark.extra_info = _own_row(request, kind, method, size)
        benchmark.pedantic(call, rounds=9, warmup_rounds=2, iterations=iterations)
        row |= {"status": "ok", "call_s": benchmark.stats.stats.median}

    return run


@pytest.fixture
def measure_padding(request, benchmark):
    """``measure_padding(way, sizes)``: time one way to shape draws of these sizes, in a row."""

    def run(way, sizes):
        from perf import padding

        size = f"{padding.MODEL} P={padding.P} L={padding.L}"
        row = benchmark.extra_info = _own_row(request, "padding", way, size)
        study = padding.Study(way, sizes, request.config.option.device)
        before = study.step.compiles()
        cold = timed(study.run)
        row["compiles"] = study.step.compiles() - before
        row["padding_fraction"] = study.padding_fraction
        row["examples_per_s_with_compiles"] = sum(sizes) / cold
        got, wanted = study.clipped_sum(0), request.config.stash.setdefault(WANTED, {})
        want = wanted.setdefault(size, got)
        off = max(float(abs(got[name] - want[name]).max()) for name in want)
        if not off < 1e-3 * study.step.privacy.clip_norm:
            raise WrongResult(f"{way} is {off:.2g} away from what the first way gives")
        row["checked"] = True
        benchmark.pedantic(study.run, rounds=9, warmup_rounds=1)
        row |= {"status": "ok", "call_s": benchmark.stats.stats.median}
        row["examples_per_s"] = sum(sizes) / row["call_s"]

    return run


def _own_row(request, kind, method, size) -> dict:
    row = request.node.row = {
        "schema": SCHEMA,
        "kind": kind,
        "case": "-".join([kind, method, *size.split()]),
        "profile": runner.selected(request.config.option)["profile"],
        "method": method,
        "size": size,
        "status": "error",
        "reason": "",
    }
    request.config.stash[ROWS].append(row)
    return row


def pytest_ignore_collect(collection_path, config):
    """
    What knows no framework is measured once, in torch's process: Opacus' sampler needs it.

    Only JAX needs static shapes.
    """
    others = {"jax": ("test_sampling.py", "test_loading.py"), "torch": ("test_padding.py",)}
    if collection_path.name in others.get(config.option.framework, ()):
        return True
    return None
