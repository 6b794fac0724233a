"""Inputs of a model: one array with leading axis P, or a dict of such arrays (text)."""

from collections.abc import Callable
from typing import Any


def tree_map(function: Callable, tree: Any, *others: Any) -> Any:
    """``function`` of the array, or of each array of the dict, with its twins in ``others``."""
    if isinstance(tree, dict):
        return {key: tree_map(function, tree[key], *(o[key] for o in others)) for key in tree}
    return function(tree, *others)


def take(tree: Any, index: Any) -> Any:
    """``tree[index]`` along the leading axis."""
    return tree_map(lambda array: array[index], tree)


def length(tree: Any) -> int:
    """The size of the leading axis."""
    return len(next(iter(tree.values())) if isinstance(tree, dict) else tree)
