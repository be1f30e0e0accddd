"""Names that may be those of a local folder or of a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .messages import one_line


PATIENCE = 10.0  # seconds for the Hub's first answer


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder or file: the Hub has no repository of this form."""
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def holds_lora(folder: str | Path) -> bool:
    """Whether a folder holds LoRA adapters instead of a pipeline."""
    return Path(folder, LORA_WEIGHT_NAME_SAFE).is_file() and not Path(folder, "model_index.json").exists()


def check_exists(name: str | Path) -> None:
    """Raises a FileNotFoundError if a name is a path without a folder, before it is taken for a repository."""
    if os.path.isfile(os.path.expanduser(name)):
        raise FileNotFoundError(f"{name} is a file: pass a folder, or the name of a repository on the Hub.")
    if not os.path.exists(os.path.expanduser(name)) and is_path(os.fspath(name)):
        raise FileNotFoundError(f"There is no folder {name}: check the path.")


# The loads that this one is part of, by what they load, and whether they get only what is cached.
_OUTER_LOADS: ContextVar[dict[tuple[str, str], bool]] = ContextVar("outer loads")


@contextmanager
def hub_or_cache(
    name: str | Path, kind: str = "model", token: str | bool | None = None, local_files_only: bool = False
) -> Iterator[bool]:
    """
    Around a load that takes a folder, or else a `"model"` or `"dataset"` on the Hub. A name that is neither is a
    FileNotFoundError at once. Yields the load's `local_files_only`: true also if the Hub does not answer, so that the
    load gets what is cached, rather than many retries. A load within this one does not ask the Hub again.
    """
    name = os.fspath(name)
    outer = _OUTER_LOADS.get({})
    local_files_only = local_files_only or outer.get((name, kind), False)
    if local_files_only or (name, kind) in outer:
        yield local_files_only
        return
    check_exists(name)
    unreachable = None if os.path.exists(os.path.expanduser(name)) else _why_unreachable(name, kind, token)
    reset = _OUTER_LOADS.set({**outer, (name, kind): unreachable is not None})
    try:
        yield unreachable is not None
    except OSError as error:
        if unreachable is None:
            raise
        raise FileNotFoundError(
            f"There is no folder {name}, and no {kind} of this name in the cache; the Hub cannot be reached"
            f" ({one_line(unreachable)}). Check the name and the connection."
        ) from error
    finally:
        _OUTER_LOADS.reset(reset)


def _why_unreachable(name: str, kind: str, token: str | bool | None) -> object:
    """What keeps us from the Hub, if anything; a FileNotFoundError if it has no such repository."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi(token=token).repo_info(name, repo_type=kind, timeout=PATIENCE)
    except HfHubHTTPError as error:  # others, such as of gated ones, the load meets, too, and tells
        is_missing = isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404
        if is_missing and not isinstance(error, GatedRepoError):
            raise FileNotFoundError(
                f"There is no folder {name}, and no {kind} of this name on the Hub that you may read. Check the"
                " name; for a private one, run `hf auth login`."
            ) from error
    except Exception as error:  # of the connection: of the HTTP library, which changes with huggingface_hub
        return error
    return None
