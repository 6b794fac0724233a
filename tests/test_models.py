"""The two frameworks hold the same models: names, weights, logits, checkpoints."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file

import dpsgd.jax.models
import dpsgd.torch.models
from dpsgd import models
from dpsgd.jax import weights
from dpsgd.text import random_text
from dpsgd.tree import tree_map


def logits(spec, **options):
    rng = np.random.default_rng(0)
    if spec.is_text:
        inputs = random_text(spec, (3,), rng)
    else:
        inputs = rng.standard_normal((3, *spec.input_shape), np.float32)
    found = []
    for framework, place in (dpsgd.torch.models, torch.from_numpy), (dpsgd.jax.models, nhwc):
        model = framework.build(spec, **options)
        model.eval()
        with torch.no_grad():
            found.append(np.asarray(framework.logits(model, tree_map(place, inputs))))
    return found


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array.astype(np.int32))


SMALL = ["digits-cnn", "vit-test", "vit-ti16-64px", "vit-s16-32px-2blocks", "bit-test"]
SMALL += ["bert-test", "distilbert-test", "roberta-test"]
LARGE = ["bit-r50x1-96px", "bert-base-16tok", "distilbert-16tok-frozenemb", "roberta-base-16tok"]


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in LARGE)]
)
def test_logits_agree(name):
    torch_logits, jax_logits = logits(models.get(name), seed=3)
    spread = np.ptp(torch_logits)
    assert spread > 5e-3
    np.testing.assert_allclose(jax_logits, torch_logits, atol=1e-4 * min(spread, 1))


@pytest.mark.parametrize("name", ["bit-test", "distilbert-test-frozenemb"])
def test_the_same_parameters_are_trained(name):
    spec = models.get(name)
    theirs = weights.dump(nnx.state(dpsgd.jax.models.build(spec), nnx.Param))
    ours = dpsgd.torch.models.build(spec).named_parameters()
    assert theirs.keys() == {n for n, p in ours if p.requires_grad}


def parameters(spec, seed=0):
    model = dpsgd.torch.models.build(spec, seed=seed)
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def test_weights_go_there_and_back():
    spec = models.get("vit-test")
    values = parameters(spec, seed=5)
    state = nnx.state(dpsgd.jax.models.build(spec, seed=0), nnx.Param)
    weights.fill(state, values)
    back = weights.dump(state)
    assert back.keys() == values.keys()
    for name in values:
        np.testing.assert_array_equal(back[name], values[name])


def old(name):
    """The name in a checkpoint of an older transformers, without the task's prefix."""
    for new, was in (
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
        ("vit.layers.", "vit.encoder.layer."),
    ):
        name = name.replace(new, was)
    return name.removeprefix("vit.")


@pytest.mark.parametrize("rename", [str, old])
def test_a_checkpoint_loads_into_both(tmp_path, rename):
    spec = models.get("vit-test")
    values = {rename(n): np.ascontiguousarray(v) for n, v in parameters(spec, seed=9).items()}
    save_file(values, tmp_path / "model.safetensors")
    torch_logits, jax_logits = logits(spec, weights=tmp_path)
    np.testing.assert_allclose(jax_logits, torch_logits, atol=1e-4)
    np.testing.assert_allclose(torch_logits, logits(spec, seed=9)[0], atol=1e-6)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    spec = models.get("vit-test")
    with pytest.raises(ValueError, match=r"no .*safetensors"):
        dpsgd.jax.models.build(spec, weights=tmp_path)
    values = parameters(spec)
    values["vit.layernorm.bias"] = np.zeros(3, np.float32)
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"vit.layernorm.bias needs shape \(16,\).*\(3,\)"):
        dpsgd.torch.models.build(spec, weights=tmp_path)


def test_a_new_head_keeps_its_initial_value(tmp_path):
    spec = models.get("vit-test")
    save_file(parameters(spec), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"classifier.weight, classifier.bias keep"):
        dpsgd.torch.models.build(spec.replace(num_classes=7), weights=tmp_path)
