"""Checkpoints of a training run: written completely or not at all, found by their step, checked before use.

They store averaged weights as safetensors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.transformer_pisdm import PISDMTransformer2DModel


_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = "partial-"
STATE_FILE = "trainer_state.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not belong to this run."""


def find_checkpoints(output_dir: str | Path) -> tuple[list[Path], dict[Path, str]]:
    """
    Finds the checkpoints of a run.

    Args:
        output_dir (`str` or `Path`): The run's folder; may be missing.

    Returns:
        `tuple[list[Path], dict[Path, str]]`: The complete checkpoints (folders named `checkpoint-<step>`), oldest
        first; and incomplete ones, each with what is wrong with it.
    """
    output_dir = Path(output_dir)
    complete, incomplete = [], {}
    for path in output_dir.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name):
            fault = find_fault(path)
            if fault is None:
                complete.append(path)
            else:
                incomplete[path] = fault
    for path in output_dir.glob(f"{_PARTIAL}checkpoint-*"):
        incomplete[path] = "it was being written when the run ended"
    return sorted(complete, key=_step_of), incomplete


def find_fault(checkpoint: str | Path) -> str | None:
    """
    Checks a checkpoint against the list of files and sizes recorded when it was completed.

    Args:
        checkpoint (`str` or `Path`): The checkpoint's folder.

    Returns:
        `str` or `None`: What is wrong with it, if anything.
    """
    try:
        files = read_state(checkpoint)["files"]
    except (OSError, ValueError, KeyError):
        return f"its {STATE_FILE} is missing or damaged"
    for name, size in files.items():
        path = Path(checkpoint) / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
    return None


def find_resume_point(output_dir: str | Path, resume_from: str, report: Callable[[str], None] = print) -> Path | None:
    """
    Finds the checkpoint to resume from.

    Args:
        output_dir (`str` or `Path`): The run's folder; may be missing.
        resume_from (`str`): `"latest"`, `"none"`, or a checkpoint: its path, or its name in `output_dir`.
        report (`Callable`, defaults to `print`):
            Called with messages that name the chosen checkpoint and any incomplete ones.

    Returns:
        `Path` or `None`: The checkpoint, if any.

    Raises:
        ValueError: The named checkpoint is missing or incomplete.
    """
    if resume_from == "none":
        return None
    if resume_from != "latest":
        checkpoint = next((path for path in (Path(resume_from), Path(output_dir, resume_from)) if path.exists()), None)
        checkpoint = checkpoint or Path(resume_from)
        fault = find_fault(checkpoint)
        if fault is not None:
            raise ValueError(f"Cannot resume from {checkpoint}: {fault}.")
    else:
        complete, incomplete = find_checkpoints(output_dir)
        for path, fault in incomplete.items():
            report(f"Ignoring {path}: {fault}.")
        checkpoint = complete[-1] if complete else None
    if checkpoint is not None:
        report(f"Resuming from {checkpoint}")
    return checkpoint


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
    moment leaves a complete checkpoint or none; then removes the oldest beyond `total_limit`. All processes must call
    it.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): The optimizer step.
        state (`dict`): JSON-serialisable values to store in `trainer_state.json`.
        write (`Callable`): Writes everything else into the given folder; called in every process.
        total_limit (`int`, *optional*): Complete checkpoints to keep, at least 1.

    Returns:
        `Path`: The finished checkpoint.

    Raises:
        CheckpointError: It could not be written (no space, no permission); earlier checkpoints are unchanged.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(_PARTIAL + final.name)
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
        complete, _ = find_checkpoints(output_dir)
        for old in complete[:-total_limit]:
            shutil.rmtree(old)
    return final


def read_state(checkpoint: str | Path) -> dict:
    """The values that [`save_checkpoint`] stored in `trainer_state.json`."""
    return json.loads((Path(checkpoint) / STATE_FILE).read_text())


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(partial: Path, final: Path, state: dict) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    state_file = partial / STATE_FILE
    state_file.write_text(json.dumps({**state, "files": sizes}, indent=2))
    for path in (*files, state_file, partial):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Waits until a file's contents or a folder's entries are on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def whole_stages(accelerator: Accelerator, model: nn.Module) -> list[PISDMTransformer2DModel]:
    """A prepared objective's stages with all weights: copies in main memory if they are sharded over processes."""
    objective = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return list(objective.stages)
    state, stages = accelerator.get_state_dict(model), []
    for index, stage in enumerate(objective.stages):
        copy = PISDMTransformer2DModel.from_config(stage.config)
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
