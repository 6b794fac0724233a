"""The scaling model against independent values, its fit against known parameters, its figure."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perf import saved
from perf.scaling import __main__ as command
from perf.scaling import claim, figure, inputs, measured, model, report
from perf.scaling.fit import fit, hold_out, rows
from perf.scaling.laws import law
from perf.scaling.model import Load, Method, Range, Values, all_reduce_s, efficiency, step
from perf.scaling.trips import trips

ROOT = Path(__file__).parent.parent
LOAD = Load(expected_batch=25_000, num_examples=50_000, parameters=86_600_000)
VALUES = Values(batch_s=0.3, alpha_s=1e-5, bytes_per_s=2e10, optimizer_s=0.003, fix_s=0.01)
SGD = Method(name="sgd", physical_batch=32)
EVERY = replace(SGD, sync="every")


# Stragglers


@pytest.mark.parametrize(
    ("expected", "examples", "ratio"), [(25_000, 50_000, 1.097), (4_096, 50_000, 1.338)]
)
def test_the_largest_share_of_80_ranks(expected, examples, ratio):
    found = trips(examples, expected / examples, 80, 1, "shard")
    assert found.mean == pytest.approx(expected / 80, rel=1e-9)
    assert found.slowest / found.mean == pytest.approx(ratio, abs=0.003)
    dealt = trips(examples, expected / examples, 80, 1, "round-robin")
    assert dealt.slowest - dealt.mean < 1  # a global draw leaves at most one example between ranks


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("physical", [1, 7, 32])
def test_expected_trips_against_monte_carlo(world, physical):
    examples, rate, draws = 1_001, 0.2, 20_000
    rng = np.random.default_rng(0)
    sizes = [examples // world + (r < examples % world) for r in range(world)]
    own = -(-rng.binomial(sizes, rate, (draws, world)) // physical)
    dealt = rng.binomial(examples, rate, (draws, 1)) + np.arange(world - 1, -1, -1)
    dealt = -(-(dealt // world) // physical)  # rank r gets ⌊(B + W − 1 − r)/W⌋
    for placement, counts in (("shard", own), ("round-robin", dealt)):
        found = trips(examples, rate, world, physical, placement)
        for value, sample in ((found.mean, counts.mean(1)), (found.slowest, counts.max(1))):
            error = 5 * sample.std() / np.sqrt(draws) + 5 / draws  # rare draws may all be missing
            assert value == pytest.approx(sample.mean(), abs=error)


def test_expected_trips_are_not_trips_at_the_mean():
    """E⌈B/P⌉ > ⌈E[B]/P⌉ where the mean fills its batches: a draw spills over every other time."""
    assert trips(50_000, 64 / 50_000, 1, 64, "round-robin").slowest == pytest.approx(1.46, abs=0.02)


def test_placement_world_and_rate_are_checked():
    for wrong in ((100, 0.5, 4, 8, "spread"), (100, 1.5, 4, 8, "shard"), (100, 0.5, 0, 8, "shard")):
        with pytest.raises(ValueError, match=r"use|must lie"):
            trips(*wrong)


# The model


def test_a_ring_against_its_simulation():
    """2(W−1) rounds, in each of which every rank sends S/W bytes to its neighbour."""
    for world, size in itertools.product((1, 2, 5, 80), (4.0, 1e9)):
        seconds = sum(2e-6 + size / world / 1e10 for _ in range(2 * (world - 1)))
        assert all_reduce_s(world, size, 2e-6, 1e10) == pytest.approx(seconds)
    assert all_reduce_s(80, 4 * 86.6e6, 0, 25e9) == pytest.approx(0.0274, abs=1e-4)


def expected_seconds(load, method, world, values):
    """T(W) written again, from a seeded Monte Carlo: no code shared with the model."""
    rng = np.random.default_rng(1)
    total, examples = load.at(world)
    if load.placement == "shard":
        sizes = [examples // world + (r < examples % world) for r in range(world)]
        largest = rng.binomial(sizes, total / examples, (4000, world)).max(1)
    else:
        largest = np.ceil(rng.binomial(examples, total / examples, 4000) / world)
    slowest = np.ceil(largest / method.physical_batch)
    count = slowest if method.sync == "every" else 1
    ring = 2 * (world - 1) * (values.alpha_s + 4 * load.parameters / world / values.bytes_per_s)
    once = values.noise_s + values.optimizer_s + values.fix_s
    return float(np.mean(slowest * values.batch_s + count * ring)) + once


@pytest.mark.parametrize("sync", ["once", "every"])
@pytest.mark.parametrize("placement", ["round-robin", "shard"])
@pytest.mark.parametrize("scaling", ["strong", "weak"])
@pytest.mark.parametrize("world", [1, 4, 80])
def test_seconds_against_an_independent_formula(sync, placement, scaling, world):
    batch = 25_000 if scaling == "strong" else 300
    load = replace(LOAD, placement=placement, scaling=scaling, expected_batch=batch)
    values = replace(VALUES, bytes_per_s=2e9, noise_s=0.02)
    method = replace(SGD, sync=sync)
    found = step(load, method, world, values)
    want = expected_seconds(load, method, world, values)
    assert found.seconds == pytest.approx(want, rel=4e-3)
    assert found.examples_per_s == pytest.approx(
        batch * (world if scaling == "weak" else 1) / found.seconds
    )


@pytest.mark.parametrize("fault", ["no straggler", "at the mean", "ring factor", "one reduction"])
def test_planted_mistakes_are_seen(fault, monkeypatch):
    """The comparison above fails for each of them."""
    load, method = replace(LOAD, placement="shard"), EVERY
    values = replace(VALUES, bytes_per_s=2e9)
    if fault == "no straggler":
        monkeypatch.setattr(model, "trips", lambda *a: replace(trips(*a), slowest=trips(*a).mean))
    if fault == "at the mean":
        mean = -(-25_000 // 80 // 32)
        monkeypatch.setattr(
            model, "trips", lambda *a: replace(trips(*a), mean=float(mean), slowest=float(mean))
        )
    if fault == "ring factor":
        monkeypatch.setattr(
            model, "all_reduce_s", lambda w, size, a, b: (w - 1) * a + (w - 1) / w * size / b
        )
    if fault == "one reduction":
        method = SGD
    found = step(load, method, 80, values).seconds
    assert found != pytest.approx(expected_seconds(load, EVERY, 80, values), rel=4e-3)


def test_limits():
    for method in (SGD, EVERY):
        assert step(LOAD, method, 1, VALUES).comm_s == 0
        free = replace(VALUES, bytes_per_s=np.inf, alpha_s=0.0)
        assert step(LOAD, method, 80, free).comm_s == 0
        assert efficiency(LOAD, method, 1, VALUES) == 1
    rings = [all_reduce_s(world, 1e9, 1e-5, 1e10) for world in (1, 2, 4, 8, 80)]
    assert rings == sorted(rings)
    for placement, world in itertools.product(("round-robin", "shard"), (1, 2, 7, 80)):
        load = replace(LOAD, placement=placement)
        once, every = (step(load, m, world, VALUES) for m in (SGD, EVERY))
        assert once.seconds <= every.seconds
        assert once.straggler_s >= 0
    hidden = step(LOAD, replace(EVERY, overlap=1.0), 80, VALUES)
    assert hidden.comm_s == 0
    ragged = step(LOAD, replace(SGD, padded=False), 80, VALUES)
    assert ragged.compute_s == pytest.approx(25_000 / 80 / 32 * VALUES.batch_s)
    assert ragged.padding_s == pytest.approx(0, abs=1e-9)
    assert step(LOAD, SGD, 80, VALUES).compute_s == pytest.approx(ragged.compute_s)
    assert ragged.seconds < step(LOAD, SGD, 80, VALUES).seconds


def test_dp_scales_better_only_as_far_as_it_is_slower():
    """It shrinks with faster clipping, and where SGD reduces once; it is gone at equal cost."""
    machine = inputs.MACHINES["v100"]

    def share(method):
        return efficiency(LOAD, method, 80, model.corners(machine, method, LOAD))

    found = [share(m)[0] for m in (inputs.HOOKS, inputs.GHOST, inputs.BOOKKEEPING)]
    once, every = share(inputs.SGD_ONCE)[0], share(inputs.SGD_EVERY)[0]
    assert found == sorted(found, reverse=True)
    assert found[-1] > once > every
    equal = replace(VALUES, noise_s=0.0)
    assert efficiency(LOAD, replace(SGD, private=True), 80, equal) == efficiency(
        LOAD, SGD, 80, equal
    )


def test_a_band_holds_every_draw_of_its_inputs():
    machine, method, rng = inputs.MACHINES["v100"], inputs.HOOKS, np.random.default_rng(0)
    values = model.corners(machine, method, LOAD)
    rate = model.band(step(LOAD, method, 80, values).examples_per_s)
    share = model.band(efficiency(LOAD, method, 80, values))
    for _ in range(200):
        inside = {
            name: model.exactly(rng.uniform(value.low, value.high))
            for name, value in vars(machine).items()
            if isinstance(value, Range)
        }
        slower = replace(method, slowdown=model.exactly(rng.uniform(2.6, 8)))
        one = model.corners(replace(machine, **inside), slower, LOAD)
        assert rate.low <= step(LOAD, slower, 80, one).examples_per_s[0] <= rate.high
        assert share.low <= efficiency(LOAD, slower, 80, one)[0] <= share.high
    with pytest.raises(ValueError, match="no range"):
        Range(low=2, likely=1, high=3)


# Fits


def synthetic(worlds, *, alpha, beta, noise=0.0, sizes=(1e4, 1e7), seed=0, expected=512, **planted):
    """Rows of known parameters, with log-normal noise; sgd: t_pb 0.1 s; dp: 0.25 s."""
    rng = np.random.default_rng(seed)
    found = []
    for world, parameters, (method, batch, once), sync in itertools.product(
        worlds, sizes, (("sgd", 0.1, 0.05), ("dp", 0.25, 0.2)), ("once", "every")
    ):
        if method == "dp" and sync == "every":
            continue
        slowest = trips(50_000, expected / 50_000, world, 16, "round-robin").slowest
        count = slowest if sync == "every" else 1
        ring = 2 * (world - 1) * (alpha + 4 * parameters / world / beta)
        seconds = slowest * batch + once + count * ring * planted.get("ring", 1)
        seconds *= np.exp(noise * rng.standard_normal())
        found.append(
            {
                "world_size": world,
                "method": method,
                "sync": sync,
                "placement": "round-robin",
                "scaling": "strong",
                "physical_batch": 16,
                "expected_batch": expected,
                "num_examples": 50_000,
                "parameters": int(parameters),
                "seconds_per_step": seconds,
                "examples_per_s": expected / seconds,
            }
        )
    return rows({"rows": found})


def by_method(values):
    return {key[2]: value for key, value in values.items()}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.01, 0.15)])
def test_known_parameters_are_recovered_from_steps(noise, tolerance):
    data = synthetic((1, 2, 4, 8, 16), alpha=2e-3, beta=1e9, noise=noise, sizes=(1e4, 1e6, 1e7))
    found = fit(data)
    assert found.identified
    assert found.alpha_s == pytest.approx(2e-3, rel=tolerance)
    assert found.bytes_per_s == pytest.approx(1e9, rel=tolerance)
    assert by_method(found.batch_s) == pytest.approx({"sgd": 0.1, "dp": 0.25}, rel=tolerance)
    assert by_method(found.once_s) == pytest.approx({"sgd": 0.05, "dp": 0.2}, rel=2 * tolerance)
    assert found.relative_error <= max(1.2 * noise, 1e-9)


def test_bare_all_reduces_give_the_link():
    rng = np.random.default_rng(0)
    bare = [
        {
            "world_size": world,
            "bytes": size,
            "seconds": list(all_reduce_s(world, size, 5e-6, 2e10) * rng.lognormal(0, 0.05, 7)),
        }
        for world in (1, 2, 4)
        for size in (1024, 1 << 20, 1 << 28)
    ]
    data = synthetic((1, 2, 4), alpha=5e-6, beta=2e10, noise=0.01)
    found = fit(data, bare)
    assert found.identified
    assert found.alpha_s == pytest.approx(5e-6, rel=0.05)
    assert found.bytes_per_s == pytest.approx(2e10, rel=0.05)


def test_one_size_at_one_world_cannot_tell_latency_from_bandwidth():
    found = fit(synthetic((1, 2), alpha=0.0, beta=1e9, sizes=(1e7,)))
    assert not found.identified
    assert found.alpha_s == 0
    assert found.bytes_per_s == pytest.approx(1e9, rel=1e-6)


def test_hold_out_predicts_what_it_did_not_see():
    data = synthetic((1, 2, 4), alpha=1e-3, beta=1e9, noise=0.01)
    fitted, held = hold_out(data)
    assert {one.row["world_size"] for one in held} == {4}
    assert max(abs(one.error) for one in held) < 0.06
    assert fitted.seconds(held[0].row) == held[0].predicted_s
    # A link that changes where nothing was seen, and a wrong ring, show in the error.
    slower = synthetic((1, 2), alpha=1e-3, beta=1e9) + synthetic((4,), alpha=1e-2, beta=1e8)
    assert max(abs(one.error) for one in hold_out(slower)[1]) > 0.3
    with pytest.raises(saved.Unusable, match="1, 2 and 4"):
        hold_out(synthetic((1, 2), alpha=0, beta=1e9))


def test_cpu_ranks_share_their_cores():
    data = [
        {key: value for key, value in row.items() if key != "contention"}
        for row in synthetic((1, 2, 4), alpha=1e-4, beta=1e10)
    ]
    info = {"device": "cpu", "threads": 2}
    found = rows({"rows": data, "machine_info": info})
    assert {row["world_size"]: row["contention"] for row in found} == {1: 1, 2: 1, 4: 2}
    assert {row["contention"] for row in rows({"rows": data})} == {1}


def test_ranks_whose_neighbours_idle_are_not_fitted():
    """Alone, a rank is faster than in a full machine; the hold-out must not hear of it."""
    speed = {1: 0.75, 2: 1, 4: 2}  # seconds against those of a core alone among others
    data = [
        row | {"seconds_per_step": speed[row["world_size"]] * row["seconds_per_step"]}
        for expected in (256, 512)
        for row in synthetic((1, 2, 4), alpha=0, beta=1e10, sizes=(1e4,), expected=expected)
    ]
    found = rows({"rows": data, "machine_info": {"device": "cpu", "threads": 2}})
    assert {row["world_size"]: row["idle"] for row in found} == {1: True, 2: False, 4: False}

    def worst(rows):
        _, held = hold_out(rows, seen=2)
        assert {one.row["world_size"] for one in held} == {4}
        return max(abs(one.error) for one in held)

    assert worst(found) < 0.02 < 0.05 < worst([row | {"idle": False} for row in found])
    only = [row for row in found if row["world_size"] == 1]
    assert fit(only).batch_s  # rather than nothing


def test_rows_that_cannot_be_used_say_why():
    with pytest.raises(saved.Unusable, match="several world sizes"):
        rows({"rows": [{"case": "a", "status": "oom"}]})
    with pytest.raises(saved.Unusable, match="lacks world_size"):
        rows({"rows": [{"case": "a", "seconds_per_step": 1.0}]})


@pytest.mark.parametrize("usl", [False, True])
def test_laws_recover_their_coefficients(usl):
    worlds = np.repeat([1, 2, 4, 8, 16, 32], 9)
    sigma, kappa = 0.03, 4e-4 * usl
    rates = 100 * worlds / (1 + sigma * (worlds - 1) + kappa * worlds * (worlds - 1))
    exact = law(worlds, rates, usl=usl)
    assert (exact.one, exact.sigma) == pytest.approx((100, sigma), rel=1e-6)
    assert exact.kappa == pytest.approx(kappa, rel=1e-6)
    assert exact.examples_per_s(32) == pytest.approx(rates[-1])
    covered = 0
    for seed in range(100):
        noise = np.random.default_rng(seed).lognormal(0, 0.02, len(worlds))
        noisy = law(worlds, rates * noise, usl=usl)
        assert noisy.sigma == pytest.approx(sigma, rel=0.3)
        assert noisy.intervals is not None
        covered += noisy.intervals[0][0] <= sigma <= noisy.intervals[0][1]
    assert covered >= 88  # of 95 expected; fewer has p = 0.0015
    with pytest.raises(ValueError, match="different"):
        law([1, 1], [1.0, 1.0], usl=usl)


def test_amdahl_of_the_claim():
    """Parallel parts of 99.5 and 98.9 % are 71.7 and 53.5 % of ideal at 80."""
    for part, share in ((0.995, 0.717), (0.989, 0.535)):
        worlds = np.array([1, 8, 80])
        found = law(worlds, worlds / (part + (1 - part) * worlds), usl=False)
        assert 1 - found.sigma == pytest.approx(part)
        assert found.examples_per_s(80) / 80 == pytest.approx(share, abs=1e-3)


def test_a_claim_is_inverted():
    wanted = float(efficiency(LOAD, EVERY, 80, replace(VALUES, bytes_per_s=3e9)))
    found = claim.needed(LOAD, EVERY, 80, VALUES, wanted)
    assert found.bytes_per_s == pytest.approx(3e9, rel=1e-6)
    assert efficiency(LOAD, EVERY, 80, replace(VALUES, alpha_s=found.alpha_s)) == pytest.approx(
        wanted
    )
    assert claim.needed(LOAD, EVERY, 80, VALUES, 0.999).bytes_per_s is None
    longer = claim.slowdown_for(LOAD, SGD, 80, replace(VALUES, bytes_per_s=1e9), 0.9)
    assert longer is not None
    stretched = replace(VALUES, bytes_per_s=1e9, batch_s=VALUES.batch_s * longer)
    assert efficiency(LOAD, SGD, 80, stretched) == pytest.approx(0.9)


# The command


def test_the_command_draws_and_writes(tmp_path, capsys):
    page = tmp_path / "scaling.md"
    page.write_text("before\n<!-- scaling -->\nold\n<!-- end -->\nafter\n")
    stem = tmp_path / "figures" / "scaling"
    assert command.main(["--out", str(stem), "--write", str(page)]) == 0
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    drawing = stem.with_suffix(".svg").read_text()
    assert drawing.startswith("<?xml")
    assert "<svg" in drawing
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "Predicted, not measured" in text
    assert "not verified" in text
    assert "nan" not in text.lower().replace("manager", "")
    assert str(stem.with_suffix(".svg")) in capsys.readouterr().out


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn: (series, title, stem) of each figure."""
    found = []

    def draw(series, title, note, stem):
        found.append((series, title, stem))
        return []

    monkeypatch.setattr(figure, "draw", draw)
    return found


