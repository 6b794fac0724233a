"""The command line and `train`: what they reach, what they say, what they keep secret."""

import contextlib
import math
import statistics
import warnings

import numpy as np
import pytest
from test_faults import Memory

from dpsgd import loop, privacy
from dpsgd import train as cli
from dpsgd.ranks import Ranks
from dpsgd.torch import models as torch_models
from dpsgd.torch.methods.vmap import Vmap
from dpsgd.train import main, train
from dpsgd.watch import Watch

QUICK = ["--steps", "3", "--sample-rate", "0.1", "--noise-multiplier", "1", "--device", "cpu"]
PUBLIC = {"sample_rate": 256 / 1437, "steps": 200, "delta": 1e-5}


@pytest.fixture(scope="module")
def sigma():
    """σ of the defaults, calibrated once."""
    return privacy.noise_multiplier(8.0, **PUBLIC)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sample-rate", "0"], "sample_rate is 0.0; it must"),
        (["--sample-rate", "nan"], "sample_rate is nan; it must"),
        (["--epsilon", "0"], "epsilon is 0.0; it must"),
        (["--method", "torch-vmpa"], "did you mean torch-vmap"),
        (["--method", "jax-mask"], "did you mean jax-masked"),
        (["--model", "digits"], "did you mean digits-cnn"),
        (["--data", "cifar100"], "--data-dir"),
        (["--data", "cifar100", "--data-dir", "/nowhere"], "no CIFAR-100 in /nowhere: it must"),
        (["--weights", "/nowhere"], "no *.safetensors"),
        (["--steps", "0"], "steps is 0; it must"),
        (["--physical-batch-size", "0"], "physical_batch_size is 0; it must"),
        (["--learning-rate", "nan"], "learning_rate is nan; it must"),
        (["--seed", "-1"], "seed is -1; it must"),
        (["--timeout", "0"], "timeout_s is 0.0; it must"),
    ],
)
def test_a_bad_option_is_one_sentence_and_exit_2(capsys, options, words):
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dpsgd.train: ")
    assert err.count("\n") == 1
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("method", ["torch-vmap", "jax-masked"])
def test_a_missing_device_is_one_sentence(capsys, monkeypatch, method):
    import jax
    import torch

    def none(*_):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jax, "devices", none)
    assert main(["--method", method, "--device", "cuda"]) == 2
    assert "device here" in capsys.readouterr().err


