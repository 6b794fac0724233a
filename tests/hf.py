"""Small Hugging Face models of many families, built from a config, and inputs for them."""

import numpy as np
import torch
import transformers as hf

_TEXT = {"vocab_size": 40, "num_labels": 3}
_WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
_IMAGE = {"image_size": 8, "num_channels": 3, "num_labels": 3}


def _llama(**more):
    return hf.LlamaConfig(
        **_TEXT,
        **{k: v for k, v in _WIDE.items() if k != "num_labels"},
        intermediate_size=24,
        num_key_value_heads=1,
        pad_token_id=0,
        **more,
    )


def _gpt2(**more):
    return hf.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **_TEXT,
        **more,
    )


BUILD = {
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**_WIDE, intermediate_size=24, patch_size=4, image_size=8)
    ),
    "deit": lambda: hf.DeiTForImageClassification(
        hf.DeiTConfig(**_WIDE, intermediate_size=24, patch_size=4, image_size=8)
    ),
    "bit": lambda: hf.BitForImageClassification(
        hf.BitConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            num_groups=4,
            layer_type="preactivation",
            num_labels=3,
        )
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(
            hidden_sizes=[8, 12],
            depths=[1, 1],
            num_stages=2,
            patch_size=2,
            layer_scale_init_value=0.5,
            num_labels=3,
        )
    ),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=3,
        )
    ),
    "bert": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=40, **_WIDE, intermediate_size=24, max_position_embeddings=16)
    ),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            **_TEXT, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16
        )
    ),
    "roberta": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(vocab_size=40, **_WIDE, intermediate_size=24, max_position_embeddings=16)
    ),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(_gpt2()),
    "gpt2-lm": lambda: hf.GPT2LMHeadModel(_gpt2()),
    "llama": lambda: hf.LlamaForSequenceClassification(_llama()),
}
SIZES = {"swin": 16, "bit": 32, "convnext": 16}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """The model, its weights spread out enough for every gradient to be alive."""
    torch.manual_seed(seed)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(name: str, rows: int, seed: int = 0):
    """(inputs, targets) in NumPy; text comes with repeated tokens and an attention mask."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, rows)
    if name in ("vit", "deit", "bit", "convnext", "swin"):
        side = SIZES.get(name, 8)
        return rng.standard_normal((rows, 3, side, side), np.float32), targets
    length = 7
    ids = rng.integers(3, 12, (rows, length))
    mask = np.arange(length) < rng.integers(4, length + 1, rows)[:, None]
    return {"input_ids": np.where(mask, ids, 0), "attention_mask": mask.astype(np.int64)}, targets


def loss(model, inputs, targets):
    """[P]: cross entropy of the class, or of the next tokens."""
    logits = (model(**inputs) if isinstance(inputs, dict) else model(inputs)).logits
    if logits.ndim == 3:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        return (each * mask[:, 1:]).sum(1)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
