"""Names that may be those of a local folder or of a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def check_exists(name: str | Path) -> None:
    """Raises a FileNotFoundError if a name is a path without a folder, before it is taken for a repository."""
    if os.path.isfile(os.path.expanduser(name)):
        raise FileNotFoundError(f"{name} is a file: pass a folder, or the name of a repository on the Hub.")
    if not os.path.exists(os.path.expanduser(name)) and is_path(os.fspath(name)):
        raise FileNotFoundError(f"There is no folder {name}: check the path.")


@contextmanager
def hub_or_cache(name: str | Path, kind: str = "model", token: str | bool | None = None) -> Iterator[None]:
    """
    Around a load that takes a folder, or else a `"model"` or `"dataset"` on the Hub. A name that is neither is a
    FileNotFoundError at once. If the Hub does not answer, the load gets what is cached, rather than many retries.
    """
    check_exists(name)
    was_offline = constants.HF_HUB_OFFLINE
    unreachable = "HF_HUB_OFFLINE is set" if was_offline else None
    if os.path.exists(os.path.expanduser(name)):
        unreachable = None
    elif not was_offline:
        try:
            HfApi(token=token).repo_info(os.fspath(name), repo_type=kind, timeout=PATIENCE)
        except HfHubHTTPError as error:  # others, such as of gated ones, the load meets, too, and tells
            is_missing = isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404
            if is_missing and not isinstance(error, GatedRepoError):
                raise FileNotFoundError(
                    f"There is no folder {name}, and no {kind} of this name on the Hub that you may read. Check the"
                    " name; for a private one, run `hf auth login`."
                ) from error
        except Exception as error:  # of the connection: of the HTTP library, which changes with huggingface_hub
            unreachable = error
    if unreachable is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and no {kind} of this name in the cache; the Hub cannot be reached"
            f" ({one_line(unreachable)}). Check the name and the connection."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline
