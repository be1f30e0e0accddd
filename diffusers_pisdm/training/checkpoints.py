"""Checkpoints of a training run: written completely or not at all, ordered by run and step, verified before use.

Several runs may share a folder: one that starts over, or resumes from anything but the newest checkpoint, is a new
run, and its checkpoints are newer than all others, whatever their step. Averaged weights are stored as safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.stage_models import StageModel, class_of
from ..utils.files import flush
from ..utils.names import show_name


_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = "partial-"
STATE_FILE = "trainer_state.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not belong to this run."""


def find_checkpoints(output_dir: str | Path) -> tuple[list[Path], dict[Path, str]]:
    """
    Finds the checkpoints in a folder, without reading their weights.

    Args:
        output_dir (`str` or `Path`): The folder; may be missing.

    Returns:
        `tuple[list[Path], dict[Path, str]]`: The complete checkpoints (folders named `checkpoint-<step>`), oldest
        first; and incomplete ones, each with what is wrong with it.
    """
    output_dir = Path(output_dir)
    complete, incomplete = [], {}
    for path in output_dir.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name):
            fault = find_fault(path, digests=False)
            if fault is None:
                complete.append(path)
            else:
                incomplete[path] = fault
    for path in output_dir.glob(f"{_PARTIAL}checkpoint-*"):
        incomplete[path] = "it was being written when the run ended"
    return sorted(complete, key=lambda path: (_run_of(path), _step_of(path))), incomplete


def find_fault(checkpoint: str | Path, digests: bool = True) -> str | None:
    """
    Checks a checkpoint against the sizes and SHA-256 digests of its files, recorded when it was completed.

    Args:
        checkpoint (`str` or `Path`): The checkpoint's folder.
        digests (`bool`, defaults to `True`): Whether to compare contents too, which reads all files.

    Returns:
        `str` or `None`: What is wrong with it, if anything.
    """
    try:
        state = read_state(checkpoint)
        files = state["files"]
        digest = state.pop("digest", None)
        if ("digests" in state or digest is not None) and digest != _digest_of_state(state):  # early ones have neither
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {STATE_FILE} is missing or damaged"
    for name, size in files.items():
        path = Path(checkpoint) / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
        recorded = state.get("digests", {}).get(name)  # early checkpoints have none
        if digests and recorded is not None and _digest(path) != recorded:
            return f"its file {name} is damaged: its contents have changed since it was written"
    return None


def find_resume_point(
    output_dir: str | Path, resume_from: str, report: Callable[[str], None] = print
) -> tuple[Path | None, int]:
    """
    Finds the checkpoint to resume from, and the number of the run that resumes there.

    Args:
        output_dir (`str` or `Path`): The run's folder; may be missing.
        resume_from (`str`): `"latest"`, `"none"`, or a checkpoint: its path, or its name in `output_dir`.
        report (`Callable`, defaults to `print`):
            Called with messages that name the chosen checkpoint and any damaged ones.

    Returns:
        `tuple[Path | None, int]`: The checkpoint, if any; and the run's number: that of the newest checkpoint if it is
        the one to resume from, else one that no checkpoint in `output_dir` has.

    Raises:
        ValueError: The named checkpoint is missing or damaged.
        CheckpointError: All checkpoints are damaged.
    """
    complete, faults = find_checkpoints(output_dir)
    next_run = 1 + max((_run_of(path) for path in complete), default=-1)
    if resume_from == "none":
        return None, next_run
    if resume_from == "latest":
        checkpoint = None
        for path in reversed(complete):
            fault = find_fault(path)
            if fault is None:
                checkpoint = path
                break
            faults[path] = fault
        for path, fault in faults.items():
            report(f"Ignoring {path}: {fault}.")
        if checkpoint is None and any(_NAME.fullmatch(path.name) for path in faults):
            raise CheckpointError(
                f"No checkpoint in {output_dir} is intact. To start over, pass --resume_from_checkpoint none."
            )
        newest = checkpoint
    else:
        checkpoint = next((path for path in (Path(resume_from), Path(output_dir, resume_from)) if path.exists()), None)
        if checkpoint is None:
            there = ", ".join(path.name for path in complete) or "none"
            raise ValueError(f"There is no checkpoint {resume_from!r}. Checkpoints in {output_dir}: {there}.")
        fault = find_fault(checkpoint)
        if fault is not None:
            raise ValueError(f"Cannot resume from {checkpoint}: {fault}.")
        newest = complete[-1] if complete else None
    if checkpoint is None:
        return None, next_run
    report(f"Resuming from {checkpoint}")
    continues = newest is not None and newest.resolve() == checkpoint.resolve()
    return checkpoint, _run_of(checkpoint) if continues else next_run


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    state: dict,
    write: Callable[[Path], None],
    total_limit: int | None = None,
) -> Path:
    """
    Writes `checkpoint-<step>` under a temporary name until everything in it is on disk, so that a run killed at any
    moment leaves a complete checkpoint or none. The oldest beyond `total_limit` are removed first, which makes room on
    a full disk, except the newest. All processes must call it.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): The optimizer step.
        state (`dict`):
            JSON-serialisable values to store in `trainer_state.json`, with the number of the run as `run`.
        write (`Callable`): Writes everything else into the given folder; called in every process.
        total_limit (`int`, *optional*): Complete checkpoints to keep, at least 1.

    Returns:
        `Path`: The finished checkpoint.

    Raises:
        CheckpointError: It could not be written (no space, no permission); earlier checkpoints are unchanged.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(_PARTIAL + final.name)
    if accelerator.is_main_process and total_limit is not None:
        complete, _ = find_checkpoints(output_dir)
        _remove_oldest([path for path in complete if path != final], max(1, total_limit - 1))
    # After each part, every process knows whether all succeeded, so none waits for one that failed.
    parts = [
        (accelerator.is_main_process, lambda: _make_empty(partial)),
        (True, lambda: write(partial)),
        (accelerator.is_main_process, lambda: _complete(partial, final, {"step": step, **state})),
    ]
    for mine, part in parts:
        fault = None
        try:
            if mine:
                part()
        # torch.save and safetensors raise their own errors.
        except (OSError, RuntimeError, SafetensorError) as error:
            fault = f"{type(error).__name__}: {error}"
        faults = [fault for fault in gather_object([fault]) if fault is not None]
        if faults:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final} could not be written ({faults[0]}). Earlier checkpoints are intact: free up space or set"
                " --checkpoints_total_limit, then rerun the same command to resume from the last one."
            )
    if accelerator.is_main_process and total_limit is not None:
        _remove_oldest(find_checkpoints(output_dir)[0], total_limit)
    return final


@contextmanager
def room_on_disk(path: str | Path) -> Iterator[None]:
    """Turns a failed write to `path` inside this context into a [`CheckpointError`] that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written ({type(error).__name__}: {error}). Checkpoints are intact: free up space,"
            " then rerun the same command to resume from the last one."
        ) from error


# Arguments whose change does not alter what is learned, or is meant to.
_UNREPORTED = {"resume_from_checkpoint", "output_dir", "dry_run", "rehearse", "report_to", "tracker_project_name"}
_UNREPORTED |= {"dataloader_num_workers", "keep_images_gib", "push_to_hub", "hub_model_id", "hub_private_repo"}

# Arguments that a checkpoint depends on, and what must stay the same of them.
_FIXED: dict[str, Callable[[Any], Any]] = {
    "pretrained_model_name_or_path": str,  # its weights are the checkpoint's by now
    "class_name_factors": str,
    "train_stages": str,
    "sil_weight": bool,  # without it, there are no heads
    "sil_form": str,
    "sil_subtract_condition": bool,
    "seed": int,  # the order of the images
}


def settings_changed(
    checkpoint: Path,
    state: dict,
    identity: dict[str, Any],
    settings: dict[str, Any],
    report: Callable[[str], None] = print,
) -> dict[str, list]:
    """
    Compares a run with the checkpoint it resumes from.

    Args:
        checkpoint (`Path`): Its folder, for messages.
        state (`dict`): Its `trainer_state.json`. Early checkpoints record nothing to compare.
        identity (`dict[str, Any]`): What must not change, by name.
        settings (`dict[str, Any]`): What may change, except the arguments in `_FIXED`.
        report (`Callable`, defaults to `print`): Called with a line for each changed setting.

    Returns:
        `dict[str, list]`: For each changed setting, its old and new value.

    Raises:
        CheckpointError: Something that must not change is different; the message has both values.
    """
    identity, settings = json.loads(json.dumps([identity, settings], default=str))  # as the checkpoint was
    before = state.get("settings", settings)
    changed = {
        name: [before[name], value]
        for name, value in settings.items()
        if name in before and before[name] != value and name not in _UNREPORTED
    }
    was = state.get("identity", identity)
    different = {name: [was.get(name), identity.get(name)] for name in {**was, **identity}}
    different = {name: values for name, values in different.items() if values[0] != values[1]}
    fixed = {
        name: values for name, values in changed.items() if name in _FIXED and len({*map(_FIXED[name], values)}) > 1
    }
    if fixed or different:
        shown = [*_describe(fixed, "--"), *_describe(different)]
        more = f"; and {len(shown) - 5} more" if len(shown) > 5 else ""
        cause = f" Changed arguments: {'; '.join(_describe(changed, '--'))}." if different and changed else ""
        raise CheckpointError(
            f"{checkpoint} is of another run: {'; '.join(shown[:5])}{more}.{cause} Resume with what the run started"
            " with, or train elsewhere (--output_dir) or anew (--resume_from_checkpoint none)."
        )
    for name, (old, new) in changed.items():
        report(f"--{name} was {old}, is {new} from step {state['step']} on.")
    return changed