@pytest.mark.parametrize(("grows", "last"), [("q", 160), ("N", 256)])
def test_weak_scaling_of_ranks_that_draw_their_own(grows, last, drawn):
    args = ["--scaling", "weak", "--grows", grows, "--placement", "shard", "--machine", "a100"]
    assert command.main(args) == 0
    ((series, title, stem),) = drawn
    assert stem == Path(".benchmarks/scaling/runs/a100"), "git ignores it"
    assert "shard" in title
    assert "predicted, not measured" in title
    for line in series:
        assert line.worlds[-1] == last
        assert not line.measured
    # Hooks lose to nothing but the largest draw; at q = 1 all draws are equal.
    assert (series[2].efficiency[-1].likely < 0.97) == (grows == "N")


def test_given_ranges_are_named_as_such(tmp_path, drawn):
    page = tmp_path / "page.md"
    page.write_text("<!-- scaling -->\n<!-- end -->\n")
    assert command.main(["--bytes-per-s", "1e9", "1e9", "1e9", "--write", str(page)]) == 0
    assert "given on the command line" in page.read_text()
    assert drawn[0][2] == tmp_path / "page", "beside the page"
    assert command.main(["--alpha-s", "3", "2", "1"]) == 2


def test_a_page_that_cannot_be_written_is_named(tmp_path, drawn, capsys):
    page = tmp_path / "page.md"
    assert command.main(["--write", str(page)]) == 2
    assert not drawn
    said = capsys.readouterr().err
    for words in (str(page), "No such file", "<!-- scaling --> … <!-- end -->"):
        assert words in said
    page.write_text("no marks\n")
    with pytest.raises(saved.Unusable, match=r"page.md has no marks <!-- measured -->"):
        command.write("new", page, command.MEASURED)
    assert page.read_text() == "no marks\n"


