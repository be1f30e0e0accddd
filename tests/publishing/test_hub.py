"""Cascades pushed over HTTP come back whole in a process that has only the Hub, and nothing else is pushed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.publishing.hub import publish_cascade
from tests.pipelines.tiny_cascade import make_cascade
from tests.publishing.finished_run import make_finished_run, write_run_files
from tests.support.hub_server import connect, serve_hub


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's upload

ROOT = Path(__file__).parents[2]
NAME = "someone/cascade"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENS = {"token": "someone", "token of another": "another", "read token": "someone"}

# Loads each case from the Hub, as (name, arguments, path to save to), and leaves weights and images.
LOAD = """
import json, sys
import numpy as np, torch
from safetensors.torch import save_file
from diffusers_pisdm import PISDMCascadePipeline

for name, arguments, path in json.loads(sys.argv[1]):
    dtype = torch.float16 if "variant" in arguments else torch.float32
    pipe = PISDMCascadePipeline.from_pretrained(name, dtype=dtype, **arguments)
    save_file(pipe.transformer_2.state_dict(), path + ".safetensors")
    generator = torch.Generator().manual_seed(0)
    np.save(path + ".npy", pipe(["c"], num_inference_steps=2, output_type="np", generator=generator).images)
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def hub():
    with serve_hub(tokens=TOKENS) as server:
        yield server


@pytest.fixture
def logged_in(hub, monkeypatch, tmp_path):
    connect(monkeypatch, hub, "token", tmp_path)


def change(run_dir: Path, path: Path) -> Path:
    """A later state of a run: other weights in the second stage, a newer sample grid."""
    shutil.copytree(run_dir, path)
    weights = load_file(path / "transformer_2" / WEIGHTS)
    save_file(
        {name: tensor * 2 for name, tensor in weights.items()}, path / "transformer_2" / WEIGHTS, {"format": "pt"}
    )
    shutil.copy(path / "samples" / "step-0001000.png", path / "samples" / "step-0002000.png")
    return path


def draw(folder: Path, dtype: torch.dtype = torch.float32) -> np.ndarray:
    pipe = PISDMCascadePipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(["c"], num_inference_steps=2, output_type="np", generator=generator).images


@pytest.mark.usefixtures("logged_in")
def test_a_fresh_process_loads_what_was_published(hub, run_dir, tmp_path):
    changed = change(run_dir, tmp_path / "changed")
    first = publish_cascade(run_dir, NAME, variants=["fp16"])
    publish_cascade(run_dir, NAME, revision="shards/small", max_shard_size="10KB", variants=["fp16"])
    assert hub.hub.repositories[NAME].branches["main"] == first.oid  # the branch alone has moved
    assert f"transformer_2/{WEIGHTS}.index.json" in hub.hub.files(NAME, "shards/small")
    publish_cascade(changed, NAME)

    cases = {
        "whole": {"revision": first.oid},
        "half": {"revision": first.oid, "variant": "fp16"},
        "shards": {"revision": "shards/small"},
        "half shards": {"revision": "shards/small", "variant": "fp16"},
        "updated": {},
    }
    todo = [(NAME, arguments, str(tmp_path / case)) for case, arguments in cases.items()]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(todo)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_TOKEN": "", **environment},
    )
    assert run.returncode == 0, run.stderr

    weights = {case: load_file(tmp_path / f"{case}.safetensors") for case in cases}
    images = {case: np.load(tmp_path / f"{case}.npy") for case in cases}
    original, later = load_file(run_dir / "transformer_2" / WEIGHTS), load_file(changed / "transformer_2" / WEIGHTS)
    assert all(weights["whole"][name].equal(original[name]) for name in original)
    assert all(weights["shards"][name].equal(original[name]) for name in original)
    assert all(weights["updated"][name].equal(later[name]) for name in later)
    for case in ("half", "half shards"):
        assert all(
            torch.allclose(weights[case][name].float(), original[name], rtol=1e-3, atol=1e-6) for name in original
        )
    assert np.array_equal(images["whole"], draw(run_dir))
    assert np.array_equal(images["shards"], draw(run_dir))
    assert np.array_equal(images["updated"], draw(changed))
    assert np.array_equal(images["half"], draw(run_dir, torch.float16))
    assert np.array_equal(images["half shards"], images["half"])
    assert not np.array_equal(images["whole"], images["updated"])


@pytest.mark.usefixtures("logged_in")
def test_only_the_pipeline_its_card_and_pictures_are_sent(hub, run_dir):
    publish_cascade(run_dir, NAME, variants=["fp16"])
    files = set(hub.hub.files(NAME))
    stages = ("transformer", "transformer_2")
    weights = [f"{stage}/diffusion_pytorch_model{end}.safetensors" for stage in stages for end in ("", ".fp16")]
    assert files == {
        *(".gitattributes", "README.md", "model_index.json", "pipeline.py", "scheduler/scheduler_config.json"),
        *("loss_curves.png", "samples/step-0001000.png"),
        *(f"{stage}/config.json" for stage in stages),
        *weights,
    }
    assert len(hub.hub.large_files) == len(weights)
    assert len(hub.hub.repositories[NAME].commits) == 2  # the Hub's first, and one for everything


