"""The settings of a training script: recipes (JSON files) and command lines, built from the same typed fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffusers import DDPMScheduler

from ..models.stage_models import CLASS_KEY, OF_THE_DATA, stage_class
from ..pipelines.saved_files import MAX_TIMESTEPS
from ..utils.arguments import Bounds, CommandParser, bounded, not_empty
from ..utils.files import write_whole
from ..utils.messages import count_of
from ..utils.shipped_files import find_recipe, recipe_names
from .checkpoints import CheckpointError
from .optimization import OPTIMIZERS


T = TypeVar("T")

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, CheckpointError)  # whose message is enough


@dataclass
class Recipe:
    """
    What a model consists of and how it is trained.

    Args:
        scheduler (`dict`): Arguments of `DDPMScheduler`: the noise schedule.
        stages (`list[dict]`):
            Arguments of [`PISDMTransformer2DModel`] for each stage except `num_classes`, low resolution first; with
            `"_class_name": "DiMTransformer2DModel"`, which only a first stage can have, those of that class.
        vae (`str`, *optional*): The autoencoder whose latents are modelled; pixels if not given.
        training (`dict`): Arguments of the training script that differ from its defaults.
    """

    scheduler: dict[str, Any]
    stages: list[dict[str, Any]]
    vae: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def noise_schedule(self) -> DDPMScheduler:
        """Makes the noise schedule; raises ValueError if there is none with these arguments."""
        steps = self.scheduler.get("num_train_timesteps", 1000)
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_TIMESTEPS:
            raise ValueError(f"`num_train_timesteps` must be an integer from 1 to {MAX_TIMESTEPS:,}, got {steps!r}.")
        try:
            schedule = DDPMScheduler(**self.scheduler)
        except (TypeError, ValueError, NotImplementedError, RuntimeError, OverflowError) as error:
            raise ValueError(f"There is no noise schedule with {self.scheduler}: {error}") from error
        if not schedule.alphas_cumprod.isfinite().all():
            raise ValueError(f"The noise schedule of {self.scheduler} has values that are not finite.")
        return schedule


def read_recipe(file: str | Path) -> Recipe:
    """
    Reads a recipe.

    Args:
        file (`str` or `Path`): The JSON file, or the name of a recipe that comes with the package, such as `emoji64`.

    Returns:
        [`Recipe`].

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or has unknown or missing keys.
    """
    try:
        content = json.loads(find_recipe(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no such file, nor a recipe of this name: ours are {', '.join(recipe_names())}"
        ) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("a recipe is a JSON object with `scheduler` and `stages`")
    _check_names(content, Recipe, "key")
    missing = [name for name in ("scheduler", "stages") if name not in content]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing")
    recipe = Recipe(**content)
    if not isinstance(recipe.stages, list) or not recipe.stages:
        raise ValueError("`stages` must be a list of at least one stage")
    parts = {"scheduler": recipe.scheduler, "training": recipe.training}
    parts |= {f"stages[{index}]": stage for index, stage in enumerate(recipe.stages)}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"`{name}` must be an object, not {part!r}")
        if name == "scheduler":
            _check_names(part, DDPMScheduler, "argument of the noise schedule", "trained_betas")
        elif name != "training":
            cls = stage_class(part)
            arguments = {key: value for key, value in part.items() if key != CLASS_KEY}
            _check_names(arguments, cls, f"argument of {name}", *OF_THE_DATA)
            if "sample_size" not in part:
                raise ValueError(f"`sample_size` is missing in {name}")
            part.setdefault("in_channels", defaults_of(cls)["in_channels"])
    if recipe.vae is not None and not isinstance(recipe.vae, str):
        raise ValueError(f"`vae` must be the name or folder of an autoencoder, not {recipe.vae!r}")
    return recipe


def argument(
    default: Any = dataclasses.MISSING,
    help: str | None = None,
    choices: Sequence[str] | None = None,
    **bounds: float,
) -> Any:
    """
    A dataclass field with its text for `--help` and, for numbers, their [`Bounds`]; required if it has no default.
    """
    metadata = {"help": help, "choices": choices, "bounds": Bounds(**bounds)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def defaults_of(function: Callable) -> dict[str, Any]:
    """The defaults of a function's or class's arguments, so that a script need not repeat them."""
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}


def per_stage(name: str, values: list[T] | None, num_stages: int) -> list[T] | None:
    """Repeats a single value for each stage; raises ValueError if there is neither one nor one per stage."""
    if values is not None and len(values) not in (1, num_stages):
        raise ValueError(f"--{name} takes one value, or one per stage ({num_stages}), got {len(values)}")
    return None if values is None else values * (num_stages // len(values))


def fit_to_stages(arguments: Any, names: Iterable[str], num_stages: int) -> None:
    """
    Gives each stage its value of the named arguments, in place; raises ValueError if one has neither one value nor one
    per stage, or if `train_stages` names a stage that there is not.
    """
    for name in names:
        setattr(arguments, name, per_stage(name, getattr(arguments, name), num_stages))
    missing = [number for number in arguments.train_stages or () if number > num_stages]
    if missing:
        raise ValueError(f"--train_stages {missing[0]}: the cascade has {count_of(num_stages, 'stage')}")


@dataclass(kw_only=True)
class OptimizationSettings:
    title: ClassVar[str] = "optimisation"

    train_batch_size: int = argument(64, "Images per process and step.", minimum=1)
    gradient_accumulation_steps: int = argument(1, "Batches per step.", minimum=1)
    max_train_steps: int = argument(500_000, "Steps in all, those of earlier sittings included.", minimum=1)
    learning_rate: float = argument(2e-4, "The highest rate.", minimum=0)
    lr_warmup_steps: int = argument(500, "First steps, over which the rate rises.", minimum=0)
    lr_cooldown_steps: int = argument(0, "Final steps over which the rate falls to 0.", minimum=0)
    optimizer: str = argument(
        "adamw", "muon: Muon for the layers' matrices, AdamW for the rest. Try a rate of 3e-3.", OPTIMIZERS
    )
    adam_beta1: float = argument(0.9, "Decay of AdamW's mean gradient; 0.99 in the paper.", minimum=0, below=1)
    adam_beta2: float = argument(0.999, "Decay of AdamW's mean square.", minimum=0, below=1)
    adam_weight_decay: float = argument(0.03, "AdamW's, on matrices and filters.", minimum=0)
    adam_epsilon: float = argument(1e-8, "Added to AdamW's denominator.", above=0)
    use_8bit_adam: bool = argument(False, "bitsandbytes' AdamW8bit")
    max_grad_norm: float = argument(1.0, "Larger gradients are scaled down to this norm.", above=0)
    max_skipped_steps: int = argument(20, "Non-finite steps in a row before stopping.", minimum=0)
    ema_decay: float = argument(0.9999, "Decay of the averaged weights.", minimum=0, maximum=1)


@dataclass(kw_only=True)
class WatchSettings:
    title: ClassVar[str] = "watching and resuming"

    logging_steps: int = argument(50, "Steps between log lines.", minimum=1)
    validation_steps: int = argument(1000, "Held-out loss and samples; 0: only at the end.", minimum=0)
    checkpointing_steps: int = argument(1000, "Steps between checkpoints; 0: only at the end.", minimum=0)
    checkpoints_total_limit: int | None = argument(2, "Checkpoints to keep, counting the newest.", minimum=1)
    resume_from_checkpoint: str = argument("latest", '"latest", "none" (start over) or a checkpoint folder.')


@dataclass(kw_only=True)
class TrainerSettings(WatchSettings, OptimizationSettings):
    """How a [`Trainer`] trains."""

    seed: int = argument(
        0, "Determines the initial weights, the order of the images and all noise.", minimum=0, maximum=2**32 - 1
    )
    dataloader_num_workers: int = argument(
        0, "Processes that decode images; 0: the training process itself.", minimum=0
    )


def make_parser(arguments: type, description: str | None = None) -> argparse.ArgumentParser:
    """A parser for a dataclass's fields, grouped by the `title` of the class that defines them."""
    parser = CommandParser(
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
        if kind is bool:  # a recipe's `true` can be switched off
            action = "store_true" if described.name.startswith("no_") else argparse.BooleanOptionalAction
            added = groups[title].add_argument(
                f"--{described.name}", action=action, default=described.default, **options
            )
            if action != "store_true" and "(default" not in (added.help or ""):  # Python 3.10 writes it itself
                added.help = f"{added.help or ''} (default: {described.default})".strip()
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
        convert = bounded(kind, _bounds(described)) if kind in (int, float) else not_empty
        groups[title].add_argument(f"--{described.name}", type=convert, choices=choices, **options)
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
    _check_names(recipe.training, arguments, "training argument")
    for name, value in values.items():
        if name in ("output_dir", "cascade_config"):
            raise ValueError(f"{name!r} belongs on the command line")
        is_list, kind = _unwrap(hints[name])
        choices = fields[name].metadata.get("choices")
        # As on the command line, a single value is a list of one.
        items = value if is_list and isinstance(value, list) else [value]
        items = [_convert(name, item, kind, choices, _bounds(fields[name])) for item in items]
        if not items:
            raise ValueError(f"training argument {name!r} must have at least one value")
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


def _bounds(described: dataclasses.Field) -> Bounds:
    return described.metadata.get("bounds", Bounds())


def _convert(name: str, value: Any, kind: type, choices: Sequence[str] | None, bounds: Bounds) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"training argument {name!r} must be true or false, not {value!r}")
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = isinstance(value, str)
    if kind in (int, float):  # int() raises for what is not finite
        try:
            fits = is_number and (not math.isfinite(value) or kind(value) == value)
        except OverflowError:  # an integer that is too large for a float
            fits = kind is int
    if not fits or (choices is not None and value not in choices):
        wanted = f"one of {', '.join(choices)}" if choices is not None else f"of type {kind.__name__}"
        raise ValueError(f"training argument {name!r} must be {wanted}, not {value!r}")
    if kind in (int, float) and (fault := bounds.fault(value)) is not None:
        raise ValueError(f"training argument {name!r} {fault}")
    return kind(value)


def _check_names(names: Iterable[str], owner: type, what: str, *unwanted: str) -> None:
    """Refuses names that are not arguments of `owner`, with the nearest one that is."""
    known = [name for name in inspect.signature(owner).parameters if name not in unwanted]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"unknown {what} {name!r}; {hint}")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; an error that is the user's to fix ends it with a sentence instead of a traceback."""
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