def test_a_measured_run_is_fitted_and_drawn(tmp_path, capsys):
    data = synthetic((1, 2, 4), alpha=1e-3, beta=1e9, noise=0.01, sizes=(1e6,))
    path = tmp_path / "run.json"
    more = {"schema": 1, "framework": "torch", "model": "m", "status": "ok"}
    path.write_text(json.dumps({"rows": [row | more for row in data], "machine_info": {}}))
    assert command.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "hold-out" in said
    assert "Amdahl" in said
    assert "USL" in said
    assert (tmp_path / "run-torch-m-strong.png").exists()
    drawing = (tmp_path / "run-torch-m-strong.svg").exists()
    assert drawing
    ((_, note, series),) = measured.groups(saved.load(path)).values()
    assert "fitted to W ≤ 2" in note
    assert all(len(line.measured) == 3 for line in series)
    assert command.main([str(tmp_path / "missing.json")]) == 2


def test_the_page_is_what_the_command_writes():
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = page.partition(command.MARK)[2].partition(command.END)[0]
    slowdowns = inputs.measured_slowdowns(ROOT / ".benchmarks")
    assert found == report.markdown(inputs.LOAD, inputs.MACHINES["v100"], slowdowns)
    assert all(
        len(line.rates) for line in figure.predicted(LOAD, [SGD], inputs.MACHINES["v100"], [1])
    )


def test_the_hold_out_on_the_page_is_that_of_the_committed_run():
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = page.partition(command.MEASURED)[2].partition(command.END)[0]
    run = saved.load(ROOT / ".benchmarks" / "cpu" / "multi.json")
    held = [line for line in measured.describe(run).splitlines() if "predicted" in line]
    assert len(held) == 12
    assert all(line in found for line in held)
    errors = [float(line.rpartition(" ")[2].rstrip("%")) for line in held]
    assert max(map(abs, errors)) < 25
