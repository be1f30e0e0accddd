"""Publishes a trained cascade or LoRA on the Hugging Face Hub: checks it first, then uploads it in one commit."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..pipelines.lora_fit import PIPELINE
from ..pipelines.pipeline_pisdm_cascade import PISDMCascadePipeline
from ..pipelines.saved_files import RIGHTS_KEY
from ..utils.hub_names import holds_lora
from .model_card import add_rights, check_links, find_pictures, make_model_card


VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# Weights without a variant, in one file or sharded, and the shard index.
WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
CONFIGS = re.compile(r"(scheduler_)?config\.json")
SAMPLES = re.compile(r"samples/(stage_\d+/)?step-\d+\.png")
INDEX = "model_index.json"
PLACE_KEY = "_name_or_path"
REMOTE_PIPELINE = Path(__file__).with_name("remote_pipeline.py")
# The base of huggingface_hub's errors in its HTTP library: also of those of the connection.
HTTP_ERROR = HfHubHTTPError.__bases__[0]


def publish_cascade(
    folder: str | Path,
    repo_id: str,
    model_card: str | Path | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    variants: Sequence[str] = (),
    max_shard_size: int | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    i_have_the_right_to_publish: bool = False,
) -> CommitInfo:
    """
    Publishes a run's cascade, or LoRA, with its model card: [`prepare_upload`] and [`upload`] in one call.

    Args:
        folder (`str` or `Path`): The output folder of the training script, of `save_pretrained` or of
            `save_lora_weights`.
        repo_id (`str`): The repository, as `owner/name`; created if it does not exist.
        model_card, license, datasets, base_model: See [`make_model_card`].
        variants, max_shard_size, i_have_the_right_to_publish: See [`prepare_upload`].
        private, revision, commit_message: See [`upload`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.

    Raises:
        OSError: Weights are missing, pickled or damaged, or the Hub refuses the upload.
        PermissionError: You are not logged in, your token may not write, or the repository is another's.
        ValueError: The folder is not a cascade, or an argument or the model card is invalid.
    """
    with tempfile.TemporaryDirectory() as work_dir:
        files = prepare_upload(
            folder,
            work_dir,
            repo_id,
            model_card,
            license,
            datasets,
            variants,
            max_shard_size,
            base_model,
            i_have_the_right_to_publish,
        )
        return upload(files, repo_id, private, revision, commit_message)


def prepare_upload(
    folder: str | Path,
    work_dir: str | Path,
    repo_id: str,
    model_card: str | Path | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    variants: Sequence[str] = (),
    max_shard_size: int | str | None = None,
    base_model: str | None = None,
    i_have_the_right_to_publish: bool = False,
) -> dict[str, Path]:
    """
    Checks that a folder holds a cascade, or LoRA adapters, that load, and collects the files for its repository: the
    pipeline's own files and a `pipeline.py` that finds its package, or the adapters' file; a model card; and the
    pictures the card shows. Nothing is uploaded, and the folder is not changed.

    Args:
        folder (`str` or `Path`): The output folder of the training script, of `save_pretrained` or of
            `save_lora_weights`.
        work_dir (`str` or `Path`): An empty folder for the generated files: the card, variants and shards.
        repo_id (`str`): The repository, as `owner/name`.
        model_card, license, datasets, base_model: See [`make_model_card`].
        variants (`Sequence[str]`, defaults to none):
            `"fp16"` or `"bf16"`: also publish weights in that precision, for `from_pretrained(..., variant="fp16")`.
            Modules that a model keeps in float32 stay in float32. Variants in the folder are not published, as they
            may be outdated.
        max_shard_size (`int` or `str`, *optional*):
            Save the weights again, in float32, in files of at most this size, e.g. `"5GB"`. By default, the folder's
            files are published unchanged.
        i_have_the_right_to_publish (`bool`, defaults to `False`):
            Your word for weights that came without a licence (of `pisdm convert-dim`, or trained from those, adapters
            included), without which they are refused. A cascade's folder's own README.md is then the default card.

    Returns:
        `dict[str, Path]`: Local files by their path in the repository.

    Raises:
        OSError: Weights are missing, pickled or damaged.
        ValueError: The folder is not a cascade, or an argument or the model card is invalid.
    """
    folder, work_dir = Path(folder), Path(work_dir)
    check_repo_id(repo_id)
    unknown = set(variants) - VARIANTS.keys()
    if unknown:
        raise ValueError(f"`variants` can be {', '.join(VARIANTS)} but contains {', '.join(sorted(unknown))}.")
    lora = folder / LORA_WEIGHT_NAME_SAFE
    is_lora = holds_lora(folder)
    if is_lora:
        if variants or max_shard_size is not None:
            raise ValueError(f"{folder} holds LoRA adapters: `variants` and `max_shard_size` are for whole cascades.")
        check_links(folder, [lora])
        # Fails here if it would fail for users.
        _, metadata = PISDMCascadePipeline.lora_state_dict(folder, return_lora_metadata=True)
        rights = (metadata or {}).get(f"{PIPELINE}.{RIGHTS_KEY}")
    else:
        components = _check_files(folder)
        configs = _find(folder, components, CONFIGS.fullmatch)
        weights = _find(folder, components, WEIGHTS.fullmatch)
        check_links(folder, [folder / INDEX, *configs.values(), *weights.values()])
        rights = _find_rights(configs.values())
    holds = f"holds {'adapters of ' if is_lora else ''}weights of others: {rights}"
    if rights is not None and not i_have_the_right_to_publish:
        raise ValueError(f"{folder} {holds}. If you may publish them, say so with `i_have_the_right_to_publish=True`.")
    if rights is not None and not is_lora and model_card is None and (folder / "README.md").is_file():
        model_card = folder / "README.md"
    card = make_model_card(folder, repo_id, model_card, license, datasets, base_model)
    if rights is not None:
        if card.data.license is not None:
            raise ValueError(f"`license` is {card.data.license!r}, but {folder} {holds}. Leave it out.")
        add_rights(card)
    pictures = find_pictures(card, [folder] if model_card is None else [folder, Path(model_card).parent])
    card.save(work_dir / "README.md")
    files = {"README.md": work_dir / "README.md", **pictures}
    if is_lora:
        return {**files, lora.name: lora}

    # Load with diffusers' own loader, as users will: whatever would fail for them fails here first.
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    weights_dir = folder
    if max_shard_size is not None:
        weights_dir = work_dir / "shards"
        pipe.save_pretrained(weights_dir, max_shard_size=max_shard_size)
    del pipe  # free memory for the next one
    (work_dir / INDEX).write_text(_public_index(folder), encoding="utf-8")
    configs = {name: _public_config(file, work_dir / "configs" / name) for name, file in configs.items()}
    files |= {INDEX: work_dir / INDEX, "pipeline.py": REMOTE_PIPELINE, **configs}
    files |= _find(weights_dir, components, WEIGHTS.fullmatch)
    for variant in variants:
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, dtype=VARIANTS[variant])
        pipe.save_pretrained(work_dir / variant, variant=variant, max_shard_size=max_shard_size)
        del pipe
        files |= _find(work_dir / variant, components, re.compile(rf".*\.{variant}\b.*").fullmatch)
    return files


def upload(
    files: dict[str, Path],
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Uploads a cascade or LoRA adapters to the Hub in one atomic commit. The same commit removes earlier sample grids
    and outdated files in the pipeline's own folders; other files stay.

    Args:
        files (`dict[str, Path]`): The files returned by [`prepare_upload`].
        repo_id (`str`): The repository, as `owner/name`; created if it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; defaults to the owner's setting.
        revision (`str`, *optional*): The branch, created from `main` if it does not exist; `main` by default.
        commit_message (`str`, *optional*): The commit's title.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.

    Raises:
        OSError: The Hub cannot be reached, or refuses the upload for another reason.
        PermissionError: You are not logged in, your token may not write, or the repository is another's.
        ValueError: `private` is set, but the repository exists and is public.
    """
    api = HfApi(token=True)
    check_login(repo_id)
    with plain_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"`private` is set, but {repo_id} exists and is public. Nothing was uploaded. Make it private in its"
                " settings, choose another name, or publish without `private`."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)

        is_lora = INDEX not in files
        components = () if is_lora else tuple(f"{name}/" for name in _list_components(files[INDEX]))
        present = api.list_repo_files(repo_id, revision=revision)
        stale = [path for path in present if path.startswith(components) or SAMPLES.fullmatch(path)]
        # Not `upload_folder(delete_patterns=...)`: with hf_xet it splits a long upload into several commits, so users
        # could load mismatched stages.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path) for path in stale if path not in files),
                *(CommitOperationAdd(path, file) for path, file in files.items()),
            ],
            commit_message=commit_message or f"Upload {'LoRA adapters' if is_lora else PISDMCascadePipeline.__name__}",
            revision=revision,
        )


