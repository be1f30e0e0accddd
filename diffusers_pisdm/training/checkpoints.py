"""Checkpoints of a training run: written whole or not at all, found by their step, checked before they are used.

Averaged weights are kept in them as safetensors.
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
    """A checkpoint could not be written."""


def find_checkpoints(output_dir: str | Path) -> tuple[list[Path], dict[Path, str]]:
    """
    The checkpoints of a run.

    Args:
        output_dir (`str` or `Path`): The run's folder; may be missing.

    Returns:
        `tuple[list[Path], dict[Path, str]]`: The complete checkpoints (folders named `checkpoint-<step>`), oldest
        first; and what else was left of checkpoints, each with what is wrong with it.
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
    Compares a checkpoint with the list of files and sizes it was completed with.

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
    Args:
        output_dir (`str` or `Path`): The run's folder; may be missing.
        resume_from (`str`): `"latest"`, `"none"`, or a checkpoint: its path, or its name in `output_dir`.
        report (`Callable`, defaults to `print`): Is told which checkpoint it is, and which ones are incomplete.

    Returns:
        `Path` or `None`: The checkpoint to resume from, if any.

    Raises:
        ValueError: The named checkpoint is not there, or not whole.
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
    Writes `checkpoint-<step>`, under another name until everything in it is on the disk, so that a run killed at any
    moment leaves the whole checkpoint or none; then removes the oldest beyond `total_limit`. All processes call it.

    Args:
        accelerator (`Accelerator`): Of the run.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): The optimizer step.
        state (`dict`): JSON-serialisable facts, kept in `trainer_state.json`.
        write (`Callable`): Writes everything else into the folder it is given; called in every process.
        total_limit (`int`, *optional*): Complete checkpoints to keep, at least 1.

    Returns:
        `Path`: The finished checkpoint.

    Raises:
        CheckpointError: It could not be written (no space, no permission); earlier checkpoints are as they were.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(_PARTIAL + final.name)
    # Each part ends with all processes knowing whether it succeeded in all of them: none waits for one that failed.
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
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch.save and safetensors have errors of their own
            fault = f"{type(error).__name__}: {error}"
        faults = [fault for fault in gather_object([fault]) if fault is not None]
        if faults:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final} could not be written ({faults[0]}). Earlier checkpoints are intact: make room or set"
                " --checkpoints_total_limit, then run the same command again to go on from the last of them."
            )
    if accelerator.is_main_process and total_limit is not None:
        complete, _ = find_checkpoints(output_dir)
        for old in complete[:-total_limit]:
            shutil.rmtree(old)
    return final


def read_state(checkpoint: str | Path) -> dict:
    """The facts that [`save_checkpoint`] kept in `trainer_state.json`."""
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
    """Waits until a file's content, or a folder's entries, are on the disk."""
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
    Writes the averaged weights. With sharded parameters (FSDP2) all processes have to call it.

    Args:
        average (`EMAModel`): The averages.
        names (`list[str]`): The parameters' names, in the order they were given to `average`.
        file (`Path`): The safetensors file to write.
        is_main_process (`bool`, defaults to `True`): Whether this process writes; the others only take part.
    """
    whole = {name: _gather(tensor) for name, tensor in zip(names, average.shadow_params, strict=True)}
    if is_main_process:
        save_file(whole, file)


def load_average(average: EMAModel, names: list[str], file: Path, step: int) -> None:
    """
    Reads what [`save_average`] wrote.

    Args:
        average (`EMAModel`): Takes the averages; its present ones say how each is sharded and where it lies.
        names (`list[str]`): As there.
        file (`Path`): The safetensors file.
        step (`int`): How many updates the averages have seen.
    """
    whole = load_file(file)
    average.shadow_params = [
        _shard_like(whole[name], present) for name, present in zip(names, average.shadow_params, strict=True)
    ]
    average.optimization_step = step


def whole_stages(accelerator: Accelerator, model: nn.Module) -> list[PISDMTransformer2DModel]:
    """The stages of a prepared objective with all weights; copies in main memory where processes hold a part each."""
    objective = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return list(objective.stages)
    state, stages = accelerator.get_state_dict(model), []
    for index, stage in enumerate(objective.stages):
        copy = PISDMTransformer2DModel.from_config(stage.config)
        prefix = f"stages.{index}."
        if accelerator.is_main_process:  # the others get no weights
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
