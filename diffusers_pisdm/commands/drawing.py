"""What the commands that draw share: their arguments, what `--classes` means, and drawing in several processes."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from diffusers import DiffusionPipeline

from .. import PISDMCascadePipeline
from ..evaluation import SampleSettings, write_sample_set
from ..evaluation.samples.settings import CALL_ARGUMENTS, CLASS_RULES, count_classes, sample_classes
from ..pipelines.class_names import for_each_label, get_class_id, list_labels
from ..schedulers import find_scheduler
from ..utils.arguments import COUNT, NOT_NEGATIVE, SHARE, Bounds, bounded, not_empty
from ..utils.hub_names import holds_lora, hub_or_cache
from ..utils.machine import slow_precision_warning
from ..utils.names import show_name
from ..utils.shipped_files import CHECKPOINT, find_model


T = TypeVar("T")
NUMBER = re.compile(r"-?[0-9]+")
ERRORS = (ImportError, OSError, TypeError, ValueError)  # of what was given to a script, not of the script

# How long finished processes wait for the slowest: torch's own 10 minutes would end a run of hours.
PATIENCE = timedelta(days=7)


CALL_TYPES = {
    "num_inference_steps": COUNT,
    "guidance_scale": bounded(float, Bounds()),
    "guidance_start": SHARE,
    "guidance_stop": SHARE,
    "noise_level": bounded(float, Bounds(minimum=0, below=1)),
    "relay_strength": bounded(float, Bounds(above=0, maximum=1)),
}
MODEL_HELP = f"A folder, a Hub repository or {CHECKPOINT.name}, the checkpoint that comes with this package"


def pipeline_name(text: str) -> str:
    """A `type` for `ArgumentParser.add_argument`: what [`find_model`] finds, unless it is an adapter."""
    if holds_lora(text):
        raise argparse.ArgumentTypeError(
            f"{show_name(text)} is a LoRA adapter: pass it as --lora, with its base as --model"
        )
    return find_model(text)


def add_adapter_arguments(add: Callable[..., argparse.Action]) -> None:
    add("--lora", type=not_empty, metavar="ADAPTER", help="A LoRA adapter for it: a folder, file or Hub repository.")
    add("--lora_scale", type=NOT_NEGATIVE, help="Multiplies the adapter's strength.")


def check_adapter_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for option, needed in (("lora_scale", "lora"), ("lora", "model")):
        if getattr(args, option) is not None and getattr(args, needed) is None:
            parser.error(f"--{option} needs --{needed}")


def add_call_arguments(add: Callable[..., argparse.Action]) -> None:
    """Adds what to draw with: arguments of the pipeline's call, scheduler and precision."""
    add("--scheduler", type=scheduler_name, help="A diffusers scheduler class to sample with, e.g. DDIMScheduler.")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    for name in CALL_ARGUMENTS:
        add(f"--{name}", type=CALL_TYPES[name], nargs="+", help="One, or one per stage; default: the pipeline's.")