def report_changed_data(state: dict, fingerprint: dict[str, str], report: Callable[[str], None] = print) -> None:
    """Reports of which classes or files the data are no longer those of the checkpoint with this `state`."""
    before = state.get("data", fingerprint)  # early checkpoints have none
    changed = [name for name in {**before, **fingerprint} if before.get(name) != fingerprint.get(name)]
    if changed:
        shown = f"{', '.join(map(show_name, changed[:5]))}{', ...' if len(changed) > 5 else ''}"
        report(
            f"The training data have changed since step {state['step']}, in {len(changed)} classes or files: {shown}."
        )


def _describe(changes: dict[str, list], prefix: str = "") -> list[str]:
    """Old and new values for messages, shortened: noise schedules have thousands of numbers."""
    shown = {
        name: [v if len(v) <= 80 else f"{v[:77]}..." for v in map(repr, values)] for name, values in changes.items()
    }
    return [f"{prefix}{name} was {old}, is {new}" for name, (old, new) in shown.items()]


def read_state(checkpoint: str | Path) -> dict:
    """The values that [`save_checkpoint`] stored in `trainer_state.json`."""
    return json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _remove_oldest(checkpoints: list[Path], limit: int) -> None:
    for old in checkpoints[:-limit]:
        shutil.rmtree(old)


def _complete(partial: Path, final: Path, state: dict) -> None:
    files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    state |= {
        "files": {name: path.stat().st_size for name, path in files.items()},
        "digests": {name: _digest(path) for name, path in files.items()},
    }
    state_file = partial / STATE_FILE
    state_file.write_text(json.dumps({**state, "digest": _digest_of_state(state)}, indent=2), encoding="utf-8")
    for path in (*files.values(), state_file, partial):
        flush(path)
    replaced = final.with_name(f"{_PARTIAL}{final.name}-replaced")
    if final.exists():  # of another run
        shutil.rmtree(replaced, ignore_errors=True)  # left by a process that was killed below
        final.rename(replaced)
    partial.rename(final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest_of_state(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _run_of(checkpoint: Path) -> int:
    return read_state(checkpoint).get("run", 0)  # early checkpoints have none


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def save_average(average: EMAModel, names: list[str], file: Path, is_main_process: bool = True) -> None:
    """
    Writes the averaged weights. With sharded parameters (FSDP2), all processes must call it.

    Args:
        average (`EMAModel`): The averaged weights.
        names (`list[str]`): The parameters' names, in the order they were given to `average`.
        file (`Path`): The safetensors file to write.
        is_main_process (`bool`, defaults to `True`): Whether this process writes; the others only participate.
    """
    whole = {name: _gather(tensor) for name, tensor in zip(names, average.shadow_params, strict=True)}
    if is_main_process:
        save_file(whole, file)


def load_average(average: EMAModel, names: list[str], file: Path, step: int) -> None:
    """
    Reads what [`save_average`] wrote.

    Args:
        average (`EMAModel`): Receives the weights; its current ones determine each weight's sharding and device.
        names (`list[str]`): As in [`save_average`].
        file (`Path`): The safetensors file.
        step (`int`): The number of updates so far.
    """
    whole = load_file(file)
    average.shadow_params = [
        _shard_like(whole[name], present) for name, present in zip(names, average.shadow_params, strict=True)
    ]
    average.optimization_step = step


def whole_stages(accelerator: Accelerator, model: nn.Module) -> list[StageModel]:
    """A prepared objective's stages with all weights: copies in main memory if they are sharded over processes."""
    objective = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return list(objective.stages)
    state, stages = accelerator.get_state_dict(model), []
    for index, stage in enumerate(objective.stages):
        copy = class_of(stage).from_config(stage.config)
        prefix = f"stages.{index}."
        if accelerator.is_main_process:  # the others receive no weights
            copy.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        stages.append(copy)
    return stages


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _shard_like(tensor: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    tensor = tensor.to(present.device)
    if isinstance(present, DTensor):
        return distribute_tensor(tensor, present.device_mesh, present.placements)
    return tensor
