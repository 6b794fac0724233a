"""Interrupted runs: the same end with their keys, a higher ε without, and no secret in the open."""

import errno
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_faults import Memory

from dpsgd import checkpoint, data, loop, privacy
from dpsgd.checkpoint import Folder, Keys
from dpsgd.jax.step import JaxStep
from dpsgd.ranks import Ranks
from dpsgd.torch.step import TorchStep
from dpsgd.train import main, train

STEPS, EVERY = 8, 3
OPTIONS = {
    "steps": STEPS,
    "sample_rate": 0.02,
    "noise_multiplier": 1.0,
    "checkpoint_every": EVERY,
    "device": "cpu",
}
LINE = ["--device", "cpu", "--noise-multiplier", "1", "--sample-rate", "0.02", "--steps", "8"]


class Killed(BaseException):
    """The process is gone: nobody cleans up."""


def base(method="torch"):
    return JaxStep if method.startswith("jax") else TorchStep


def run_until(monkeypatch, at, after, **options):
    """Train and be killed in update ``at``, before or after the optimizer."""
    of = base(options.get("method", "torch"))
    with monkeypatch.context() as patch:
        real, calls = of.update, []

        def update(self):
            calls.append(None)
            if len(calls) == at:
                if after:
                    real(self)
                raise Killed
            real(self)

        patch.setattr(of, "update", update)
        with pytest.raises(Killed):
            train(**OPTIONS, **options)


def parameters(result):
    return np.concatenate([p.ravel() for p in result.step.parameters().values()])


