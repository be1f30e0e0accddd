"""Publishing a trained cascade on the Hugging Face Hub: checked first, then sent in one commit."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id

from .model_card import find_pictures, make_model_card


VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# Weights without a variant, whole or in shards, and the list of shards.
WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SAMPLES = re.compile(r"samples/step-\d+\.png")


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
) -> CommitInfo:
    """
    Publishes a run's cascade with its model card: [`prepare_upload`] and [`upload`] in one call.

    Args:
        folder (`str` or `Path`): The output folder of the training script, or of `save_pretrained`.
        repo_id (`str`): The repository, as `owner/name`; made if there is none.
        model_card, license, datasets: See [`make_model_card`].
        variants, max_shard_size: See [`prepare_upload`].
        private, revision, commit_message: See [`upload`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.

    Raises:
        OSError: Weights are missing, pickled or broken, or the Hub refuses.
        ValueError: The folder is no cascade, or an argument or the model card is wrong.
    """
    with tempfile.TemporaryDirectory() as work_dir:
        files = prepare_upload(folder, work_dir, repo_id, model_card, license, datasets, variants, max_shard_size)
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
) -> dict[str, Path]:
    """
    Checks that a folder holds a cascade that loads, and collects what its repository is to hold: the pipeline's own
    files, a model card and the pictures that it shows. Nothing is sent, and the folder stays as it is.

    Args:
        folder (`str` or `Path`): The output folder of the training script, or of `save_pretrained`.
        work_dir (`str` or `Path`): An empty folder for what is made: the card, variants and shards.
        repo_id (`str`): The repository, as `owner/name`.
        model_card, license, datasets: See [`make_model_card`].
        variants (`Sequence[str]`, defaults to none):
            `"fp16"` or `"bf16"`: weights in that precision, too, for `from_pretrained(..., variant="fp16")`. Modules
            that a model keeps in float32 stay in it. A folder's own variants are not published: they may be older.
        max_shard_size (`int` or `str`, *optional*):
            Saves the weights anew, in float32, in files of at most this size, e.g. `"5GB"`. By default they are
            published as they lie in the folder.

    Returns:
        `dict[str, Path]`: Local files by their path in the repository.

    Raises:
        OSError: Weights are missing, pickled or broken.
        ValueError: The folder is no cascade, or an argument or the model card is wrong.
    """
    folder, work_dir = Path(folder), Path(work_dir)
    _check_repo_id(repo_id)
    unknown = set(variants) - VARIANTS.keys()
    if unknown:
        raise ValueError(f"`variants` has to be among {', '.join(VARIANTS)} but holds {', '.join(sorted(unknown))}.")
    components = _check_files(folder)
    card = make_model_card(folder, repo_id, model_card, license, datasets)
    pictures = find_pictures(card, [folder] if model_card is None else [folder, Path(model_card).parent])

    # diffusers' own loader, as the Hub's visitors may use it: it fails here where it would fail there.
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    weights_dir = folder
    if max_shard_size is not None:
        weights_dir = work_dir / "shards"
        pipe.save_pretrained(weights_dir, max_shard_size=max_shard_size)
    del pipe  # room for the next one
    files = {"model_index.json": folder / "model_index.json"}
    files |= _find(folder, components, lambda name: name.endswith(".json") and ".safetensors." not in name)
    files |= _find(weights_dir, components, WEIGHTS.fullmatch)
    for variant in variants:
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, dtype=VARIANTS[variant])
        pipe.save_pretrained(work_dir / variant, variant=variant, max_shard_size=max_shard_size)
        del pipe
        files |= _find(work_dir / variant, components, re.compile(rf".*\.{variant}\b.*").fullmatch)

    card.save(work_dir / "README.md")
    return {"README.md": work_dir / "README.md", **files, **pictures}


def upload(
    files: dict[str, Path],
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Sends a cascade to the Hub in one commit, which is made whole or not at all. What an earlier commit left in the
    pipeline's own folders, and its sample grid, is removed by the same commit; other files stay.

    Args:
        files (`dict[str, Path]`): What [`prepare_upload`] returned.
        repo_id (`str`): The repository, as `owner/name`; made if there is none.
        private (`bool`, *optional*): Whether a new repository is private; by default as its owner has set it.
        revision (`str`, *optional*): A branch, made from `main` if there is none; else `main`.
        commit_message (`str`, *optional*): The commit's title.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.

    Raises:
        OSError: Nobody is logged in, or the Hub refuses: the errors of `huggingface_hub`.
        ValueError: `private` is asked for, but there is a public repository of that name.
    """
    api = HfApi(token=True)  # fails without a token, before any request
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} has to be private but exists and is public. Nothing was uploaded. Make it private in its"
            " settings, choose another name, or publish without `private`."
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    components = tuple(f"{name}/" for name in _list_components(files["model_index.json"]))
    present = api.list_repo_files(repo_id, revision=revision)
    stale = [path for path in present if path.startswith(components) or SAMPLES.fullmatch(path)]
    # Not `upload_folder(delete_patterns=...)`: with hf_xet it commits a long upload in parts, and visitors would find
    # stages that do not belong together.
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(path) for path in stale if path not in files),
            *(CommitOperationAdd(path, file) for path, file in files.items()),
        ],
        commit_message=commit_message or "Upload PISDMCascadePipeline",
        revision=revision,
    )


def _check_repo_id(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` has to be `owner/name` but is {repo_id!r}: name your user or organisation, too.")


def _check_files(folder: Path) -> list[str]:
    # The folders of the components that are there.
    index = folder / "model_index.json"
    remedy = "Give the output folder of the training script, or what `PISDMCascadePipeline.save_pretrained` wrote."
    if not index.is_file():
        raise ValueError(f"{folder} is no saved pipeline: it has no `model_index.json`. {remedy}")
    class_name = DiffusionPipeline.load_config(index).get("_class_name")
    if class_name != "PISDMCascadePipeline":
        raise ValueError(f"{folder} holds a {class_name}, not a PISDMCascadePipeline. {remedy}")
    present = [name for name, class_name in _list_components(index).items() if class_name is not None]
    pickles = sorted(_find(folder, present, lambda name: name.endswith(PICKLES)))
    if pickles:
        raise ValueError(
            f"{folder} holds pickled files: {', '.join(pickles)}. They can run code on the machine of whoever loads"
            " them, so they are not published. Save the pipeline with `save_pretrained`, which writes safetensors,"
            " and remove them."
        )
    return present


def _list_components(model_index: Path) -> dict[str, str | None]:
    # The class of each component, None for those that are left out.
    config = DiffusionPipeline.load_config(model_index)
    return {name: value[1] for name, value in config.items() if isinstance(value, list)}


def _find(folder: Path, subfolders: Iterable[str], is_wanted: Callable[[str], object]) -> dict[str, Path]:
    # Files by their path below the folder.
    paths = [path for name in subfolders for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths if is_wanted(path.name)}
