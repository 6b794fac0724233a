"""Hypothesis runs the same examples every time and never fails on time."""

import gc

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=12, database=None)
settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """The frameworks' own objects, millions, are there to stay: no collection looks at them."""
    gc.collect()
    gc.freeze()