@pytest.mark.parametrize(
    ("method", "optimizer", "after"),
    [
        ("torch-bookkeeping", "adam", True),
        ("torch-vmap", "sgd", False),
        ("torch-sgd", "adam", False),
        ("jax-bookkeeping", "adam", True),
        ("jax-sgd", "sgd", False),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(monkeypatch, tmp_path, method, optimizer, after):
    options = {"method": method, "optimizer": optimizer, "learning_rate": 0.01}
    whole = train(**OPTIONS, **options, seed=3)
    run_until(monkeypatch, 5, after, **options, seed=3, checkpoint=tmp_path)
    resumed = train(**OPTIONS, **options, checkpoint=tmp_path, resume=True)  # keys of the file
    np.testing.assert_array_equal(parameters(resumed), parameters(whole))
    assert resumed.steps == whole.steps == STEPS, "the steps after the checkpoint are charged once"
    assert resumed.epsilon == whole.epsilon


def test_opacus_resumes_too(monkeypatch, tmp_path):
    from dpsgd.torch.methods.opacus import Opacus

    whole = train(**OPTIONS, method="torch-opacus", seed=3)
    with monkeypatch.context() as patch:
        real = Opacus.update
        patch.setattr(Opacus, "update", lambda self: real(self) if self.done < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(**OPTIONS, method="torch-opacus", seed=3, checkpoint=tmp_path)
    resumed = train(**OPTIONS, method="torch-opacus", checkpoint=tmp_path, resume=True)
    np.testing.assert_array_equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("method", ["torch-vmap", "jax-masked"])
@pytest.mark.parametrize("forgotten", ["the number of the step", "the optimizer", "the draws"])
def test_the_comparison_rejects_what_is_forgotten(monkeypatch, tmp_path, method, forgotten):
    options = {**OPTIONS, "method": method}
    whole = train(**options, seed=3)
    run_until(monkeypatch, 5, True, method=method, seed=3, checkpoint=tmp_path)
    restore = base(method).restore
    if forgotten == "the number of the step":
        monkeypatch.setattr(base(method), "restore", lambda self, state, _: restore(self, state, 0))
    elif forgotten == "the optimizer":

        def model_alone(self, state, done):
            of_model = {n: a for n, a in state.items() if not n.startswith("optimizer")}
            fresh = {n: a for n, a in self.state().items() if n.startswith("optimizer")}
            restore(self, of_model | fresh, done)

        monkeypatch.setattr(base(method), "restore", model_alone)
    else:
        from dpsgd import train as module

        real = module.rank_batches
        monkeypatch.setattr(module, "rank_batches", lambda *a, done, **o: real(*a, done=0, **o))
    resumed = train(**options, checkpoint=tmp_path, resume=True)
    assert not np.array_equal(parameters(resumed), parameters(whole))


def test_without_its_keys_the_repeated_steps_are_charged_again(monkeypatch, tmp_path, capsys):
    run_until(monkeypatch, 5, False, checkpoint=tmp_path)  # steps 4 and 5 are after the checkpoint
    before = (tmp_path / "keys").read_bytes()
    (tmp_path / "keys").unlink()
    resumed = train(**OPTIONS, checkpoint=tmp_path, resume=True)
    assert resumed.steps == 5 + (STEPS - EVERY)
    want = privacy.epsilon(sample_rate=0.02, noise_multiplier=1.0, steps=10, delta=1e-5)
    assert resumed.epsilon == want
    assert (tmp_path / "keys").read_bytes() != before
    # Once more, with the new keys: nothing is left to do and nothing new is charged.
    again = train(**OPTIONS, checkpoint=tmp_path, resume=True)
    np.testing.assert_array_equal(parameters(again), parameters(resumed))
    assert again.steps == resumed.steps
    assert main([*LINE, "--checkpoint-every", "3", "--checkpoint", str(tmp_path), "--resume"]) == 0
    assert "T=10, PLD" in capsys.readouterr().out


def test_other_data_never_meet_the_same_noise(monkeypatch, tmp_path):
    run_until(monkeypatch, 5, False, checkpoint=tmp_path)
    before = json.loads((tmp_path / "keys").read_text())
    load = data.load

    def changed(*args, **options):
        dataset = load(*args, **options)
        dataset.train_inputs[7, 0, 3, 3] ^= 1
        return dataset

    monkeypatch.setattr(data, "load", changed)
    resumed = train(**OPTIONS, checkpoint=tmp_path, resume=True)
    after = json.loads((tmp_path / "keys").read_text())
    assert after["noise"] != before["noise"]
    assert resumed.steps == 5 + (STEPS - EVERY), "those that are repeated are charged again"
    assert train(**OPTIONS, checkpoint=tmp_path, resume=True).steps == resumed.steps


def test_keys_are_private_and_nowhere_else(monkeypatch, tmp_path, capfd):
    run_until(monkeypatch, 5, False, checkpoint=tmp_path)
    train(**OPTIONS, checkpoint=tmp_path, resume=True, report=print)
    file = tmp_path / "keys"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secret = json.loads(file.read_text())
    shown = "".join(capfd.readouterr()).encode()
    others = [shown] + [p.read_bytes() for p in tmp_path.iterdir() if p != file]
    assert len(others) == 3
    for key in (secret["sampling"], secret["noise"]):
        words = [str(key).encode(), f"{key:x}".encode()]
        for order in ("little", "big"):
            data = key.to_bytes(16, order)
            words += [data, data[:4], data[-4:]]
        assert not any(word in text for word in words for text in others)
    assert str(secret["noise"]) not in repr(Keys(**secret))


def test_a_crash_while_saving_leaves_the_older_checkpoint(monkeypatch, tmp_path):
    whole = train(**OPTIONS, seed=3)
    real = os.replace

    def replace(source, target):
        if target.name == "checkpoint.npz" and target.exists():
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(**OPTIONS, seed=3, checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.npz", "keys", "ledger"]
    resumed = train(**OPTIONS, checkpoint=tmp_path, resume=True)
    np.testing.assert_array_equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize(("what", "call", "begun"), [("begin", 3, 2), ("save", 2, 3)])
def test_a_full_disk_states_what_was_spent(monkeypatch, tmp_path, capsys, what, call, begun):
    real, calls = getattr(Folder, what), []

    def full(self, *args):
        calls.append(None)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *args)

    line = [*LINE, "--checkpoint-every", "3", "--checkpoint", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Folder, what, full)
        assert main(line) == 70
    (said,) = capsys.readouterr().err.strip().splitlines()
    spent = privacy.epsilon(sample_rate=0.02, noise_multiplier=1.0, steps=begun, delta=1e-5)
    assert f"{tmp_path} cannot be written (No space left on device)" in said
    assert f"after {begun} of 8 steps, which spent ε = {loop.rounded_up(spent)} at δ" in said
    assert main([*line, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resume", "--learning-rate", "0.02"], "learning_rate=0.01, not 0.02"),
        (["--resume", "--clip-norm", "2"], "clip_norm=1.0, not 2.0"),
        (["--resume", "--method", "torch-ghost"], "method='torch-bookkeeping', not 'torch-ghost'"),
        ([], "holds a run already: resume it"),
    ],
)
def test_another_run_in_the_folder_is_refused(tmp_path, capsys, options, words):
    line = [*LINE, "--checkpoint", str(tmp_path)]
    assert main([*line, "--steps", "1"]) == 0
    assert main([*line, "--steps", "1", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "is damaged"),
        (lambda f: f.write_bytes(b""), "is damaged"),
        (lambda f: np.savez(f, other=np.zeros(2)), "not of dpsgd"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, capsys, damage, words):
    line = [*LINE, "--checkpoint", str(tmp_path), "--steps", "1"]
    assert main(line) == 0
    damage(tmp_path / "checkpoint.npz")
    assert main([*line, "--resume"]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*LINE, "--checkpoint", str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "exists" in line


def test_frozen_parameters_must_be_those_of_the_beginning(tmp_path):
    options = {
        **{"method": "jax-masked", "model": "distilbert-test-frozenemb", "data": "synthetic"},
        **{"device": "cpu", "steps": 1, "sample_rate": 0.002, "noise_multiplier": 1.0},
        **{"physical_batch_size": 2, "checkpoint": tmp_path, "resume": True},
    }
    train(**options, seed=1)
    with pytest.raises(ValueError, match="frozen parameters are not those"):
        train(**options)  # its embeddings would be those of another seed
    assert train(**options, seed=1).seeded


def test_whether_keys_came_from_a_seed_stays_known(tmp_path, capsys):
    line = [*LINE, "--steps", "1", "--checkpoint", str(tmp_path), "--resume"]
    assert main([*line, "--seed", "3"]) == 0
    assert main(line) == 0
    (tmp_path / "keys").unlink()  # its first step was drawn from the seed nevertheless
    assert main(line) == 0
    assert capsys.readouterr().out.count("the seed is fixed") == 3


def test_options_that_cannot_work_are_refused(capsys):
    assert main([*LINE, "--resume"]) == 2
    assert "resume needs" in capsys.readouterr().err
    assert main([*LINE, "--checkpoint-every", "0"]) == 2
    assert "checkpoint_every is 0" in capsys.readouterr().err


class Counter:
    """A step that counts."""

    def __init__(self):
        self.done = 0

    def state(self):
        return {"model/count": np.array(self.done)}

    def restore(self, state, done):
        self.done = done


def begun(tmp_path, steps, resume=False):
    folder = Folder(tmp_path, Ranks(), {"lr": 1.0}, resume=resume)
    folder.keys(None)
    folder.restore(Counter())
    for number in range(1, steps + 1):
        folder.begin(number)
    return folder


def test_a_ledger_that_was_cut_off_counts_its_last_line(tmp_path):
    assert begun(tmp_path, 3).charged == 3
    ledger = tmp_path / "ledger"
    ledger.write_bytes(ledger.read_bytes() + b"0000 0000")
    assert begun(tmp_path, 4, resume=True).charged == 5


def test_a_ledger_that_lost_steps_is_refused(tmp_path):
    folder = begun(tmp_path, 3)
    folder.save(Counter())
    ledger = tmp_path / "ledger"
    ledger.write_bytes(ledger.read_bytes()[:28])
    with pytest.raises(ValueError, match="lacks steps"):
        Folder(tmp_path, Ranks(), {"lr": 1.0}, resume=True)


def of_all_ranks(path, world, seed=None):
    """The keys of all ranks of one launch."""
    store, found = Memory(), [None] * world

    def rank(number):
        ranks = Ranks(rank=number, world=world, store=store)
        folder = Folder(path, ranks, {"lr": 1.0}, resume=True)
        found[number] = folder.keys(seed)
        folder.restore(Counter())

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert f"{found[0].sampling:032x}" not in store.values(), "it stays with the ranks"
    return found


def test_ranks_share_the_sampling_key_and_nothing_else(tmp_path):
    keys = of_all_ranks(tmp_path, 3)
    assert len({k.sampling for k in keys}) == 1
    assert len({k.noise for k in keys}) == 3
    assert of_all_ranks(tmp_path, 3) == keys


@pytest.mark.parametrize("blind", [0, 1])
def test_a_folder_that_a_rank_does_not_share_is_refused_untouched(tmp_path, blind):
    shared, store = tmp_path / "shared", Memory()
    of_all_ranks(shared, 3)
    before = {path.name: path.read_bytes() for path in shared.iterdir()}

    def refused(number):
        ranks = Ranks(rank=number, world=3, store=store)
        path = tmp_path / "own" if number == blind else shared
        with pytest.raises(ValueError, match=rf"rank {blind} does not see the .*checkpoint.npz"):
            Folder(path, ranks, {"lr": 1.0}, resume=True)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(refused, range(3))) == [None] * 3
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == before


@pytest.mark.parametrize("change", ["one rank's keys are lost", "another number of ranks"])
def test_keys_that_do_not_fit_are_replaced_on_all_ranks(tmp_path, change):
    keys = of_all_ranks(tmp_path, 3)
    if change.startswith("one"):
        (tmp_path / "keys.1").unlink()
    fresh = of_all_ranks(tmp_path, 3 if change.startswith("one") else 2)
    assert len({k.sampling for k in fresh}) == 1
    assert not {k.noise for k in fresh} & {k.noise for k in keys}
    assert fresh[0].sampling != keys[0].sampling


def test_another_number_of_devices_gets_fresh_keys(tmp_path):
    def keys(shares):
        return Folder(tmp_path, Ranks(), {"lr": 1.0}, resume=True).keys(None, shares)

    begun(tmp_path, 1)
    (tmp_path / "keys").unlink()
    one, again, two = keys(1), keys(1), keys(2)
    assert one == again
    assert two.noise != one.noise, "z and (z + z')/√2 together would tell more than is charged"


def test_a_seed_never_repeats_a_key_that_was_lost(tmp_path):
    (first,) = of_all_ranks(tmp_path, 1, seed=5)
    Folder(tmp_path, Ranks(), {"lr": 1.0}, resume=True).keys(5)
    begun(tmp_path, 1, resume=True)
    (tmp_path / "keys").unlink()
    (second,) = of_all_ranks(tmp_path, 1, seed=5)
    assert first != second
    assert checkpoint.Keys.fresh(Ranks(), 5) == first
