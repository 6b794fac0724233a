"""Book-keeping and ghost clipping on unmodified Hugging Face models."""

import functools
import itertools
import warnings

import hf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_steps import OURS, P, assert_right, build, gradients

from dpsgd import PrivacyConfig, cost, reference


@functools.cache
def prepared(name, method="torch-bookkeeping"):
    model = hf.build(name)
    step = build(model, method=method)
    inputs, targets = hf.batch(name, P)
    step.norms(*step.put(inputs, targets, np.ones(P, bool)))
    return model, step, dict(step.ways)


@pytest.mark.parametrize("name", hf.BUILD)
@settings(max_examples=6)
@given(
    way=st.sampled_from([None, *cost.WAYS]),
    mask=st.lists(st.booleans(), min_size=P, max_size=P),
    seed=st.integers(0, 99),
)
def test_models_of_hugging_face(name, way, mask, seed):
    model, step, ways = prepared(name)
    step.ways = {
        choice.layer.name: way if way in choice.layer.ways else ways[choice.layer.name]
        for choice in step.plan
    }
    assert_right(step, model, *hf.batch(name, P, seed), np.array(mask))


@pytest.mark.parametrize("name", hf.BUILD)
def test_ghost_on_models_of_hugging_face(name):
    model, step, _ = prepared(name, "torch-ghost")
    assert_right(step, model, *hf.batch(name, P, 3), np.array([True, False, True, True]))


@pytest.mark.parametrize(
    ("name", "method", "generated"),
    [
        ("vit", OURS[0], False),
        # Capturing a graph depends on the model; generating code for it, hardly.
        *(
            pytest.param(name, method, name == "vit", marks=pytest.mark.slow)
            for name, method in itertools.product(hf.BUILD, OURS)
        ),
    ],
)
def test_compiled_in_one_graph(name, method, generated, request):
    if not generated:
        request.getfixturevalue("captured")
    model = hf.build(name)
    step = build(model, method=method, compile=True)
    before = step.compiles()
    inputs, targets = hf.batch(name, P)
    for mask in ([True, True, False, True], [False] * P):
        placed = step.put(inputs, targets, np.array(mask))
        got = step.clipped_sum(*placed)
        step.compile = False
        want = step.clipped_sum(*placed)
        step.compile = True
        for n in want:
            np.testing.assert_allclose(got[n], want[n], atol=1e-5)
    assert step.compiles() - before == 1


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("name", ["vit", "bit", "bert"])
def test_bf16(name, method):
    model = hf.build(name)
    step = build(model, method=method, precision="bf16")
    same = {"tolerance": 1e-2, "dtype": torch.bfloat16}
    assert_right(step, model, *hf.batch(name, P), np.ones(P, bool), **same)


def test_nothing_of_hugging_face_falls_back():
    for name in hf.BUILD:
        kinds = {type(rule).__name__ for rule in prepared(name)[1].recorder.rules}
        assert "Other" not in kinds, name


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_gradient_checkpointing(name, method):
    model = hf.build(name)
    model.train()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_right(build(model, method=method), model, *hf.batch(name, P), np.ones(P, bool))


@pytest.mark.parametrize("method", OURS)
def test_frozen_parts_stay_out(method):
    model = hf.build("distilbert")
    for p in model.distilbert.embeddings.parameters():
        p.requires_grad_(False)
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and not n.endswith("q_lin.bias"))
    step = build(model, method=method)
    assert_right(step, model, *hf.batch("distilbert", P), np.ones(P, bool))
    assert not model.distilbert.embeddings.word_embeddings.weight.requires_grad
    assert model.classifier.weight.requires_grad


@pytest.mark.parametrize("method", OURS)
def test_lora(method):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(hf.build("bert"), config)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p)
    step = build(model.eval(), method=method)
    assert_right(step, model, *hf.batch("bert", P), np.ones(P, bool))


def test_one_example_at_a_time_and_short_batches():
    model = hf.build("vit")
    inputs, targets = hf.batch("vit", 3)
    for rows in (1, 3):
        step = build(model)
        assert_right(step, model, inputs[:rows], targets[:rows], np.ones(rows, bool))


@pytest.mark.parametrize("method", OURS)
def test_a_compiled_step_heeds_another_configuration(method, captured):
    model, (inputs, targets) = hf.build("vit"), hf.batch("vit", P)
    step = build(model, method=method, compile=True, clip_norm=1e3)
    placed = step.put(inputs, targets, np.ones(P, bool))
    step.clipped_sum(*placed)
    step.privacy = PrivacyConfig(
        num_examples=1000, sample_rate=0.01, noise_multiplier=1e6, clip_norm=1e-3, steps=10
    )
    rows = list(gradients(model, inputs, targets))
    want = reference.clipped_sum(rows, np.ones(P, bool), 1e-3)
    for n, got in step.clipped_sum(*placed).items():
        np.testing.assert_allclose(got, want[n], atol=1e-7)
    before = step.parameters()
    step.update()
    moved = np.concatenate([(p - before[n]).ravel() for n, p in step.parameters().items()])
    assert moved.std() == pytest.approx(1e6 * 1e-3 / 10, rel=0.1)
