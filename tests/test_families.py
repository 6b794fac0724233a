"""BiT and text: every method against the oracle; weights, overrides, inputs, checkpoints."""

import functools
import importlib

import numpy as np
import pytest
from oracle import per_example_gradients
from safetensors.numpy import save_file

import dpsgd.jax.models
import dpsgd.torch.models
from dpsgd import METHODS, PrivacyConfig, data, models, reference, text
from dpsgd.train import train
from dpsgd.tree import take, tree_map
from perf.profiles import Case
from perf.protocol import Prepared

P = 4
TEXT = ["bert-test", "distilbert-test", "roberta-test", "gpt2-test"]
FAMILIES = ["bit-test", *TEXT]
FROZEN = [f"{name}-frozenemb" for name in TEXT]
TORCH, JAX = (
    [name for name, row in METHODS.items() if row.framework == framework]
    for framework in ("torch", "jax")
)
TOLERANCE = 1e-5  # of the sum's length: float32, through up to nine normalised layers
# Their position table is looked up once for the whole batch.
OPACUS_CANNOT = ["bert-test", "distilbert-test", "gpt2-test"]


def batch(spec, rows=P):
    rng = np.random.default_rng(3)
    targets = rng.integers(0, spec.num_classes, rows)
    if spec.is_text:
        return text.random_text(spec, (rows,), rng), targets
    return rng.standard_normal((rows, *spec.input_shape), np.float32), targets


def build(name, spec, clip_norm=0.5):
    framework = importlib.import_module(f"dpsgd.{METHODS[name].framework}.models")
    model = framework.build(spec, seed=1)
    config = PrivacyConfig(
        num_examples=1000, sample_rate=0.01, steps=10, noise_multiplier=0.0, clip_norm=clip_norm
    )
    optimizer, loss = framework.optimizer(model, "sgd", 1.0), framework.cross_entropy
    return METHODS[name].build(model, optimizer, config, loss=loss, physical_batch_size=P, seed=7)


@functools.cache
def gradients(model):
    spec = models.get(model)
    return per_example_gradients(spec, *batch(spec), seed=1)


def length(tree):
    return np.sqrt(sum(np.square(value).sum() for value in tree.values()))


def problem(name, model):
    """How far the clipped sum is from the oracle's, of its length, with garbage in the padding."""
    spec, mask = models.get(model), np.array([True, False, True, True])
    step, (inputs, targets) = build(name, spec), batch(spec)
    if METHODS[name].ours and not spec.is_text:
        inputs[~mask] = np.nan
    got = step.clipped_sum(*step.put(inputs, targets, mask))
    clip_norm = 0.5 if METHODS[name].private else np.inf
    want = reference.clipped_sum(gradients(model), mask, clip_norm)
    assert got.keys() == want.keys()
    return length({n: got[n] - want[n] for n in want}) / length(want)


@pytest.mark.parametrize("model", [*FAMILIES, *FROZEN])
@pytest.mark.parametrize("name", TORCH)
def test_every_method_matches_the_oracle_or_says_why_not(name, model):
    if name == "torch-vmap" and model != "bit-test":
        with pytest.raises(ValueError, match=r"attention mask.*torch-bookkeeping"):
            problem(name, model)
    elif "opacus" in name and model in OPACUS_CANNOT:
        with pytest.raises(RuntimeError):
            problem(name, model)
    else:
        assert problem(name, model) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "distilbert-test") for name in JAX),
        *((name, "bit-test") for name in ("jax-sgd-tuned", "jax-masked")),
        pytest.param("jax-ghost", "bit-test", marks=pytest.mark.slow),
        *(("jax-bookkeeping", name) for name in ("bit-test", "bert-test", "roberta-test")),
        *((name, "distilbert-test-frozenemb") for name in ("jax-masked", "jax-bookkeeping")),
    ],
)
def test_every_jax_method_matches_the_oracle(name, model):
    assert problem(name, model) < TOLERANCE


def test_the_comparison_sees_a_leak_of_the_padding():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsgd.torch.step.fill_rows", lambda mask, tree: tree)
        patch.setattr("torch.where", lambda mask, losses, zeros: losses)
        assert problem("torch-sgd", "distilbert-test") > 100 * TOLERANCE


@pytest.mark.parametrize("model", FAMILIES)
def test_every_gradient_is_alive(model):
    lengths = [reference.norm(g) for g in gradients(model)]
    assert 0.1 < min(lengths) <= max(lengths) < 100
    for name in gradients(model)[0]:
        if not name.endswith(("key.bias", "k_lin.bias")):  # softmax does not see them
            assert max(np.abs(g[name]).max() for g in gradients(model)) > 1e-7, name


@pytest.mark.parametrize("model", FROZEN)
def test_frozen_embeddings_are_the_tables_and_nothing_else(model):
    whole, some = (
        {name for name, p in dpsgd.torch.models.build(spec).named_parameters() if p.requires_grad}
        for spec in (models.get(model.removesuffix("-frozenemb")), models.get(model))
    )
    assert some < whole
    assert all({"embeddings", "wte", "wpe"} & {*name.split(".")} for name in whole - some)


