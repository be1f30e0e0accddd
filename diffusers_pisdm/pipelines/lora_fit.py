"""What an adapter's file has to hold: read and checked in full before anything of the pipeline is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import torch

from ..models.transformer_pisdm import SIZE_RANGES, PISDMTransformer2DModel
from .class_names import check_id2label


MAX_ALPHA = 1_000_000  # much more would make images NaN
CLASS_EMBEDDING = "class_embedding.weight"
PIPELINE = "pipeline"  # what the metadata says of no stage
_REMEDY = "Load it into the cascade that it was trained for, with all stages."
_DAMAGED = "The file is damaged, or of another kind: save the adapter again with `save_lora_weights`."


def _is_name(value: Any) -> bool:
    # PEFT takes names for regular expressions, which may take forever. A caret marks a whole name.
    return isinstance(value, str) and re.fullmatch(r"\^?[\w.-]{1,200}", value, re.ASCII) is not None


def _is_rank(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and abs(value) <= MAX_ALPHA


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _by_name(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda pattern: (
        isinstance(pattern, dict) and all(map(_is_name, pattern)) and all(map(is_value, pattern.values()))
    )


# What is read of PEFT's configuration, and what it has to be: in words, and as a test.
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive integer", _is_rank),
    "lora_alpha": (f"a number up to {MAX_ALPHA:,}", _is_alpha),
    "rank_pattern": ("positive integers by layer", _by_name(_is_rank)),
    "alpha_pattern": (f"numbers up to {MAX_ALPHA:,} by layer", _by_name(_is_alpha)),
    "target_modules": (
        "plain names of layers",
        lambda value: all(map(_is_name, value)) if isinstance(value, (list, set)) else _is_name(value),
    ),
    "use_rslora": ("True or False", _is_flag),
    "use_dora": ("True or False", _is_flag),
    "lora_bias": ("True or False", _is_flag),
    "lora_dropout": ("in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    # Other ways to initialize an adapter change the weights that it adapts.
    "init_lora_weights": (
        "one that leaves the model's weights alone",
        lambda value: isinstance(value, (bool, str)) and value in (True, False, "gaussian", "orthogonal", "eva"),
    ),
}
_REQUIRED = ("r", "lora_alpha")
# What makes no difference to an adapter whose weights say which layers it adapts.
_IRRELEVANT = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)


def split_by_component(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits `transformer_2.transformer_blocks.0...` into what belongs to `transformer_2` and the rest."""
    components: dict[str, dict[str, Any]] = {}
    for key in sorted(values):
        component, _, rest = key.partition(".")
        components.setdefault(component, {})[rest] = values[key]
    return components


