"""The settings of a training script: recipes (JSON files) and command lines, built from the same typed fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..utils.files import write_whole


T = TypeVar("T")


@dataclass
class Recipe:
    """
    What a model consists of and how it is trained.

    Args:
        scheduler (`dict`): Arguments of `DDPMScheduler`: the noise schedule.
        stages (`list[dict]`):
            Arguments of [`PISDMTransformer2DModel`] for each stage except `num_classes`, low resolution first.
        vae (`str`, *optional*): The autoencoder whose latents are modelled; pixels if not given.
        training (`dict`): Arguments of the training script that differ from its defaults.
    """

    scheduler: dict[str, Any]
    stages: list[dict[str, Any]]
    vae: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def read_recipe(file: str | Path) -> Recipe:
    """
    Reads a recipe.

    Args:
        file (`str` or `Path`): The JSON file.

    Returns:
        [`Recipe`].

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or has unknown or missing keys.
    """
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("a recipe is a JSON object with `scheduler` and `stages`")
    known = list(Recipe.__dataclass_fields__)
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; a recipe has {', '.join(known)}")
    missing = [name for name in ("scheduler", "stages") if name not in content]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing")
    return Recipe(**content)


def argument(default: Any = dataclasses.MISSING, help: str | None = None, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with its text for `--help`; required if it has no default."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class OptimizationSettings:
    title: ClassVar[str] = "optimisation"

    train_batch_size: int = argument(64, "Images per process and step.")
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 500_000
    learning_rate: float = 2e-4
    lr_warmup_steps: int = 500
    lr_cooldown_steps: int = argument(0, "Final steps over which the rate falls to 0.")
    adam_beta1: float = 0.99
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.03
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = argument(False, "bitsandbytes' AdamW8bit")
    max_grad_norm: float = 1.0
    max_skipped_steps: int = argument(20, "Non-finite steps in a row before stopping.")
    ema_decay: float = 0.9999


@dataclass(kw_only=True)
class WatchSettings:
    title: ClassVar[str] = "watching and resuming"

    logging_steps: int = 50
    validation_steps: int = argument(1000, "Held-out loss and samples; 0: only at the end.")
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = argument("latest", '"latest", "none" (start over) or a checkpoint folder.')


@dataclass(kw_only=True)
class TrainerSettings(WatchSettings, OptimizationSettings):
    """How a [`Trainer`] trains."""

    seed: int = 0
    dataloader_num_workers: int = argument(0, "Processes that decode images; 0: the training process itself.")


def make_parser(arguments: type, description: str | None) -> argparse.ArgumentParser:
    """A parser for a dataclass's fields, grouped by the `title` of the class that defines them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    hints, groups = typing.get_type_hints(arguments), {None: parser}
    for described in dataclasses.fields(arguments):
        owner = next(c for c in arguments.__mro__ if described.name in vars(c).get("__annotations__", ()))
        title = vars(owner).get("title")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        is_list, kind = _unwrap(hints[described.name])
        options = {"help": described.metadata.get("help")}
        if kind is bool:
            groups[title].add_argument(f"--{described.name}", action="store_true", **options)
            continue
        default = described.default
        if described.default_factory is not dataclasses.MISSING:
            default = described.default_factory()
        if default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = default
            if default is not None:
                shown = " ".join(map(str, default)) if is_list else default
                options["help"] = f"{options['help'] or ''} (default: {shown})".strip()
        options |= {"nargs": "+"} if is_list else {}
        choices = described.metadata.get("choices")
        groups[title].add_argument(f"--{described.name}", type=kind, choices=choices, **options)
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: type[T], argv: Sequence[str] | None = None
) -> tuple[T, Recipe | None]:
    """
    Parses a command line. The training arguments of the recipe in `--cascade_config` are defaults, which the command
    line overrides.

    Args:
        parser (`argparse.ArgumentParser`): From [`make_parser`]; it reports errors and exits.
        arguments (`type`): The dataclass it was made from.
        argv (`Sequence[str]`, *optional*): `sys.argv[1:]` if not given.

    Returns:
        An instance of the dataclass, and the [`Recipe`] if there is one.
    """
    given, recipe = parser.parse_args(argv), None
    if given.cascade_config is not None:
        try:
            recipe = read_recipe(given.cascade_config)
            parser.set_defaults(**recipe_arguments(recipe, arguments))
        except (OSError, ValueError) as error:
            parser.error(f"--cascade_config {given.cascade_config}: {error}")
        given = parser.parse_args(argv)
    return arguments(**vars(given)), recipe


def recipe_arguments(recipe: Recipe, arguments: type) -> dict[str, Any]:
    """
    A recipe's training arguments and VAE as values for a dataclass's fields.

    Args:
        recipe ([`Recipe`]): A recipe whose `training` uses the fields' names.
        arguments (`type`): The dataclass.

    Returns:
        `dict[str, Any]`: Values by name.

    Raises:
        ValueError: A name is unknown, or the command line would not accept its value.
    """
    hints, fields = typing.get_type_hints(arguments), {f.name: f for f in dataclasses.fields(arguments)}
    values = dict(recipe.training)
    if recipe.vae is not None:
        values["pretrained_vae_model_name_or_path"] = recipe.vae
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown training argument {name!r}{hint}")
        is_list, kind = _unwrap(hints[name])
        choices = fields[name].metadata.get("choices")
        # As on the command line, a single value is a list of one.
        items = value if is_list and isinstance(value, list) else [value]
        items = [_convert(name, item, kind, choices) for item in items]
        values[name] = items if is_list else items[0]
    return values


def write_training_config(folder: str | Path, arguments: dict[str, Any], **facts: Any) -> None:
    """Writes `training_config.json`, the model card's source of facts about a run."""
    with write_whole(Path(folder) / "training_config.json") as unfinished:
        unfinished.write_text(json.dumps({"arguments": arguments, **facts}, indent=2) + "\n")


def _unwrap(hint: Any) -> tuple[bool, type]:
    """Whether a field holds a list, and the type of its values other than None."""
    if isinstance(hint, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    return (True, typing.get_args(hint)[0]) if typing.get_origin(hint) is list else (False, hint)


def _convert(name: str, value: Any, kind: type, choices: Sequence[str] | None) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"training argument {name!r} must be true or false, not {value!r}")
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number and kind(value) == value if kind in (int, float) else isinstance(value, str)
    if not fits or (choices is not None and value not in choices):
        wanted = f"one of {', '.join(choices)}" if choices is not None else f"of type {kind.__name__}"
        raise ValueError(f"training argument {name!r} must be {wanted}, not {value!r}")
    return kind(value)