def test_overrides_of_the_new_families():
    spec = models.get("distilbert-64tok-frozenemb-2blocks")
    assert (spec.sequence_length, spec.frozen_embeddings, spec.blocks) == (64, True, 2)
    assert models.get("bit-r50x1-128px").image_size == 128
    with pytest.raises(ValueError, match="takes px, not blocks"):
        models.get("bit-r50x1-2blocks")
    with pytest.raises(ValueError, match="takes tok, blocks, frozenemb, not px"):
        models.get("distilbert-64px")
    with pytest.raises(ValueError, match="takes 2 to 512 tokens"):
        models.get("roberta-base-513tok")
    with pytest.raises(ValueError, match="takes px, blocks, not frozenemb"):
        models.get("vit-ti16-frozenemb")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("bit-r50x1", 23.7), ("bert-base", 109.5), ("distilbert", 67.0), ("gpt2", 124.4)],
)
def test_sizes_are_those_of_the_published_models(name, millions):
    import torch

    with torch.device("meta"):
        model = dpsgd.torch.models.skeleton(models.get(name))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.1


def test_text_has_variable_lengths_and_repeated_tokens():
    spec = models.get("roberta-base")
    found = text.random_text(spec, (3, 50), np.random.default_rng(0))
    ids, mask = found["input_ids"], found["attention_mask"]
    assert ids.shape == mask.shape == (3, 50, 128)
    assert ids.dtype == mask.dtype == np.int64
    lengths = mask.sum(-1)
    assert (lengths.min(), lengths.max()) == (64, 128)
    assert ((ids == spec.pad) == (mask == 0)).all()
    assert (ids >= 0).all()
    assert (ids < spec.vocabulary).all()
    distinct = [len({*row[:64]}) for row in ids.reshape(-1, 128)]
    assert np.mean(distinct) < 56, "tokens repeat within an example"


def test_synthetic_text_follows_its_seed():
    spec = models.get("bert-test")
    one, same, other = (data.load("synthetic", spec, seed=seed) for seed in (1, 1, 2))
    (inputs, targets), (again, _), (fresh, _) = (d.batch(np.arange(5)) for d in (one, same, other))
    assert tree_map(np.shape, inputs) == {"input_ids": (5, 8), "attention_mask": (5, 8)}
    assert targets.shape == (5,)
    np.testing.assert_array_equal(inputs["input_ids"], again["input_ids"])
    assert (inputs["input_ids"] != fresh["input_ids"]).any()
    assert [len(t) for _, t in one.test_batches(400)] == [400, 100]
    with pytest.raises(ValueError, match="bert-test takes text: use synthetic"):
        data.load("digits", spec)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["torch-bookkeeping", "jax-bookkeeping"])
def test_a_text_model_learns_privately(method):
    options = {"noise_multiplier": 0.3, "sample_rate": 0.1, "steps": 40, "seed": 1}
    found = train(method=method, model="distilbert-test", data="synthetic", **options)
    assert found.test_accuracy > 0.5, "a third is chance"


@pytest.mark.parametrize("model", FAMILIES)
def test_a_checkpoint_of_the_bare_backbone_loads(tmp_path, model):
    spec = models.get(model)
    values = {
        name: p.detach().numpy().copy()
        for name, p in dpsgd.torch.models.build(spec, seed=9).named_parameters()
    }
    heads = ("classifier", "pre_classifier", "score")
    bare = {
        name.partition(".")[2].replace("LayerNorm.weight", "LayerNorm.gamma"): value
        for name, value in values.items()
        if name.split(".")[0] not in heads
    }
    save_file(bare, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="keep their initial values"):
        loaded = dpsgd.torch.models.build(spec, seed=1, weights=tmp_path)
    for name, p in loaded.named_parameters():
        if name.split(".")[0] not in heads:
            np.testing.assert_array_equal(p.detach().numpy(), values[name])


def test_jax_says_that_it_has_no_twin():
    with pytest.raises(ValueError, match="gpt2-test has no JAX twin"):
        dpsgd.jax.models.build(models.get("gpt2-test"))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("torch-bookkeeping", "bit-test"),
        ("torch-bookkeeping", "distilbert-test-frozenemb"),
        ("torch-opacus", "bit-test"),
        ("torch-opacus", "distilbert-test-frozenemb"),
        ("jax-masked", "distilbert-test-frozenemb"),
        pytest.param("jax-bookkeeping", "bit-test", marks=pytest.mark.slow),
    ],
)
def test_the_check_before_timing_takes_dicts(name, model):
    case = Case(model=model, physical_batch=8, method=name, wanted_batch=16)
    prepared = Prepared(case, "cpu", ragged=True)
    assert prepared.reference.problem(prepared.step)[0] == ""
    before = take(prepared.inputs, 0)
    ours = METHODS[name].ours
    for real, shown in zip(
        *(x.values() if isinstance(x, dict) else [x] for x in (before, prepared.reference.inputs)),
        strict=True,
    ):
        np.testing.assert_array_equal(real[:3], shown[:3])
        assert np.array_equal(real[3:], shown[3:]) is not ours
    prepared.run(0)
