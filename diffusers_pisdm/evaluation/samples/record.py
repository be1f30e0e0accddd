"""`sample_set.json`: what the images of a folder were made with."""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.hub_utils import extract_commit_hash

from ...utils.files import write_whole
from .files import check_no_foreign_images, find_images
from .settings import SampleSettings, count_classes


RECORD_FILE = "sample_set.json"
# What may change without the images: where the weights lie, and the name of schedulers that are recorded in full.
NOT_COMPARED = ("settings.scheduler", "model.path", "model.revision")


def describe_samples(pipe: DiffusionPipeline, settings: SampleSettings) -> dict:
    """
    The record of a sample set, as `read_sample_set` returns it, of a pipeline with the schedulers that it samples with
    and settings that are resolved for it.
    """
    package = __name__.partition(".")[0]
    record = {
        "settings": asdict(settings),
        "num_classes": count_classes(pipe),
        "model": {
            "pipeline": type(pipe).__name__,
            "path": pipe.name_or_path and str(pipe.name_or_path),
            "revision": _find_revision(pipe),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "sha256": weights_fingerprint(pipe),
        },
        "schedulers": {
            name: _describe_scheduler(component)
            for name, component in pipe.components.items()
            if isinstance(component, SchedulerMixin)
        },
        "packages": {
            package: sys.modules[package].__version__,  # a clone need not be installed
            **{name: version(name) for name in ("diffusers", "torch", "numpy", "pillow")},
        },
    }
    return json.loads(json.dumps(record))  # as it is read again: tuples become lists


def read_sample_set(folder: str | Path) -> dict:
    """
    Reads what the samples of a folder were made with.

    Args:
        folder (`str` or `Path`): As [`write_sample_set`] made it; the set need not be complete.

    Returns:
        `dict`: `settings` ([`SampleSettings`]'s, with the pipeline's defaults filled in), `num_classes`, `model`
        (`pipeline`, `path`, `revision`, `dtype`, `sha256`), `schedulers` (their classes and configurations by the
        component's name) and `packages` (versions).

    Raises:
        ValueError: The folder holds no sample set, or its record is damaged.
    """
    path = Path(folder, RECORD_FILE)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} is no sample set: there is no {path}. Name the folder that examples/sample.py or"
            " `write_sample_set` wrote."
        ) from None
    except ValueError as error:  # no JSON, no UTF-8
        raise ValueError(f"{path} is damaged: {error}. Restore it, or make the sample set again.") from error
    needed = ("settings", "num_classes", "model", "schedulers", "packages")
    missing = [name for name in needed if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(f"{path} is no record of a sample set: it lacks {', '.join(missing)}.")
    return record


def claim_folder(folder: str | Path, record: dict, process_index: int) -> None:
    """
    Makes a folder that of a sample set, or raises ValueError if it holds samples that were made otherwise, or other
    images. Each of several processes calls it.
    """
    path = Path(folder, RECORD_FILE)
    # In this order: a record is there before its images, so that images without their record are somebody else's.
    images = find_images(folder)
    if path.exists() and images:
        changes = _changes(read_sample_set(folder), record)
        others = [text for name, text in changes.items() if not name.startswith("packages.")]
        if others:
            raise ValueError(
                f"{folder} holds samples that were made otherwise: {'; '.join(others)}. Name another folder, remove"
                " this one, or use its settings and model."
            )
        if changes and process_index == 0:
            warnings.warn(f"{folder} was begun with other versions: {'; '.join(changes.values())}.")
    elif images:
        raise ValueError(
            f"{folder} holds images, such as {min(images)}, but no {RECORD_FILE} that says what they are. Name"
            " an empty folder, or move them elsewhere."
        )
    check_no_foreign_images(folder, record["settings"]["num_samples"])
    # A record without images binds nobody: settings that the pipeline then refused may have left it.
    if not images:
        with write_whole(path, f".{process_index}.unfinished") as unfinished:
            unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _changes(found: dict, wanted: dict) -> dict[str, str]:
    found, wanted = dict(_flatten(found)), dict(_flatten(wanted))
    return {
        name: f"{name} was {reprlib.repr(found.get(name))}, is {reprlib.repr(wanted.get(name))}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name) and name not in NOT_COMPARED
    }


def _flatten(record: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _find_revision(pipe: DiffusionPipeline) -> str | None:
    """The commit of a model from the Hub, which is in the path of the cache that its parts were read from."""
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    commits = [extract_commit_hash(model.config.get("_name_or_path")) for model in models]
    return next(filter(None, commits), None)


def _describe_scheduler(scheduler: SchedulerMixin) -> dict:
    # JSON has no infinities: diffusers writes them as Python does, which others cannot read.
    config = json.loads(scheduler.to_json_string(), parse_constant=str)
    return {name: value for name, value in config.items() if name != "_diffusers_version"}


def weights_fingerprint(pipe: DiffusionPipeline) -> str:
    """
    A SHA-256 of the configurations and weights, which have to be in memory, of all of a pipeline's models with their
    adapters. A pipeline that was moved or compiled keeps it, one that was trained on or cast does not.
    """
    digest = hashlib.sha256()
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    for component, model in sorted(models.items()):
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        digest.update(f"{component} {json.dumps(config, sort_keys=True, default=str)}".encode())
        # `torch.compile` renames the weights of a model that it wraps.
        weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
        for name, tensor in sorted(weights.items()):
            if tensor.is_meta:
                raise ValueError(
                    f"`{component}.{name}` is not in memory. Sample without sequential offloading; where memory is"
                    " short, use `enable_model_cpu_offload`."
                )
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
