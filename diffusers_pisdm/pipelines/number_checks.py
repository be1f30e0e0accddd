"""Arguments that are numbers, and what they have to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from .saved_files import MAX_TIMESTEPS


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_real(value) and abs(value) < math.inf  # math.isfinite raises for huge integers


def is_positive_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


# What a number has to be: in words, and as a test.
NUMBERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_images_per_prompt": ("a positive integer", is_positive_integer),
    "batch_size": ("a positive integer", is_positive_integer),
    "num_inference_steps": (
        f"a positive integer up to {MAX_TIMESTEPS}",
        lambda value: is_positive_integer(value) and value <= MAX_TIMESTEPS,
    ),
    "guidance_scale": ("a finite number", _is_finite),
    "guidance_start": ("in [0, 1]", lambda value: _is_real(value) and 0 <= value <= 1),
    "guidance_stop": ("in [0, 1]", lambda value: _is_real(value) and 0 <= value <= 1),
    "noise_level": ("in [0, 1)", lambda value: _is_real(value) and 0 <= value < 1),
    "attention_kwargs['scale']": ("a finite number", _is_finite),
    "eta": ("in [0, 1]", lambda value: _is_real(value) and 0 <= value <= 1),
    "strength": ("in [0, 1]", lambda value: _is_real(value) and 0 <= value <= 1),
    "relay_strength": ("None or in (0, 1]", lambda value: value is None or (_is_real(value) and 0 < value <= 1)),
}


def check_number(name: str, value: Any) -> None:
    """Raises a ValueError unless the value is what the argument of this name takes."""
    wanted, is_valid = NUMBERS[name.removeprefix("default_")]
    if not is_valid(value):
        raise ValueError(f"`{name}` has to be {wanted} but is {value!r} of type {type(value)}.")