def check_login(repo_id: str) -> None:
    """Raises PermissionError unless you are logged in to the Hub with a token that may write, as far as it tells."""
    with plain_errors(repo_id):
        user = HfApi(token=True).whoami()  # without a token, fails before any request
    # Fine-grained tokens show what they may do only when they are used.
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"Your token may only read, so nothing was uploaded to {repo_id}. Make one that may write under Access"
            " Tokens in your Hub settings, and log in with it: `hf auth login`."
        )


@contextmanager
def plain_errors(repo_id: str) -> Iterator[None]:
    """Says in a sentence what the Hub's refusals mean here, and what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"You are not logged in to the Hub, so nothing was uploaded to {repo_id}. Run `hf auth login`, or set"
            " HF_TOKEN, with a token that may write."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or str(error).splitlines()[0]).split())
        if status == 401:
            raise PermissionError(
                f"The Hub does not accept your token ({said}). Log in again: `hf auth login`."
            ) from error
        if status in (403, 404):
            raise PermissionError(
                f"The Hub does not let you write to {repo_id} ({said}). It may be another's, or your token may not"
                " write there: check the owner's name, or log in with a token that may (`hf auth login`)."
            ) from error
        raise OSError(f"The Hub refused the upload to {repo_id} with status {status}: {said}") from error
    except HTTP_ERROR as error:
        raise OSError(f"The Hub cannot be reached ({error}). Check the connection and publish again.") from error


def check_repo_id(repo_id: str) -> None:
    """Raises a ValueError unless a name is one that the Hub takes, with an owner."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` has to be `owner/name` but is {repo_id!r}: add your user or organisation.")


