"""Training with DiM as the first stage."""

import json

import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler

from diffusers_pisdm import DiMTransformer2DModel, PISDMCascadePipeline
from diffusers_pisdm.commands import publish
from diffusers_pisdm.models.stage_models import stage_config
from tests.commands.training.tiny_training import CASCADE, STAGE
from tests.support.hub_server import connect, serve_hub


DIM = {"_class_name": "DiMTransformer2DModel", "sample_size": 4, **STAGE, "num_layers": 3}


SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def save_dim(folder, names):
    """A folder as `pisdm convert-dim` leaves it, with random weights."""
    torch.manual_seed(0)
    dim = DiMTransformer2DModel(**{key: value for key, value in DIM.items() if key[0] != "_"}, num_classes=len(names))
    dim.register_to_config(_rights="theirs")
    scheduler = DPMSolverSinglestepScheduler(**SCHEDULE, solver_order=3, final_sigmas_type="sigma_min")
    PISDMCascadePipeline(dim, scheduler, id2label=names, default_guidance_scale=1.4).save_pretrained(folder)
    return dim


def write_recipe(path, stages, **scheduler):
    path.write_text(json.dumps({**CASCADE, "scheduler": {**CASCADE["scheduler"], **scheduler}, "stages": stages}))
    return path


def test_a_recipe_can_begin_with_dim(tmp_path, train):
    """From scratch, as a baseline; and its cost is counted."""
    config = write_recipe(tmp_path / "dim.json", [DIM])
    train("run", 1, "--dry_run", config=config)
    pipe = PISDMCascadePipeline.from_pretrained(train("run", 4, config=config))
    assert type(pipe.transformer) is DiMTransformer2DModel and pipe.transformer.config.padding == "lateral"


def test_a_stage_is_trained_above_a_converted_dim(tmp_path, train, real_image_dir):
    """The frozen stage below keeps its weights, and says whose they are."""
    names = sorted(folder.name for folder in real_image_dir.iterdir() if folder.is_dir())
    dim = save_dim(tmp_path / "dim", names)
    stages = [stage_config(dim), CASCADE["stages"][1]]
    config = write_recipe(tmp_path / "two.json", stages, **SCHEDULE, prediction_type="epsilon")
    base = ("--pretrained_model_name_or_path", str(tmp_path / "dim"))
    pipe = PISDMCascadePipeline.from_pretrained(train("run", 4, *base, "--train_stages", "2", config=config))
    assert pipe.num_stages == 2 and pipe.transformer.config["_rights"] == "theirs"
    assert all(torch.equal(a, b) for a, b in zip(pipe.transformer.parameters(), dim.parameters(), strict=True))
    pipe.set_progress_bar_config(disable=True)
    assert pipe([names[0]], num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)


def test_weights_of_others_are_not_trained_for_the_hub(tmp_path, train, monkeypatch):
    """`pisdm publish` would refuse them at the end."""
    save_dim(tmp_path / "dim", ["a", "b"])
    with serve_hub(tokens={"token": "someone"}) as server:
        connect(monkeypatch, server, "token", tmp_path)
        config = write_recipe(tmp_path / "one.json", [DIM], **SCHEDULE, prediction_type="epsilon")
        hub = ("--push_to_hub", "--hub_model_id", "someone/dim")
        with pytest.raises(ValueError, match=r"--push_to_hub.*weights of others: theirs.*`pisdm publish`"):
            train("run", 1, "--pretrained_model_name_or_path", str(tmp_path / "dim"), *hub, config=config)


def test_adapters_of_weights_of_others_are_published_with_your_word(tmp_path, train, real_image_dir, capsys):
    names = sorted(folder.name for folder in real_image_dir.iterdir() if folder.is_dir())
    dim = save_dim(tmp_path / "dim", names)
    config = write_recipe(tmp_path / "one.json", [stage_config(dim)], **SCHEDULE, prediction_type="epsilon")
    base = ("--pretrained_model_name_or_path", str(tmp_path / "dim"), "--lora_rank", "2")
    adapter = train("adapter", 1, *base, config=config)
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path / "dim")
    pipe.load_lora_weights(adapter)
    pipe.save_lora_weights(tmp_path / "again")
    for folder in (adapter, tmp_path / "again"):
        arguments = [str(folder), "someone/lora", "--base_model", "someone/dim", "--dry_run"]
        with pytest.raises(SystemExit, match=r"adapters of weights of others: theirs.*--i_have_the_right_to_publish"):
            publish.main(arguments)
        capsys.readouterr()
        publish.main([*arguments, "--i_have_the_right_to_publish"])
        out = capsys.readouterr().out
        assert (
            out.count("**No licence is stated") == out.count("2405.14224") == 1
            and "# LoRA adapters for someone/dim" in out
            and "cascade of" not in out
        )
        with pytest.raises(SystemExit, match=r"--license is 'mit', but .* adapters of weights of others"):
            publish.main([*arguments, "--i_have_the_right_to_publish", "--license", "mit"])


def test_latents_without_an_autoencoder_are_told_before_training(tmp_path, train, capsys):
    config = write_recipe(tmp_path / "latents.json", [{**DIM, "in_channels": 4}])
    with pytest.raises(ValueError, match=r"latents of 4 channels.*--pretrained_vae_model_name_or_path"):
        train("run", 1, config=config)
    assert "Training:" not in capsys.readouterr().out
