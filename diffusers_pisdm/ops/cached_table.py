"""Tables of constants (scan orders, positions) that depend on sizes only."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch


Table = TypeVar("Table")


def cached_table(maxsize: int) -> Callable[[Callable[..., Table]], Callable[..., Table]]:
    """
    Lets eager calls of a function of hashable arguments and `device` share one copy of a constant tensor. Compiled and
    exported graphs build it themselves, as sizes may be symbolic, and so do calls under a mode that makes other
    tensors (fake ones, say).
    """

    def decorate(build: Callable[..., Table]) -> Callable[..., Table]:
        @lru_cache(maxsize=maxsize)
        def build_once(*args, **kwargs) -> Table:
            # A tensor made inside `torch.inference_mode()` could never be used for training afterwards.
            with torch.inference_mode(False):
                return build(*args, **kwargs)

        @wraps(build)
        def table(*args, device: torch.device | str | None = None, **kwargs) -> Table:
            if torch.compiler.is_compiling():
                return build(*args, device=device, **kwargs)
            # What a tensor made here and now is, and where: `device` may be None, or "cuda" without an index.
            probe = torch.empty(0, device=device)
            if type(probe) is not torch.Tensor:
                return build(*args, device=device, **kwargs)
            return build_once(*args, device=probe.device, **kwargs)

        return table

    return decorate
