"""Hypothesis runs the same examples every time and never fails on time."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=12, database=None)
settings.load_profile("suite")
