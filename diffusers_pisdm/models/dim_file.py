"""Reads the file of DiM's weights as its authors published it (`nnet_ema.pth`), and says what a wrong file is."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..utils.messages import one_line
from ..utils.names import show_name
from .dim_conversion import FIRST_WEIGHT


EMA_NAME, RAW_NAME = "nnet_ema.pth", "nnet.pth"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before PyTorch 1.6


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """DiM's tensors by name, mapped into memory; raises a ValueError that says what a wrong file is."""
    if path.is_dir():
        converted = (path / EMA_NAME).with_suffix(".safetensors")
        path = converted if converted.is_file() and not (path / EMA_NAME).exists() else path / EMA_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Pass DiM's {EMA_NAME}, or the folder that holds it.")
    if path.name == RAW_NAME:
        raise ValueError(
            f"{path} holds the raw weights of the last training step, which draw worse. Pass their average, {EMA_NAME}"
            " in the same folder; to convert the raw ones anyway, rename the file."
        )
    with path.open("rb") as file:
        start = file.read(512)
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a safetensors file, or not all of it: {error}. Download it again."
            ) from error
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    elif not start.startswith(LEGACY_START):
        raise ValueError(f"{path} {_what_else(path, start)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        found = ", ".join(map(show_name, unsafe)) or "what only code can make"
        raise ValueError(
            f"{path} holds more than tensors ({found}) and could run code, so we do not read it. DiM's {EMA_NAME}"
            " holds tensors only: download it from its authors' links."
        ) from error
    except Exception as error:  # whatever comes of other bytes
        raise ValueError(f"{path} is damaged: {one_line(str(error).splitlines()[0])} Download it again.") from error
    return _check_content(path, content)


def _check_archive(path: Path) -> None:
    """Raises a ValueError unless a zip archive is a file of torch.save, with all bytes as they were saved."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            files = {name.partition("/")[2] for name in names}
            # PyTorch itself does not look at the checksums.
            damaged = archive.testzip() if "data.pkl" in files else None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is a damaged zip archive: {one_line(error)}. Download it again.") from error
    if "constants.pkl" in files:
        raise ValueError(f"{path} is a TorchScript program, which is code, not weights. Pass DiM's {EMA_NAME}.")
    if "data.pkl" not in files:
        inside = next((name for name in names if name.endswith(EMA_NAME)), None)
        if inside is None:
            raise ValueError(f"{path} is a zip archive, but not one of PyTorch. Pass DiM's {EMA_NAME}.")
        raise ValueError(f"{path} is a zip of the folder: unzip it and pass its {show_name(inside)}.")
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {show_name(damaged)} is wrong. Download it again.")


def _what_else(path: Path, start: bytes) -> str:
    """What a file is that PyTorch did not save, and what to do."""
    if start.startswith(b"PK"):
        return f"is truncated at {path.stat().st_size:,} bytes (the published files have 3.45 GB). Download it again."
    if start.startswith(b"\x80"):
        return f"is a plain pickle, which could run code, so we do not read it. Pass DiM's {EMA_NAME}."
    if start.lstrip().startswith(b"<"):
        return "is a web page, such as Google Drive's warning, instead of the file. Download it again."
    return f"{'was not saved by PyTorch' if start else 'is empty'}. Download it again."


def _check_content(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """What a file holds; raises a ValueError unless that is floating-point tensors by DiM's names."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name. Pass {EMA_NAME}.")
    if "param_groups" in content:
        raise ValueError(f"{path} holds the optimizer's state, not weights. Pass {EMA_NAME} from the same folder.")
    again = (
        f'. Save those alone: `torch.save({{}}, "{EMA_NAME}")`, where `content = torch.load("{path.name}",'
        " weights_only=True)`."
    )
    nested = [key for key, value in content.items() if isinstance(value, dict) and FIRST_WEIGHT in value]
    if nested:
        found = " and ".join(show_name(repr(key)) for key in nested)
        raise ValueError(
            f"{path} holds DiM's weights under {found}{again.format(f'content[{show_name(repr(nested[0]))}]')}"
        )
    others = [key for key, value in content.items() if not isinstance(value, torch.Tensor) or not isinstance(key, str)]
    if others:
        names = ", ".join(show_name(repr(key)) for key in others[:5])
        raise ValueError(
            f"{path} holds more than tensors by name: {names}"
            + again.format("{k: v for k, v in content.items() if isinstance(v, torch.Tensor)}")
        )
    prefixes = [name.removesuffix(FIRST_WEIGHT) for name in content if name.endswith(FIRST_WEIGHT)]
    if len(prefixes) == 1 and prefixes[0]:
        prefix = show_name(repr(prefixes[0]))
        raise ValueError(
            f"{path} holds DiM's weights with {prefix} before each name"
            + again.format(f"{{k.removeprefix({prefix}): v for k, v in content.items()}}")
        )
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            kind = "no data" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
            raise ValueError(
                f"`{show_name(name)}` in {path} has {kind}, but DiM's weights are dense tensors of floating-point"
                f" numbers. Pass DiM's {EMA_NAME}."
            )
    return content
