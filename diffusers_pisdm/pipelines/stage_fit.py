"""Whether the stages of a cascade fit together, and their schedulers the stages."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, SchedulerMixin

from ..models.latents import are_latents
from ..models.stage_models import StageModel
from ..models.transformer_pisdm import PISDMTransformer2DModel
from ..schedulers import check_scheduler, check_unbounded_scheduler
from ..utils.messages import count_of


# What an option of a stage must equal in the stage before.
_FITTING = {"low_res_channels": "in_channels", "in_channels": "in_channels", "num_classes": "num_classes"}


def check_cascade(
    transformers: dict[str, PISDMTransformer2DModel | None],
    schedulers: dict[str, SchedulerMixin | None],
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
) -> None:
    """
    Raises a ValueError if a stage is missing or does not fit the one before, or a scheduler its stage. Both are the
    pipeline's, by the names of its components, in order.
    """
    names = list(transformers)
    first, shared = transformers[names[0]], next(iter(schedulers.values()))
    present = [name for name in names if transformers[name] is not None]
    if first is None:
        raise ValueError("`transformer` is None, but a cascade needs its first stage. Pass `transformer`.")
    if shared is None:
        raise ValueError("`scheduler` is None, but a cascade needs at least that one. Pass `scheduler`.")
    gaps = [name for name in names[: len(present)] if name not in present]
    if gaps:
        higher = [name for name in present if name > gaps[0]]
        raise ValueError(
            f"`{gaps[0]}` is None, but {' and '.join(f'`{name}`' for name in higher)} would need it. Pass"
            f" `{gaps[0]}`, or {' and '.join(f'`{name}=None`' for name in higher)}."
        )

    for lower, name in zip([None, *present], present):
        _check_transformer(name, transformers[name], transformers.get(lower))
    if vae is not None and vae.config.latent_channels != first.config.in_channels:
        raise ValueError(
            f"`vae` has {vae.config.latent_channels} latent channels (`latent_channels`), but `transformer`"
            f" has {first.config.in_channels} (`in_channels`). Pass the autoencoder that the"
            " transformers were trained with."
        )
    for (name, scheduler), transformer_name in zip(schedulers.items(), present):
        if scheduler is not None:
            check_scheduler(name, scheduler)
        if transformers[transformer_name].config.get("residual_scale") is not None:
            check_unbounded_scheduler(name, scheduler or shared, "residuals (`residual_scale`)")
        elif are_latents(first.config.in_channels, vae):
            check_unbounded_scheduler(name, scheduler or shared, "latents")


def check_guides(
    guides: StageModel | Sequence[StageModel | None] | None, stages: list[StageModel], device: torch.device
) -> list[StageModel | None]:
    """
    Each stage's `guidance_model`; a single one is the first stage's. Raises a ValueError if there are not as many as
    stages, or one does not fit its stage.
    """
    if not isinstance(guides, (list, tuple)):
        guides = [guides] + [None] * (len(stages) - 1)
    if len(guides) != len(stages):
        raise ValueError(
            f"`guidance_model` has {count_of(len(guides), 'value')}, but this pipeline has"
            f" {count_of(len(stages), 'stage')}. Pass the first stage's, or a list with one per stage, or None."
        )
    for number, (guide, stage) in enumerate(zip(guides, stages), 1):
        if guide is None:
            continue
        for option in ("in_channels", "num_classes", "low_res_channels", "residual_scale"):
            found, wanted = getattr(guide, "config", {}).get(option), stage.config.get(option)
            if found != wanted:
                raise ValueError(
                    f"`guidance_model` of stage {number} has `{option}={found}`, but the stage has {wanted}. Pass a"
                    " weaker model of the same stage: one that is smaller, or trained less."
                )
        if guide.device.type != device.type:
            raise ValueError(
                f"`guidance_model` of stage {number} is on {guide.device}, but the pipeline runs on {device}. Move it"
                f" with `.to('{device}')`."
            )
    return list(guides)


def _check_transformer(name: str, transformer: PISDMTransformer2DModel, lower: PISDMTransformer2DModel | None) -> None:
    config = getattr(transformer, "config", {})
    absent = [option for option in ("in_channels", "num_classes", "sample_size", "patch_size") if option not in config]
    if absent:
        raise ValueError(
            f"`{name}` is of {type(transformer)}, which has no `{absent[0]}` in its configuration. Pass a"
            " `PISDMTransformer2DModel`, or a `DiMTransformer2DModel` as the first stage."
        )
    if config.get("out_channels") not in (None, config.in_channels):
        raise ValueError(
            f"`{name}` has {config.out_channels} output channels (`out_channels`) for {config.in_channels} of its"
            " input (`in_channels`). Pass a transformer with as many."
        )
    if lower is None:
        if config.get("low_res_channels") is not None:
            raise ValueError(
                f"`{name}` is a higher stage (`low_res_channels={config.low_res_channels}`) and cannot be the"
                " first. Pass a transformer with `low_res_channels=None`."
            )
        return
    for option, of_lower in _FITTING.items():
        if config.get(option) != lower.config[of_lower]:
            raise ValueError(
                f"`{name}` has `{option}={config.get(option)}`, but the stage before has"
                f" `{of_lower}={lower.config[of_lower]}`. Pass stages that were trained as one cascade."
            )
    factors, lower_factors = (json.dumps(c.get("class_factors")) for c in (config, lower.config))  # tuples or lists
    if factors != lower_factors:
        raise ValueError(
            f"`{name}` has other `class_factors` than the stage before: {factors:.100} and {lower_factors:.100}."
            " Pass stages that were trained as one cascade."
        )