@pytest.mark.usefixtures("logged_in")
def test_a_variant_keeps_what_the_model_keeps_in_float32(hub, run_dir):
    publish_cascade(run_dir, NAME, variants=["fp16", "bf16"])
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        weights = load(hub.hub.files(NAME)[f"transformer/diffusion_pytorch_model.{variant}.safetensors"])
        kept = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
        assert kept == {name for name in weights if name.split(".")[-1] in ("A_log", "D", "dt_bias")}
        assert all(tensor.dtype == dtype for name, tensor in weights.items() if name not in kept)


@pytest.mark.usefixtures("logged_in")
def test_a_second_push_sends_what_changed_and_removes_what_is_old(hub, run_dir, tmp_path):
    publish_cascade(run_dir, NAME, variants=["fp16"], max_shard_size="10KB")
    repository = hub.hub.repositories[NAME]
    repository.commit("main", hub.hub.files(NAME) | {"notes.md": b"mine", "samples/mine.png": b"mine"})
    hub.requests.clear()
    commit = publish_cascade(change(run_dir, tmp_path / "changed"), NAME, commit_message="Train longer")
    files = hub.hub.files(NAME)
    assert not any("fp16" in path or "-of-" in path for path in files)
    assert {path for path in files if path.startswith("samples/")} == {"samples/step-0002000.png", "samples/mine.png"}
    assert files["notes.md"] == b"mine"
    assert repository.branches == {"main": commit.oid}
    assert commit.commit_message == "Train longer"

    hub.requests.clear()
    assert publish_cascade(tmp_path / "changed", NAME).oid == commit.oid  # nothing new, no commit
    assert not any("/commit/" in path or method == "PUT" for _, method, path in hub.requests)


@pytest.mark.usefixtures("logged_in")
def test_the_published_card(hub, run_dir):
    publish_cascade(run_dir, NAME, license="apache-2.0", datasets=["someone/images"])
    files = hub.hub.files(NAME)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("apache-2.0", ["someone/images"])
    assert card.data.eval_results[0].metric_value == 12.5
    assert f'from_pretrained("{NAME}")' in card.text
    assert "](samples/step-0001000.png)" in card.text and "samples/step-0001000.png" in files


@pytest.mark.usefixtures("logged_in")
def test_the_package_publishes_its_own_checkpoint(hub):
    publish_cascade(ROOT / "checkpoints" / "pisdm-emoji128", NAME, model_card=ROOT / "model_card.md")
    files = hub.hub.files(NAME)
    assert {path for path in files if path.endswith(".png")} == {
        f"docs/images/{name}.png" for name in ("emoji128_samples", "demo_stages", "emoji128_losses")
    }
    weights = ROOT / "checkpoints" / "pisdm-emoji128" / "transformer_4" / WEIGHTS
    assert files[f"transformer_4/{WEIGHTS}"] == weights.read_bytes()


# Refusals


def damage_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def damage_class(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')


def damage_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def damage_weights(folder: Path) -> None:
    (folder / "transformer_2" / WEIGHTS).write_bytes(b"")


def damage_by_pickle(folder: Path) -> None:
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")


def damage_card(folder: Path) -> None:
    (folder / "evaluation.json").write_text("{")


def damage_by_link(folder: Path) -> None:
    weights = folder / "transformer_2" / WEIGHTS
    weights.symlink_to(weights.rename(folder.parent / "outside"))


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_index, r"not a saved pipeline: .*`model_index\.json`\. Pass the output folder"),
        (damage_class, "DDPMPipeline, not a PISDMCascadePipeline. Pass the output folder"),
        (damage_json, r"model_index\.json' is not a valid JSON file"),
        (damage_weights, "Unable to load weights from checkpoint file .* Remedy"),
        (
            damage_by_pickle,
            r"pickled files: transformer/diffusion_pytorch_model\.bin\. They can run code .* remove them",
        ),
        (damage_card, r"evaluation\.json is not valid JSON"),
        (damage_by_link, rf"links to files outside of it: .*transformer_2/{WEIGHTS}"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_that_cannot_be_published_is_refused_before_anything_is_sent(hub, run_dir, tmp_path, damage, message):
    folder = shutil.copytree(run_dir, tmp_path / "copy")
    damage(folder)
    with pytest.raises((OSError, ValueError), match=message):
        publish_cascade(folder, NAME)
    assert hub.requests == []


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cascade", {}, "`repo_id` has to be `owner/name` but is 'cascade'"),
        ("some one/cascade", {}, "Repo id must"),
        (NAME, {"variants": ["fp8"]}, "`variants` can be fp16, bf16 but contains fp8"),
        (NAME, {"max_shard_size": "much"}, "much"),
    ],
)
def test_wrong_arguments(hub, run_dir, name, options, message):
    with pytest.raises(ValueError, match=message):
        publish_cascade(run_dir, name, **options)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, r"not logged in .*nothing was uploaded to someone/cascade.*hf auth login"),
        ("read token", r"token may only read.*someone/cascade.*hf auth login"),
        ("wrong", r"does not accept your token \(Invalid .*Log in again: `hf auth login`"),
        ("token of another", r"not let you write to someone/cascade \(You don't have the rights.*owner's name"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])  # a private repository, which others cannot even see
