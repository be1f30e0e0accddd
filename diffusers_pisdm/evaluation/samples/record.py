"""`sample_set.json`: the record of how a folder's images were made."""

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
# Fields that do not affect the images: where the weights are, and the scheduler's name (it is recorded in full).
NOT_COMPARED = ("settings.scheduler", "model.path", "model.revision")


def describe_samples(pipe: DiffusionPipeline, settings: SampleSettings) -> dict:
    """
    The record of a sample set, as returned by `read_sample_set`. The pipeline must hold the schedulers it samples
    with, and the settings must be resolved for it.
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
    return json.loads(json.dumps(record))  # as when read back: tuples become lists


def read_sample_set(folder: str | Path) -> dict:
    """
    Reads the record of how a folder's samples were made.

    Args:
        folder (`str` or `Path`): A folder written by [`write_sample_set`]; the set may be incomplete.

    Returns:
        `dict`: `settings` ([`SampleSettings`] with the pipeline's defaults filled in), `num_classes`, `model`
        (`pipeline`, `path`, `revision`, `dtype`, `sha256`), `schedulers` (classes and configurations by component
        name) and `packages` (versions).

    Raises:
        ValueError: The folder is not a sample set, or its record is damaged.
    """
    path = Path(folder, RECORD_FILE)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} is not a sample set: there is no {path}. Pass a folder written by `pisdm sample` or"
            " `write_sample_set`."
        ) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged: {error}. Restore it, or recreate the sample set.") from error
    needed = ("settings", "num_classes", "model", "schedulers", "packages")
    missing = [name for name in needed if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(f"{path} is not a sample set's record: it lacks {', '.join(missing)}.")
    return record


def claim_folder(folder: str | Path, record: dict, process_index: int) -> None:
    """
    Claims a folder for a sample set; raises ValueError if it holds samples made differently or other images. Every
    process must call it.
    """
    path = Path(folder, RECORD_FILE)
    # Look for images first: a record is written before its images, so images without one are not ours.
    images = find_images(folder)
    if path.exists() and images:
        changes = _changes(read_sample_set(folder), record)
        others = [text for name, text in changes.items() if not name.startswith("packages.")]
        if others:
            raise ValueError(
                f"{folder} holds samples made differently: {'; '.join(others)}. Use another folder, remove this one,"
                " or use its settings and model."
            )
        if changes and process_index == 0:
            warnings.warn(f"{folder} was started with other package versions: {'; '.join(changes.values())}.")
    elif images:
        raise ValueError(
            f"{folder} holds images, such as {min(images)}, but no {RECORD_FILE} that describes them. Use an empty"
            " folder, or move them elsewhere."
        )
    check_no_foreign_images(folder, record["settings"]["num_samples"])
    # A record without images may be replaced: it may come from settings that the pipeline then rejected.
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
    """The commit of a model from the Hub, taken from the cache path its components were read from."""
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    commits = [extract_commit_hash(model.config.get("_name_or_path")) for model in models]
    return next(filter(None, commits), None)


def _describe_scheduler(scheduler: SchedulerMixin) -> dict:
    # JSON has no infinities: diffusers writes them as Python does, which other readers reject.
    config = json.loads(scheduler.to_json_string(), parse_constant=str)
    return {name: value for name, value in config.items() if name != "_diffusers_version"}


def weights_fingerprint(pipe: DiffusionPipeline) -> str:
    """
    A SHA-256 of the configurations and weights of all of a pipeline's models, including adapters; the weights must be
    in memory. Moving or compiling a pipeline keeps the hash; training or casting it does not.
    """
    digest = hashlib.sha256()
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    for component, model in sorted(models.items()):
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        digest.update(f"{component} {json.dumps(config, sort_keys=True, default=str)}".encode())
        # `torch.compile` renames the weights of the model it wraps.
        weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
        for name, tensor in sorted(weights.items()):
            if tensor.is_meta:
                raise ValueError(
                    f"`{component}.{name}` is not in memory. Sample without sequential offloading; if memory is short,"
                    " use `enable_model_cpu_offload`."
                )
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
