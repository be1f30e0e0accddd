"""Other things one does with the training script: latents, streams, other formats, fine-tuning, trackers, the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.commands import cache_latents
from diffusers_pisdm.commands import train as train_command
from diffusers_pisdm.training.metrics import read_metrics
from tests.commands.training.tiny_training import CASCADE, STAGE, weights
from tests.support.hub_server import connect, serve_hub


ROOT = Path(__file__).parents[3]


def generate(pipe, names):
    generators = [torch.Generator().manual_seed(i) for i in range(len(names))]
    return pipe(names, num_inference_steps=2, generator=generators, output_type="np").images


def differing(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


# Data


def test_parquet_and_imagefolder_give_the_same_run(train, tmp_path, real_image_dir):
    folder = tmp_path / "parquet"
    folder.mkdir()
    load_dataset(str(real_image_dir), split="train").to_parquet(folder / "train.parquet")
    assert (
        differing(weights(train("a", 2) / "checkpoint-2"), weights(train("b", 2, data=folder) / "checkpoint-2")) == []
    )


def test_a_stream_is_resumed_where_it_was(train):
    streaming = ["--streaming", "--shuffle_buffer_size", "16", "--checkpointing_steps", "3"]
    through = weights(train("through", 6, *streaming) / "checkpoint-6")
    train("twice", 3, *streaming)
    assert differing(through, weights(train("twice", 6, *streaming) / "checkpoint-6")) == []


# Latents


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def latent_config(tmp_path, vae_dir):
    stages = [{**stage, "in_channels": 4} for stage in CASCADE["stages"]]
    stages[1]["low_res_channels"] = 4
    config = tmp_path / "latent.json"
    config.write_text(json.dumps({**CASCADE, "stages": stages, "vae": str(vae_dir)}))
    return config


def test_training_in_latents_leaves_a_pipeline_with_the_vae(train, latent_config):
    output = train("run", 2, "--validation_split", "train", config=latent_config)
    pipe = PISDMCascadePipeline.from_pretrained(output)
    assert generate(pipe, ["heart"]).shape == (1, 16, 16, 3)
    assert "validation/denoising_2" in read_metrics(output / "metrics.jsonl")[-1]


def test_training_from_cached_latents_does_not_encode(
    train,
    command,
    latent_config,
    tmp_path,
    real_image_dir,
    monkeypatch,
):
    cache = tmp_path / "cache"
    cache_latents.main(
        [
            *("--output_dir", str(cache), "--cascade_config", str(latent_config)),
            *("--train_data_dir", str(real_image_dir), "--images_per_shard", "20"),
        ]
    )
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    arguments = command("run", 4, "--latent_cache", str(cache), "--validation_latent_cache", str(cache))
    at = arguments.index("--train_data_dir")
    del arguments[at : at + 2]
    at = arguments.index("--cascade_config")
    arguments[at + 1] = str(latent_config)
    train_command.train(arguments)
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path / "run")
    assert generate(pipe, ["heart"]).shape == (1, 16, 16, 3) and pipe.config.id2label[0] == "animal-mammal"
    assert any("validation/denoising_1" in row for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


# Fine-tuning


@pytest.fixture
def new_class_dir(tmp_path, real_image_dir):
    """Two classes of the first data set, and one under a new name."""
    folder = tmp_path / "new"
    names = sorted(path.name for path in real_image_dir.iterdir() if path.is_dir())
    for old, new in ((names[0], names[0]), (names[2], names[2]), (names[1], "novelty")):
        (folder / new).mkdir(parents=True)
        for image in (real_image_dir / old).glob("*.png"):
            (folder / new / image.name).write_bytes(image.read_bytes())
    return folder


def test_new_classes_and_a_stage_are_added_to_a_published_cascade(train, tmp_path, new_class_dir):
    base = train("base", 2)
    stages = [*CASCADE["stages"], {**CASCADE["stages"][1], "sample_size": 16}]
    config = tmp_path / "three.json"
    config.write_text(json.dumps({**CASCADE, "stages": stages}))
    frozen = ["--learning_rate", "0", "--pretrained_model_name_or_path", str(base)]
    pipe = PISDMCascadePipeline.from_pretrained(train("more", 1, *frozen, data=new_class_dir, config=config))
    assert sorted(pipe.config.id2label.values()) == sorted(path.name for path in new_class_dir.iterdir())
    assert len(pipe.stages) == 3 and generate(pipe, ["novelty"]).shape == (1, 16, 16, 3)
    kept = pipe.config.id2label[0]
    assert kept == "animal-mammal"
    before = PISDMCascadePipeline.from_pretrained(base)
    before.set_progress_bar_config(disable=True)
    two = PISDMCascadePipeline.from_pretrained(tmp_path / "more", transformer_3=None)
    np.testing.assert_allclose(generate(two, [kept]), generate(before, [kept]), atol=1e-5)


def test_a_model_keeps_its_class_ids_and_a_configuration_is_chosen(tmp_path, train, real_image_files):
    names = ["10", "9", "2"]
    for file, name in zip(real_image_files, names * 3):
        for top in ("numbers", "letters"):
            folder = tmp_path / "data" / top / (name if top == "numbers" else f"class {name}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    configs = "".join(f"- config_name: {top}\n  data_dir: {top}\n" for top in ("numbers", "letters"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def run(name, *arguments):
        output = train(name, 1, "--dataset_config_name", "numbers", *arguments, data=tmp_path / "data")
        return output, list(PISDMCascadePipeline.from_pretrained(output).config.id2label.values())

    base, by_number = run("base")
    assert by_number == ["2", "9", "10"]
    # As a run of an earlier version left it, that sorted them as text.
    by_text = sorted(names)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "id2label": dict(enumerate(by_text))}))
    state_file = base / "checkpoint-1" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    early = {name: value for name, value in state.items() if name not in ("digest", "digests", "identity")}
    state_file.write_text(json.dumps(early))
    assert run("tuned", "--pretrained_model_name_or_path", str(base))[1] == by_text
    assert run("base", "--max_train_steps", "2")[1] == by_text


def test_without_a_recipe_the_pretrained_cascade_says_what_to_train(tmp_path, train, command):
    base = train("base", 2)
    arguments = command("run", 2, "--pretrained_model_name_or_path", str(base), "--train_batch_size", "8")
    train_command.train(arguments[2:])  # without --cascade_config
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path / "run")
    assert [stage.config.sample_size for stage in pipe.stages] == [4, 8]
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    swapped = DDIMScheduler.from_config(pipe.scheduler.config)
    assert swapped.config.timestep_spacing == "trailing"  # with DPM-Solver's own, DDIM's steps do not meet


def test_a_pretrained_cascade_without_class_names_is_refused(train):
    base = train("base", 1)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "id2label": None}))
    with pytest.raises(ValueError, match=r"0 class names.*`id2label=\[\.\.\.\]`"):
        train("run", 1, "--pretrained_model_name_or_path", str(base))


def test_lora_adapters_load_back_into_the_pipeline(train, tmp_path, new_class_dir):
    base = train("base", 2)
    lora = ["--pretrained_model_name_or_path", str(base), "--lora_rank", "2", "--learning_rate", "1e-2"]
    output = train("lora", 4, *lora, "--train_stages", "1", data=new_class_dir)
    adapter = load_file(output / "pytorch_lora_weights.safetensors")
    assert any("lora_B" in name for name in adapter) and not (output / "model_index.json").exists()
    pipe = PISDMCascadePipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    plain = generate(pipe, ["animal-mammal"])
    pipe.load_lora_weights(output)
    assert "novelty" in pipe.config.id2label.values()
    assert np.abs(generate(pipe, ["animal-mammal"]) - plain).max() > 1e-4
    resumed = train("lora", 6, *lora, "--train_stages", "1", data=new_class_dir)
    assert differing(adapter, load_file(resumed / "pytorch_lora_weights.safetensors")) != []


def test_adapters_for_the_hub_need_a_base_there_before_training(train, tmp_path, monkeypatch, capsys):
    base = train("base", 1)
    capsys.readouterr()
    lora = ["--pretrained_model_name_or_path", str(base), "--lora_rank", "2"]
    with serve_hub(tokens={"token": "someone"}) as server:
        connect(monkeypatch, server, "token", tmp_path)
        with pytest.raises(ValueError, match=r"folder of yours.*to training as `pretrained_model_name_or_path`"):
            train("lora", 1, *lora, "--push_to_hub", "--hub_model_id", "someone/lora")
        assert not (tmp_path / "lora" / "checkpoint-1").exists() and "Training:" not in capsys.readouterr().out
        assert "someone/lora" not in server.hub.repositories


def test_adapters_cannot_add_stages(train, tmp_path):
    base = train("base", 1)
    third = {"sample_size": 16, "low_res_channels": 3, **STAGE}
    (tmp_path / "three.json").write_text(json.dumps({**CASCADE, "stages": [*CASCADE["stages"], third]}))
    lora = ["--pretrained_model_name_or_path", str(base), "--lora_rank", "2"]
    with pytest.raises(ValueError, match=r"only adapts pretrained stages"):
        train("lora", 1, *lora, config=tmp_path / "three.json")


# Watching and publishing


def test_tensorboard_gets_numbers_and_pictures(train):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = train("run", 4, "--report_to", "tensorboard")
    events = loader.EventAccumulator(str(next((output / "logs").rglob("events.*")).parent))
    events.Reload()
    assert "train/denoising_1" in events.Tags()["scalars"] and "samples" in events.Tags()["images"]


def test_samples_are_kept_over_time(train):
    output = train("run", 8)
    names = sorted(path.name for path in (output / "samples").glob("*.png"))
    assert names == ["over_time.png", "step-0000004.png", "step-0000008.png"]


def test_a_dry_run_prints_the_cost_and_leaves_nothing(train, capsys):
    output = train("run", 8, "--dry_run")
    said = capsys.readouterr().out
    assert all(word in said for word in ("arameters", "FLOP", "emory", "images/s"))
    assert not output.exists()


LOAD = """
import sys, torch
from safetensors.torch import save_file
from diffusers_pisdm import PISDMCascadePipeline
pipe = PISDMCascadePipeline.from_pretrained("someone/tiny")
weights = {f"{i}.{name}": p for i, stage in enumerate(pipe.stages) for name, p in stage.state_dict().items()}
save_file(weights, sys.argv[1])
"""


def test_a_run_publishes_itself_and_a_fresh_process_loads_it(train, monkeypatch, tmp_path):
    loaded = tmp_path / "loaded.safetensors"
    with serve_hub(tokens={"secret": "someone"}) as hub:
        connect(monkeypatch, hub, "secret", tmp_path)
        train("run", 2, "--push_to_hub", "--hub_model_id", "someone/tiny")
        place = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "", "HF_HOME": str(tmp_path / "reader"), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **place}
        subprocess.run([sys.executable, "-c", LOAD, str(loaded)], env=environment, check=True, timeout=250)
    average = load_file(tmp_path / "run" / "checkpoint-2" / "ema.safetensors")
    published = load_file(loaded)
    assert published.keys() == average.keys() and differing(average, published) == []


def test_without_a_login_publishing_fails_before_the_training(train, monkeypatch, tmp_path):
    with serve_hub(tokens={"secret": "someone"}) as hub:
        connect(monkeypatch, hub, "wrong", tmp_path)
        with pytest.raises(PermissionError, match=r"does not accept your token .*hf auth login"):
            train("run", 2, "--push_to_hub", "--hub_model_id", "someone/tiny")
    assert not (tmp_path / "run").exists()