def _check_files(folder: Path) -> list[str]:
    # Returns the folders of the components present.
    index = folder / INDEX
    remedy = (
        "Pass the output folder of the training script, or of `PISDMCascadePipeline.save_pretrained` or"
        " `save_lora_weights`."
    )
    if not index.is_file():
        raise ValueError(f"{folder} is not a saved pipeline: it has no `{INDEX}`. {remedy}")
    class_name = PISDMCascadePipeline.load_config(index).get("_class_name")
    if class_name != "PISDMCascadePipeline":
        raise ValueError(f"{folder} holds a {class_name}, not a PISDMCascadePipeline. {remedy}")
    present = [name for name, class_name in _list_components(index).items() if class_name is not None]
    pickles = sorted(_find(folder, present, lambda name: name.endswith(PICKLES)))
    if pickles:
        raise ValueError(
            f"{folder} holds pickled files: {', '.join(pickles)}. They can run code on the machine of anyone who loads"
            " them, so we do not publish them. Save the pipeline with `save_pretrained`, which writes safetensors, and"
            " remove them."
        )
    return present


def _list_components(model_index: Path) -> dict[str, str | None]:
    # The class of each component, None for omitted ones.
    config = DiffusionPipeline.load_config(model_index)
    return {name: value[1] for name, value in config.items() if isinstance(value, list) and name != "_class_name"}


def _public_index(folder: Path) -> str:
    # diffusers runs the repository's own code only if `_class_name` names its file, and only if told to trust it. It
    # looks for the components' library before, so they are said to be of diffusers, where our package puts them.
    package = __name__.partition(".")[0]
    index = PISDMCascadePipeline.load_config(folder) | {"_class_name": ["pipeline", PISDMCascadePipeline.__name__]}
    index = {
        name: ["diffusers", value[1]] if isinstance(value, list) and value[:1] == [package] else value
        for name, value in index.items()
        if name != PLACE_KEY
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _public_config(file: Path, copy: Path) -> Path:
    # Without the folder on the author's machine that a component was loaded from.
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop(PLACE_KEY, None) is None:
        return file
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return copy


def _find(folder: Path, subfolders: Iterable[str], is_wanted: Callable[[str], object]) -> dict[str, Path]:
    # Files by their path relative to the folder; a pipeline's components have no folders in theirs.
    paths = [path for name in subfolders for path in sorted((folder / name).glob("*")) if is_wanted(path.name)]
    return {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}


def _find_rights(configs: Iterable[Path]) -> str | None:
    # What a model's configuration says of rights in its weights, which stays there through loading and training.
    found = (json.loads(path.read_text(encoding="utf-8")).get(RIGHTS_KEY) for path in configs)
    return next((rights for rights in found if rights is not None), None)