def test_who_may_not_write_is_told_so_in_a_sentence(hub, run_dir, monkeypatch, tmp_path, token, message, exists):
    if exists:
        hub.hub.create(NAME, private=True, token="token")
    connect(monkeypatch, hub, token, tmp_path)
    with pytest.raises(PermissionError, match=message) as raised:
        publish_cascade(run_dir, NAME)
    assert "\n" not in str(raised.value)
    assert len(hub.hub.repositories[NAME].commits if exists else hub.hub.repositories) == exists
    if token is None:
        assert hub.requests == []


@pytest.mark.usefixtures("logged_in")
def test_a_hub_that_cannot_be_reached(run_dir, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="cannot be reached"):
        publish_cascade(run_dir, NAME)


# Loads a repository as people do who have not imported, or do not have, the package.
STRANGER = """
import sys
sys.modules |= dict.fromkeys(sys.argv[2:])  # an import of None fails
import numpy as np, torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("someone/cascade", trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
np.save(sys.argv[1], pipe(["c"], num_inference_steps=2, output_type="np", generator=generator).images)
"""


@pytest.mark.usefixtures("logged_in")
def test_diffusers_loads_a_repository_it_trusts_or_says_what_to_install(hub, run_dir, tmp_path):
    publish_cascade(run_dir, NAME)
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    runs = [
        subprocess.run(
            [sys.executable, "-c", STRANGER, str(tmp_path / "images.npy"), *hidden],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **home},
        )
        for hidden in ([], ["diffusers_pisdm"])
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert np.array_equal(np.load(tmp_path / "images.npy"), draw(run_dir))
    last = runs[1].stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: This cascade needs .*install it as the model card", last)


@pytest.mark.usefixtures("logged_in")
def test_lora_adapters_are_published_with_a_card(hub, tmp_path):
    peft = pytest.importorskip("peft")
    run = tmp_path / "run"
    write_run_files(run)
    trained = make_cascade(2, id2label=list("abcdefghij"))
    trained.transformer_2.add_adapter(peft.LoraConfig(r=2, target_modules=["in_proj"]))
    trained.save_lora_weights(run)
    publish_cascade(run, NAME, license="mit", base_model="someone/base")
    pictures = {"samples/step-0001000.png", "loss_curves.png"}
    assert set(hub.hub.files(NAME)) == {".gitattributes", "README.md", LORA_WEIGHT_NAME_SAFE, *pictures}
    card = ModelCard(hub.hub.files(NAME)["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("someone/base", "mit")
    assert "lora" in card.data.tags
    assert 'from_pretrained("someone/base")\npipe.load_lora_weights("someone/cascade")' in card.text
    assert "trust_remote_code" not in card.text

    pipe = make_cascade(2, id2label=list("abcdefghij"))
    (tmp_path / "published.safetensors").write_bytes(hub.hub.files(NAME)[LORA_WEIGHT_NAME_SAFE])
    pipe.load_lora_weights(tmp_path / "published.safetensors")
    assert pipe.get_list_adapters() == {"transformer_2": ["default_0"]}
    with pytest.raises(ValueError, match=r"holds LoRA adapters.*whole cascades"):
        publish_cascade(run, NAME, variants=["fp16"])
    (run / LORA_WEIGHT_NAME_SAFE).write_bytes(b"junk")
    with pytest.raises(OSError, match="truncated or corrupt"):
        publish_cascade(run, NAME)


@pytest.mark.usefixtures("logged_in")
def test_private(hub, run_dir):
    publish_cascade(run_dir, "someone/hidden", private=True)
    assert hub.hub.repositories["someone/hidden"].private
    hub.hub.create(NAME, private=False, token="token")
    with pytest.raises(ValueError, match=f"`private` is set, but {NAME} .*is public. Nothing was uploaded"):
        publish_cascade(run_dir, NAME, private=True)
    assert len(hub.hub.repositories[NAME].commits) == 1