def scheduler_name(text: str) -> str:
    try:
        find_scheduler(text)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's call: `None` is the pipeline's default."""
    values = {name: getattr(args, name) for name in CALL_ARGUMENTS}
    return {name: value[0] if value is not None and len(value) == 1 else value for name, value in values.items()}


def add_drawing_arguments(add: Callable[..., argparse.Action]) -> None:
    """Adds the sampling arguments that `sample` and `evaluate` share."""
    add(
        "--classes",
        nargs="+",
        default=["balanced"],
        metavar="CLASS",
        help="balanced (the default): equally many of each; uniform: drawn anew for each sample; or names or ids.",
    )
    add_call_arguments(add)


def find_processes() -> PartialState:
    """Which process this is of those that `accelerate launch` or `torchrun` started."""
    # Unless told of the CPU, `PartialState` takes each process there for the only one.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def together(work: Callable[[], T]) -> T:
    """Does the work in every process and waits for all. If one fails, all raise its error."""
    result = error = None
    try:
        result = work()
    except ERRORS as raised:
        error = raised
    failures = [message for message in gather_object([None if error is None else str(error)]) if message is not None]
    if error is None and failures:
        raise ValueError(failures[0])
    if error is not None:
        raise error
    return result


def exit_with(error: Exception, state: PartialState) -> NoReturn:
    """Ends every process of a failed run; one says why, on one line."""
    if torch.distributed.is_initialized():
        state.destroy_process_group()
    sys.exit(f"error: {' '.join(str(error).split())}" if state.is_main_process else 1)


def load_pipeline(args: argparse.Namespace, state: PartialState) -> tuple[DiffusionPipeline, SampleSettings]:
    """The pipeline to draw with, and how, both checked as far as that is possible without drawing."""
    pipe = _load_pipeline(args.model, args.revision, getattr(torch, args.dtype))
    if args.lora is not None:
        _fuse_adapter(pipe, args.lora, 1.0 if args.lora_scale is None else args.lora_scale)
    pipe = place(pipe, state.device)
    settings = _read_settings(args, pipe)
    settings.resolve(pipe)
    sample_classes(settings, count_classes(pipe))
    return pipe, settings


def place(pipe: DiffusionPipeline, device: torch.device) -> DiffusionPipeline:
    """
    Moves a loaded pipeline, and tells on stderr if its precision is slow there. A CPU's is there already, and `to`
    would warn for each model that float16 cannot run.
    """
    for line in slow_precision_warning(pipe.dtype, device):
        print(line, file=sys.stderr)
    return pipe if device.type == "cpu" else pipe.to(device)


def draw_sample_set(
    pipe: DiffusionPipeline, settings: SampleSettings, batch_size: int, folder: str | Path, state: PartialState
) -> None:
    """Draws what is missing of the samples, in all processes, and waits for all."""
    processes = (state.process_index, state.num_processes)
    together(lambda: write_sample_set(pipe, folder, settings, batch_size, *processes))


def parse_classes(words: list[str], names: set[str]) -> list[int | str]:
    """
    Splits the words of `--classes` into names and ids: what is a name means this class, any other number is an id. A
    name may contain spaces and commas, so the largest piece that is a known name or a number is taken; what is neither
    comes back whole, for the pipeline to refuse.
    """
    classes: list[int | str] = []
    for word in map(str.strip, words):
        for part in [word] if word in names else filter(None, map(str.strip, word.split(","))):
            pieces = [part] if part in names else part.split()
            if not any(piece in names or NUMBER.fullmatch(piece) for piece in pieces):
                pieces = [part]  # one name of several words, misspelt
            classes += [int(p) if NUMBER.fullmatch(p) and p not in names else p for p in pieces]
    return classes


def find_class_ids(
    pipe: DiffusionPipeline, words: list[str], model: str, lora: str | None = None, given_by: str = "--classes"
) -> list[int]:
    """
    The ids of the classes that `--classes` lists, or another option whose name messages take, for the pipeline of
    `--model` with the adapter of `--lora`.
    """
    names = set(getattr(pipe, "labels", ()))  # DiT's, whose configuration has none
    for label in (pipe.config.get("id2label") or {}).values():
        names |= {label, *map(str.strip, label.split(","))}
    classes = parse_classes(words, names)
    if isinstance(pipe, PISDMCascadePipeline):
        options = {"--model": None if model == str(CHECKPOINT) else model, "--lora": lora}
        given = "".join(f" {option} {shlex.quote(value)}" for option, value in options.items() if value is not None)
        find = partial(get_class_id, listed_by=f"`pisdm generate --list_classes{given}`")
        try:
            return for_each_label(find, list_labels(classes), pipe.config.id2label, count_classes(pipe))
        except ValueError as error:
            raise ValueError(str(error).replace("`class_labels`", given_by)) from error
    unknown = [name for name in classes if isinstance(name, str)]
    if unknown and not hasattr(pipe, "get_label_ids"):
        raise ValueError(f"{type(pipe).__name__} has no class names: pass class ids to --classes, not {unknown[0]!r}.")
    return [pipe.get_label_ids([name])[0] if isinstance(name, str) else name for name in classes]


def _read_settings(args: argparse.Namespace, pipe: DiffusionPipeline) -> SampleSettings:
    is_rule = len(args.classes) == 1 and args.classes[0] in CLASS_RULES
    classes = args.classes[0] if is_rule else find_class_ids(pipe, args.classes, args.model, args.lora)
    return SampleSettings(args.num_samples, args.seed, classes, scheduler=args.scheduler, **call_arguments(args))


def _load_pipeline(model: str, revision: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    """Loads a pipeline by its own class, whose checks `DiffusionPipeline.from_pretrained` would leave out."""
    with hub_or_cache(model) as local_files_only:
        options = {"revision": revision, "local_files_only": local_files_only}
        name = DiffusionPipeline.load_config(model, **options).get("_class_name")
        name = name[-1] if isinstance(name, list) else name  # a published repository also names its code
        pipeline_class = getattr(diffusers, name or "", None)
        if pipeline_class is None:
            raise ValueError(f"{model} is a pipeline of class {name}, which diffusers does not have.")
        return pipeline_class.from_pretrained(model, dtype=dtype, **options)


def _fuse_adapter(pipe: DiffusionPipeline, lora: str, scale: float) -> None:
    """Merges an adapter into the weights, whose hash, in a sample set's record, then also tells of its strength."""
    if not isinstance(pipe, PISDMCascadePipeline):
        raise ValueError(f"{type(pipe).__name__} is no PIS-DM cascade: leave out --lora, an adapter of one.")
    pipe.load_lora_weights(lora)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    # What the record has as the model's path: the base alone would be another model.
    pipe.register_to_config(_name_or_path=f"{pipe.name_or_path} with {lora}, scaled by {scale}")
