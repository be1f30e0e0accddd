"""The models a run starts from: new ones, or those of a published cascade, fully trained or with LoRA adapters."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging
from torch.nn import ModuleList

from ..models.stage_models import CLASS_KEY, OF_THE_DATA, StageModel, make_stage, stage_class
from ..models.transformer_pisdm import class_factors_from_names, get_class_embedding, set_class_embedding
from ..pipelines.class_names import check_id2label
from ..utils.messages import count_of, one_line


logger = logging.get_logger(__name__)

# The projections around the scan and those of the long skips, but not those that control the scan (`x_proj`,
# `dt_proj`): adapting them as well gained nothing for Galim et al. (arXiv 2410.09016) and Ham et al. (arXiv
# 2411.15224).
LORA_TARGET_MODULES = ("in_proj", "out_proj", "skip_proj", "skip_projections")

PART_SEPARATOR = "/"  # between the parts of a class's name


def resize_class_embedding(
    transformer: StageModel, old_class_names: Sequence[str], new_class_names: Sequence[str]
) -> None:
    """
    Replaces a model's classes in place and updates `config.num_classes`. Call it before creating the optimizer.

    A class in both lists keeps its embedding, whatever its position (with `class_factors`, the sum of its factors'
    embeddings, which becomes the class's own row). A class named after a part of old names, such as `animal-bird` of
    `noto/animal-bird`, starts as the mean of the classes with this part. Any other starts with the embedding of the
    null label, which the model knows as "any class", so its first images look like those without guidance. A random
    embedding would be an input that no layer has ever seen.

    Args:
        transformer ([`PISDMTransformer2DModel`]): The model.
        old_class_names (`Sequence[str]`): The names of its `config.num_classes` classes, by id.
        new_class_names (`Sequence[str]`): The names of its new classes, by id.

    Raises:
        ValueError: There are more or fewer old names than classes, or a name in both lists is not unique.
    """
    old, new = list(old_class_names), list(new_class_names)
    if len(old) != transformer.config.num_classes:
        raise ValueError(
            f"`old_class_names` has {count_of(len(old), 'name')}, but the model has"
            f" {count_of(transformer.config.num_classes, 'class')} (`num_classes`). Pass the name of each"
            " class, in the order of their ids."
        )
    if new == old:
        return
    counts = Counter(old), Counter(new)
    ambiguous = [name for name in counts[0] if name in counts[1] and max(counts[0][name], counts[1][name]) > 1]
    if ambiguous:
        raise ValueError(
            f"{', '.join(map(repr, ambiguous))}: the name of several classes, so it is ambiguous whose embedding to"
            " keep. Give each class in `old_class_names` and `new_class_names` a unique name."
        )
    embedding, null_label = get_class_embedding(transformer), len(old)
    ids = {name: [i] for i, name in enumerate(old)}
    by_part = defaultdict(list)
    for i, name in enumerate(old):
        for part in name.split(PART_SEPARATOR):
            by_part[part].append(i)
    starts = [ids.get(name) or by_part.get(name) or [null_label] for name in new]
    set_class_embedding(transformer, torch.stack([embedding[rows].mean(0) for rows in [*starts, [null_label]]]))


def new_cascade(
    stage_configs: Sequence[dict[str, Any]], class_names: Sequence[str], factor_separator: str | None = None
) -> list[StageModel]:
    """Stages with random weights; with a separator, a class's embedding is the sum of those of its name's parts."""
    classes: dict[str, Any] = {"num_classes": len(class_names)}
    if factor_separator is not None:
        for config in stage_configs:
            if "class_factors" not in inspect.signature(stage_class(config)).parameters:
                raise ValueError(f"A {stage_class(config).__name__} has no factors of classes: train without.")
        classes["class_factors"] = class_factors_from_names(class_names, factor_separator)
    return [make_stage(config, **classes) for config in stage_configs]


def start_cascade(
    pretrained: DiffusionPipeline, stage_configs: Sequence[dict[str, Any]], class_names: Sequence[str]
) -> list[StageModel]:
    """
    Makes the stages of a new cascade from a published one: its stages, with their weights and an embedding of the new
    classes ([`resize_class_embedding`]), and above them new ones with random weights. If there are fewer
    configurations than stages, the upper stages are dropped.

    Args:
        pretrained ([`PISDMCascadePipeline`]): The published cascade; its models are changed and returned.
        stage_configs (`Sequence[dict[str, Any]]`):
            Each stage's arguments, lowest resolution first, without `num_classes` ([`Recipe`]).
        class_names (`Sequence[str]`): The names of the new cascade's classes, by id.

    Returns:
        `list[PISDMTransformer2DModel]`: One model per configuration, in training mode.

    Raises:
        ValueError: A configuration differs from that of the published stage, or the published cascade's classes have
            no names.
    """
    for stage, (config, transformer) in enumerate(zip(stage_configs, pretrained.stages), start=1):
        _check_config(stage, config, transformer)
    old_class_names = _get_class_names(pretrained)

    stages = pretrained.stages[: len(stage_configs)]
    for transformer in stages:
        resize_class_embedding(transformer, old_class_names, class_names)
    stages += [make_stage(config, num_classes=len(class_names)) for config in stage_configs[len(stages) :]]
    return [transformer.train() for transformer in stages]


def check_noise_schedules(pretrained: DiffusionPipeline, schedulers: Sequence[DDPMScheduler]) -> None:
    """
    Checks that the published stages continue to train with the schedules they were trained with.

    Args:
        pretrained ([`PISDMCascadePipeline`]): The published cascade.
        schedulers (`Sequence[DDPMScheduler]`): One for each stage of the new cascade.

    Raises:
        ValueError: A published stage has another prediction type or noise schedule.
    """
    for stage, (own, wanted) in enumerate(zip(pretrained.get_stage_schedulers(), schedulers), start=1):
        if own.config.prediction_type != wanted.config.prediction_type:
            raise ValueError(
                f"Stage {stage} of the pretrained cascade predicts {own.config.prediction_type!r}, but the recipe asks"
                f" for {wanted.config.prediction_type!r}. Pass each stage's prediction type with --prediction_types."
            )
        if not torch.allclose(own.alphas_cumprod, wanted.alphas_cumprod, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"Stage {stage} of the pretrained cascade was trained with a different noise schedule from the"
                " recipe's. Use its `scheduler`, and pass each stage's shift with --noise_shifts."
            )


def pretrained_defaults(pretrained: DiffusionPipeline, num_stages: int) -> dict[str, Any]:
    """
    The default sampling settings of a cascade made from a published one: the published settings, with those of the
    last stage repeated for stages added above.

    Args:
        pretrained ([`PISDMCascadePipeline`]): The published cascade.
        num_stages (`int`): Stages of the new cascade.

    Returns:
        `dict[str, Any]`: `default_guidance_scale`, `default_num_inference_steps` and `default_noise_level`.
    """
    parameters = inspect.signature(type(pretrained)).parameters
    lengths = {"guidance_scale": num_stages, "num_inference_steps": num_stages, "noise_level": num_stages - 1}
    defaults = {}
    for name, length in ((f"default_{name}", length) for name, length in lengths.items()):
        value = pretrained.config[name]
        if isinstance(value, (list, tuple)):
            # An empty list is the noise level of a single stage: there is nothing to repeat.
            value = [*value, *value[-1:] * length][:length] if value else parameters[name].default
        defaults[name] = value
    return defaults


def add_lora(
    transformer: StageModel,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | None = None,
    train_class_embedding: bool = False,
) -> None:
    """
    Adds a LoRA adapter named `"default"` and freezes everything else, in place. Initially, the adapter changes
    nothing. Trainable weights are float32, whatever the precision of the frozen ones.

    Args:
        transformer ([`PISDMTransformer2DModel`]): The model.
        rank (`int`): The adapter's rank, at least 1.
        alpha (`float`): The adapter's weight is `alpha / rank`.
        target_modules (`Sequence[str]`, *optional*):
            Names of the layers to adapt; by default those of `LORA_TARGET_MODULES` that the model has.
        train_class_embedding (`bool`, defaults to `False`):
            Whether to train the class embedding as well: it is all that distinguishes newly added classes.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: The rank is below 1, a target is not a layer of the model, or the model already has an adapter
            named `"default"`.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA adapters need PEFT, which cannot be imported. Run `pip install -U peft`.") from error

    names = {name.split(".")[-1] for name, _ in transformer.named_modules()}
    if target_modules is None:
        target_modules = [name for name in LORA_TARGET_MODULES if name in names]
    lists = {name: module for name, module in transformer.named_modules() if isinstance(module, ModuleList)}
    targets = [part for name in target_modules for part in _layers_of(name, lists)]
    unknown = [name for name in target_modules if name.split(".")[-1] not in names]
    if unknown:
        raise ValueError(
            f"`target_modules` contains {', '.join(map(repr, unknown))}, but the model has no such layer. Pass"
            f" names of linear layers such as {', '.join(map(repr, LORA_TARGET_MODULES))}."
        )
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian"))
    for name in transformer.class_tables:
        getattr(transformer, name).requires_grad_(train_class_embedding)
    cast_training_params(transformer, dtype=torch.float32)


def _layers_of(name: str, lists: dict[str, ModuleList]) -> list[str]:
    """A layer, or those of a list of layers, for PEFT."""
    return [f"{name}.{i}" for i in range(len(lists[name]))] if name in lists else [name]


def known_class_order(output_dir: str | Path, pretrained: DiffusionPipeline | None = None) -> list[str] | None:
    """
    The names of the classes that a run must keep, by id.

    Args:
        output_dir (`str` or `Path`): The run's folder, which may hold the cascade that it has saved so far.
        pretrained ([`DiffusionPipeline`], *optional*): The cascade to start from.

    Returns:
        `list[str]` or `None`: Those of the run's own cascade or else of the pretrained one; `None` without either.
    """
    id2label = None if pretrained is None else pretrained.config.id2label
    index = Path(output_dir, DiffusionPipeline.config_name)
    if index.is_file():
        try:
            own = DiffusionPipeline.load_config(output_dir).get("id2label")
            id2label = check_id2label(own, len(own or ()))
        except (AttributeError, OSError, TypeError, ValueError) as error:
            logger.warning(f"{index} is damaged and is not used: {one_line(error)}")
    return [id2label[class_id] for class_id in sorted(id2label, key=int)] if id2label else None


def _get_class_names(pretrained: DiffusionPipeline) -> list[str]:
    id2label = pretrained.config.id2label or {}
    ids = range(pretrained.transformer.config.num_classes)
    if set(id2label) != set(ids):
        raise ValueError(
            f"The pretrained cascade has {len(ids)} classes but {len(id2label)} class names (`id2label`). All classes"
            " need names to be matched with the new ones. Pass their names to `from_pretrained`:"
            " `id2label=[...]`."
        )
    return [id2label[i] for i in ids]


def _check_config(stage: int, config: dict[str, Any], transformer: StageModel) -> None:
    cls = stage_class(config)
    if not isinstance(transformer, cls):
        raise ValueError(
            f"Stage {stage} of the pretrained cascade is a {type(transformer).__name__}, but its configuration is that"
            f" of a {cls.__name__}. Name the class as the stage's `{CLASS_KEY}`."
        )
    wanted = {p.name: p.default for p in inspect.signature(cls).parameters.values() if p.name not in OF_THE_DATA}
    wanted.update({name: value for name, value in config.items() if name != CLASS_KEY})
    differences = [
        f"`{key}` is {value!r} instead of {transformer.config.get(key)!r}"
        for key, value in wanted.items()
        if _as_json(value) != _as_json(transformer.config.get(key))
    ]
    if differences:
        raise ValueError(
            f"The configuration of stage {stage} does not fit the pretrained cascade: {', '.join(differences)}. Use"
            " the configuration of the pretrained stage; you can only replace classes and add stages above."
        )


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
