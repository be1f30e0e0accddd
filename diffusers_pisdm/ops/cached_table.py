"""Tables of constants (scan orders, positions) that depend on sizes only."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch


Table = TypeVar("Table")


def cached_table(build: Callable[..., Table]) -> Callable[..., Table]:
    """
    Decorates a function of hashable arguments that builds constant tensors: eager calls share one copy per argument
    set, while compiled and exported graphs build the table themselves, since their sizes may be symbolic.
    """

    @lru_cache(maxsize=64)
    def build_once(*args, **kwargs) -> Table:
        # A tensor made inside `torch.inference_mode()` could never be used for training afterwards.
        with torch.inference_mode(False):
            return build(*args, **kwargs)

    @wraps(build)
    def table(*args, **kwargs) -> Table:
        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        return build_once(*args, **kwargs)

    return table
