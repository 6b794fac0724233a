"""
Seeded synthetic text: ids and attention masks with the statistics that cost depends on.

Token of rank r has probability ∝ 1/r (Zipf), so that common tokens repeat within an example, as
they do in real text; lengths are uniform in [T/2, T], the rest is padding at the end.
"""

import numpy as np

from dpsgd.models import ModelSpec

Text = dict[str, np.ndarray]


def random_text(spec: ModelSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Text:
    """``input_ids`` and ``attention_mask``, int64 [*shape, T], for the vocabulary of ``spec``."""
    steps = spec.sequence_length
    weights = np.cumsum(1 / np.arange(1, spec.vocabulary))
    ranks = np.searchsorted(weights / weights[-1], rng.random((*shape, steps)), side="right")
    lengths = rng.integers((steps + 1) // 2, steps + 1, shape)
    mask = np.arange(steps) < lengths[..., None]
    return {
        "input_ids": np.where(mask, _token(spec, ranks), spec.pad),
        "attention_mask": mask.astype(np.int64),
    }


def labelled_text(spec: ModelSpec, count: int, rng: np.random.Generator) -> tuple[Text, np.ndarray]:
    """Text and int64 classes [count]; a third of a class's tokens is one word of its own."""
    text, targets = random_text(spec, (count,), rng), rng.integers(0, spec.num_classes, count)
    said = (rng.random(text["input_ids"].shape) < 1 / 3) & (text["attention_mask"] == 1)
    words = _token(spec, targets % (spec.vocabulary - 1))[:, None]
    return text | {"input_ids": np.where(said, words, text["input_ids"])}, targets


def _token(spec: ModelSpec, ranks: np.ndarray) -> np.ndarray:
    # Rank 0 … V-2 to ids, leaving out the padding's.
    return ((spec.pad + 1 + ranks) % spec.vocabulary).astype(np.int64)