def quote(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def check_adapter_fits(
    weights: dict[str, dict[str, torch.Tensor]], transformers: dict[str, PISDMTransformer2DModel]
) -> None:
    """Raises a `ValueError` unless every weight, by stage and layer, has its place in the cascade."""
    absent = [name for name in weights if name not in transformers]
    if absent:
        raise ValueError(
            f"The adapter has weights for {quote(absent)}, but this pipeline's stages are {quote(transformers)}."
            f" {_REMEDY}"
        )
    if not any(".lora_" in key for layers in weights.values() for key in layers):
        raise ValueError("The adapter has no LoRA weights. Pass one written by `save_lora_weights`.")
    for name, layers in weights.items():
        for key, weight in layers.items():
            if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or not weight.isfinite().all():
                raise ValueError(f"The adapter's `{name}.{key}` does not hold finite numbers. {_DAMAGED}")
            if key == CLASS_EMBEDDING:
                _check_embedding(name, transformers[name], weight)
            else:
                _check_layer(name, transformers[name], key, weight)
        _read_ranks(name, layers)
    sizes = {name: len(layers[CLASS_EMBEDDING]) for name, layers in weights.items() if CLASS_EMBEDDING in layers}
    without = [name for name in transformers if name not in sizes]
    if sizes and without:
        raise ValueError(
            f"The adapter brings its own classes, but not for {quote(without)}, and all stages need the same classes."
            f" Load the pipeline without this stage (`{without[0]}=None`), or an adapter that was saved with it."
        )
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The adapter's stages have different numbers of classes: {sizes}. {_DAMAGED}")


def _check_embedding(name: str, transformer: PISDMTransformer2DModel, weight: torch.Tensor) -> None:
    width = transformer.config.hidden_size * len(transformer.class_tables)
    least, most = SIZE_RANGES["num_classes"]
    if weight.ndim != 2 or weight.shape[1] != width or not least < len(weight) <= most + 1:
        raise ValueError(
            f"The adapter's `{name}.{CLASS_EMBEDDING}` has shape {tuple(weight.shape)}, but `{name}` needs rows of"
            f" {width}, one for each class and one for none. {_REMEDY}"
        )


def _check_layer(name: str, transformer: PISDMTransformer2DModel, key: str, weight: torch.Tensor) -> None:
    path, lora, matrix = key.partition(".lora_")
    if not lora:
        raise ValueError(
            f"`{name}.{key}` is not a LoRA weight. Keys have to look like `{name}.<layer>.lora_A.weight`: convert"
            " other formats first."
        )
    try:
        layer = transformer.get_submodule(path) if path else None
    except AttributeError:
        layer = None
    if layer is None:
        raise ValueError(f"The adapter adapts `{path}` of `{name}`, which has no such layer. {_REMEDY}")
    dim, size = {"A.weight": (1, "in_features"), "B.weight": (0, "out_features")}.get(matrix, (None, ""))
    expected = getattr(layer, size, None)  # PEFT checks layers other than linear ones
    if expected is not None and (weight.ndim != 2 or weight.shape[dim] != expected):
        raise ValueError(
            f"The adapter's `{name}.{key}` has shape {tuple(weight.shape)}, but `{path}` has"
            f" {size}={expected}. {_REMEDY}"
        )


def config_fault(name: str, metadata: dict[str, Any]) -> str | None:
    """What makes a stage's adapter one that cannot be loaded, if anything, from its `LoraConfig.to_dict()`."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for key, value in metadata.items():
        if key in _OPTIONS:
            wanted, is_valid = _OPTIONS[key]
            if not is_valid(value) and (value is not None or key in _REQUIRED):
                return f"The adapter's `{name}.{key}` has to be {wanted} but is {value!r:.100}."
        elif value and key in defaults and key not in _IRRELEVANT and value != defaults[key]:
            return f"The adapter is of a kind that cannot be loaded, with `{name}.{key}={value!r:.100}`."
    return None


def plain_config(transformer: PISDMTransformer2DModel, adapter_name: str) -> dict[str, Any]:
    """The `LoraConfig.to_dict()` of an adapter, with names of layers in place of regular expressions."""
    config = transformer.peft_config[adapter_name].to_dict()
    adapted = {path: layer for path, layer in transformer.named_modules() if adapter_name in getattr(layer, "r", ())}
    if not _OPTIONS["target_modules"][1](config["target_modules"]):
        config["target_modules"] = sorted(adapted)
    for pattern, option in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if not _OPTIONS[pattern][1](config[pattern]):
            values = {path: getattr(layer, option)[adapter_name] for path, layer in adapted.items()}
            config[pattern] = {path: value for path, value in values.items() if value != config[option]}
    return config


def read_config(name: str, metadata: dict[str, Any], layers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    The arguments of a stage's `LoraConfig`, from the file's metadata. Raises a `ValueError` if one is of a wrong type,
    does not fit the weights, or is of a kind of adapter that is more than its weights.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    fault = config_fault(name, metadata)
    if fault is not None:
        raise ValueError(f"{fault} Pass a plain LoRA or DoRA adapter. {_DAMAGED}")
    defaults = LoraConfig().to_dict()
    config = {key: defaults[key] if value is None else value for key, value in metadata.items() if key in _OPTIONS}
    absent = [key for key in _REQUIRED if key not in config]
    if absent:
        raise ValueError(f"The adapter's metadata has no `{name}.{absent[0]}`. {_DAMAGED}")
    config.pop("init_lora_weights", None)  # the weights follow
    ranks = _read_ranks(name, layers)
    if config.get("target_modules") is None:
        config["target_modules"] = sorted(ranks)
    for key in ("rank_pattern", "alpha_pattern", "target_modules"):
        if len(config.get(key, ())) > 200 + len(ranks):  # PEFT tries all on every layer
            raise ValueError(f"The adapter's `{name}.{key}` names {len(config[key])} layers, but it has {len(ranks)}.")
    for option, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        lacking = [path for path in ranks if not any(key.startswith(f"{path}.{part}") for key in layers)]
        if config.get(option) and lacking:
            raise ValueError(f"The adapter has `{name}.{option}`, but no `{name}.{lacking[0]}.{part}`. {_DAMAGED}")
    pattern = config.get("rank_pattern", {})
    for path, rank in ranks.items():
        wanted = pattern.get(get_pattern_key(pattern, path), config["r"])
        if rank != wanted:
            raise ValueError(
                f"The adapter's `{name}.{path}` has rank {rank}, but its metadata says {wanted}. {_DAMAGED}"
            )
    return config


def _read_ranks(name: str, layers: dict[str, torch.Tensor]) -> dict[str, int | None]:
    """The rank of each adapted layer, `None` if it has no matrices; raises a ValueError if it has only one."""
    # The axis that is as long as the rank. A layer of embeddings has parameters instead of modules.
    axes = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
    ranks = {}
    for path in sorted({key.partition(".lora_")[0] for key in layers if ".lora_" in key}):
        matrices = {matrix: layers[f"{path}.{matrix}"] for matrix in axes if f"{path}.{matrix}" in layers}
        found = {weight.shape[axes[matrix]] if weight.ndim > 1 else None for matrix, weight in matrices.items()}
        if len(matrices) == 1:
            raise ValueError(
                f"The adapter's `{name}.{path}` has `{next(iter(matrices))}` without its partner. {_DAMAGED}"
            )
        if len(found) > 1:
            raise ValueError(f"The adapter's `{name}.{path}` has matrices of different ranks: {found}. {_DAMAGED}")
        ranks[path] = found.pop() if found else None
    return ranks


def read_classes(
    weights: dict[str, dict[str, torch.Tensor]], metadata: dict[str, dict[str, Any]]
) -> tuple[int, dict[int, str] | None] | None:
    """
    The number of the classes that an adapter brings and their names, from its weights and metadata by component;
    `None` if it has none of its own. Raises a `ValueError` if the names are not such.
    """
    num_classes = next(
        (len(layers[CLASS_EMBEDDING]) - 1 for layers in weights.values() if CLASS_EMBEDDING in layers), None
    )
    if num_classes is None:
        return None
    try:
        return num_classes, check_id2label(metadata.get(PIPELINE, {}).get("id2label"), num_classes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The adapter's class names are wrong: {error} {_DAMAGED}") from error
