"""Arguments of a call that are the same for all stages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .number_checks import check_number


def check_generator(generator: torch.Generator | list[torch.Generator] | None, num_images: int) -> None:
    """Raises a TypeError or ValueError unless these are one generator, one per image, or none."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    wrong = [item for item in generators if not isinstance(item, torch.Generator)]
    if wrong:
        raise TypeError(
            f"`generator` has to be a `torch.Generator`, or a list of one per image, but has {wrong[0]!r}, a"
            f" {type(wrong[0])}. Pass `torch.Generator().manual_seed(seed)`."
        )
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(
            f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
            f" size of {num_images}. Pass one generator per image."
        )


def check_attention_kwargs(attention_kwargs: dict[str, Any] | None) -> None:
    """Raises a TypeError or ValueError if there is more in it than the strength of the LoRA adapters."""
    if not isinstance(attention_kwargs, (dict, type(None))):
        raise TypeError(
            f'`attention_kwargs` has to be a dictionary but is {attention_kwargs!r}: pass `{{"scale": ...}}`.'
        )
    if attention_kwargs:
        if set(attention_kwargs) != {"scale"}:
            raise ValueError(
                f"`attention_kwargs` has {sorted(attention_kwargs)}, but this model has no attention: only"
                ' `{"scale": ...}`, the strength of the LoRA adapters, has an effect.'
            )
        check_number("attention_kwargs['scale']", attention_kwargs["scale"])


def check_callback(callback: Callable | None) -> None:
    """Raises a TypeError unless the callback takes four arguments."""
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(
            f"`callback_on_step_end` has to be a function but is {callback!r}. Pass one that takes `pipe, step,"
            " timestep, callback_kwargs`."
        )
    try:
        signature = inspect.signature(callback)
    except ValueError:  # a builtin that does not tell its arguments
        return
    try:
        signature.bind(None, 0, None, {})
    except TypeError as error:
        raise TypeError(
            f"`callback_on_step_end` has to take four arguments, `pipe, step, timestep, callback_kwargs`, but takes"
            f" {signature}."
        ) from error


def check_callback_outputs(outputs: dict[str, Any], given: dict[str, Any], num_classes: int) -> None:
    """Raises a TypeError or ValueError unless a callback returned the tensors that it was given, or some like them."""
    if not isinstance(outputs, dict):
        raise TypeError(
            "`callback_on_step_end` has to return a dictionary of what it changed, but returned"
            f" {outputs!r}. Let it return its `callback_kwargs`, or {{}}."
        )
    for name, value in outputs.items():
        if name not in ("latents", "low_res", "class_labels") or value is given[name]:
            continue
        shape = None if given[name] is None else tuple(given[name].shape)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            found = f"has shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"is {value!r}"
            wanted = "None in this stage" if shape is None else f"a tensor of shape {shape}"
            raise TypeError(f"`{name}`, which `callback_on_step_end` returned, has to be {wanted} but {found}.")
        # Elsewhere, reading the values would make the host wait for the device.
        readable = name == "class_labels" and value.device.type == "cpu"
        if readable and not ((value >= 0) & (value <= num_classes)).all():
            raise ValueError(
                f"`class_labels`, which `callback_on_step_end` returned, has to be from 0 to {num_classes} (no class)"
                f" but is {value.tolist()}."
            )


def check_latents(latents: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises a `TypeError` or `ValueError` unless `latents` are floats of this shape on the device."""
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents)
        raise TypeError(f"`latents` has to be a floating point tensor but is {kind}. Pass `torch.randn({shape})`.")
    if latents.shape != shape:
        raise ValueError(
            f"`latents` has to have shape {shape} (images, channels, height, width) but has shape"
            f" {tuple(latents.shape)}."
        )
    if latents.device.type != device.type:
        raise ValueError(
            f"`latents` is on {latents.device}, but the pipeline runs on {device}. Move it with"
            f" `latents.to('{device}')`."
        )
    if not latents.is_meta and not latents.isfinite().all():
        raise ValueError(f"`latents` holds NaN or infinity. Pass `torch.randn({shape})`, or noise like it.")