def test_a_missing_device_is_one_sentence_on_many_ranks_too(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--device", "cuda"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "install a CUDA build of it, or use --device cpu" in said


def test_epsilon_and_sigma_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--epsilon", "8", "--noise-multiplier", "1"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    with pytest.raises(ValueError, match="choose one"):
        train(epsilon=8, noise_multiplier=1)


def test_the_default_output_holds_nothing_of_the_training_data(capsys):
    assert main(QUICK) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["σ", "test", "ε"]
    assert "loss" not in out.lower()
    assert "B =" not in out
    assert "clipped" not in out
    assert lines[-1].endswith("at δ = 1e-05 (add/remove one, Poisson q=0.1, T=3, PLD)")


def test_diagnostics_mark_the_run(capsys):
    assert main([*QUICK, "--diagnostics"]) == 0
    out = capsys.readouterr().out
    assert out.count("B = ") == 3
    assert out.count("clipped fraction") == 3
    assert out.splitlines()[-1].endswith("outside the privacy guarantee")


def test_no_noise_is_an_infinite_epsilon(capsys):
    assert main([*QUICK, "--noise-multiplier", "0", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "ε = inf at δ = 1e-05" in out
    assert "the seed is fixed" in out


@pytest.mark.parametrize("options", [[], ["--diagnostics"]])
def test_a_method_without_privacy_claims_none(capsys, options):
    assert main([*QUICK, "--method", "torch-sgd", *options]) == 0
    out = capsys.readouterr().out
    assert "no privacy: plain SGD" in out
    assert "ε" not in out
    assert "σ" not in out


def test_a_shown_epsilon_is_never_rounded_down():
    assert loop.rounded_up(7.991) == "8.00"
    assert loop.rounded_up(8.001) == "8.01"
    assert loop.rounded_up(math.inf) == "inf"


@pytest.mark.parametrize(("where", "begun"), [("accumulate", 2), ("update", 3)])
def test_ctrl_c_states_what_was_spent(capsys, monkeypatch, where, begun):
    calls, original = [], getattr(Vmap, where)

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Vmap, where, interrupted)
    options = ["--noise-multiplier", "1", "--sample-rate", "0.1", "--physical-batch-size", "2000"]
    assert main([*options, "--method", "torch-vmap", "--device", "cpu"]) == 130
    out = capsys.readouterr().out
    spent = privacy.epsilon(sample_rate=0.1, noise_multiplier=1, steps=begun, delta=1e-5)
    assert f"after {begun} of 200 steps" in out
    assert f"ε = {loop.rounded_up(spent)} at" in out
    assert f"T={begun}, PLD" in out


def test_ctrl_c_in_the_evaluation_states_what_was_spent(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_accuracy", interrupted)
    assert main(QUICK) == 130
    out = capsys.readouterr().out
    assert "after 3 of 3 steps" in out
    assert "T=3, PLD" in out


def test_others_wait_for_each_chunk_of_the_evaluation_and_not_for_ever(monkeypatch):
    watch, found, predict = Watch(0, 1, Memory()), [], torch_models.predict

    def seen(*args):
        found.append((watch._state["progress"], watch._state["patience_s"]))
        return predict(*args)

    monkeypatch.setattr(cli, "joined", lambda *_: contextlib.nullcontext(Ranks(watch=watch)))
    monkeypatch.setattr(cli, "_TEST_CHUNK", 100)
    monkeypatch.setattr(torch_models, "predict", seen)
    train(steps=1, sample_rate=0.05, noise_multiplier=1.0, device="cpu")
    progress, patience = zip(*found, strict=True)
    assert len({*progress}) == 4, "360 images, 100 at a time"
    assert {*patience} == {watch.first_timeout_s}
    assert watch._state["at"] == "the evaluation"


def test_compiled_steps_get_padded_batches(monkeypatch):
    sizes, original = [], Vmap.accumulate

    def seen(self, *batch):
        sizes.append(len(batch[2]))
        return original(self, *batch)

    monkeypatch.setattr(Vmap, "accumulate", seen)
    monkeypatch.setattr(Vmap, "compiled", lambda self, function: function)
    options = {"method": "torch-vmap", "steps": 3, "sample_rate": 0.1, "noise_multiplier": 1.0}
    options |= {"device": "cpu", "seed": 1}
    train(**options, compile=True)
    assert {*sizes} == {64}
    train(**options)
    assert len({*sizes}) > 2


def test_ctrl_c_before_the_first_step_spends_nothing(capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.datasets, "load", interrupted)
    assert main(QUICK) == 130
    assert "nothing is spent" in capsys.readouterr().out


def test_a_seed_repeats_a_run_and_none_does_not():
    options = {"steps": 2, "sample_rate": 0.05, "noise_multiplier": 1.0}
    first, again, fresh = (
        train(**options, seed=seed, device="cpu").step.parameters()["linear.weight"]
        for seed in (0, 0, None)  # None starts from the weights of seed 0 too
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(fresh, first)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["torch-vmap", "jax-masked"])
def test_the_defaults_reach_their_accuracy(method, sigma):
    results = [train(method=method, noise_multiplier=sigma, seed=s, device="cpu") for s in range(3)]
    assert statistics.median(r.test_accuracy for r in results) >= 0.94
    assert results[0].epsilon <= 8
    assert (results[0].delta, results[0].neighbours) == (1e-5, "add_remove")


def test_a_warning_is_one_sentence(capsys, sigma):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["--steps", "1", "--noise-multiplier", "1", "--delta", "0.01"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dpsgd.train: warning: delta=0.01 is not below 1/N")
