import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.commands import train as train_command
from tests.commands.training.tiny_training import CASCADE, weights
from tests.conftest import REAL_IMAGES


def test_a_run_leaves_a_pipeline_samples_curves_and_checkpoints(train):
    output = train("run", 4)
    pipe = PISDMCascadePipeline.from_pretrained(output)
    assert pipe.config.id2label[0] == "animal-mammal"
    image = pipe(class_labels=["heart"], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (8, 8)
    with Image.open(output / "samples" / "step-0000004.png") as grid:
        assert grid.width > 3 * 64
    assert (output / "loss_curves.png").exists()
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-4"]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/denoising_2" in row] == [2, 4]
    assert all(row["images_per_second"] > 0 for row in rows if "images_per_second" in row)


def test_the_published_weights_are_the_averaged_ones(train):
    output = train("run", 4)
    average = load_file(output / "checkpoint-4" / "ema.safetensors")
    published = load_file(output / "transformer_2" / "diffusion_pytorch_model.safetensors")
    for name, tensor in published.items():
        assert torch.equal(tensor, average[f"1.{name}"])


def test_resuming_gives_the_same_weights_bit_for_bit(train):
    through = weights(train("through", 8) / "checkpoint-8")
    first = train("twice", 4)
    with (first / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/denoising_1": 0.0}\n')  # logged by a run that was killed before its checkpoint
    resumed = weights(train("twice", 8) / "checkpoint-8")
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/denoising_1" in row] == [2, 4, 6, 8]
    assert through.keys() == resumed.keys()
    assert [name for name in through if not torch.equal(through[name], resumed[name])] == []


def test_held_out_images_are_measured_with_the_same_noise_each_time(train):
    output = train("run", 8, "--validation_split", "train", "--learning_rate", "0")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation/denoising_2"] for row in rows if "validation/denoising_2" in row]
    assert len(losses) == 2 and losses[0] == losses[1]


USAGE_ERRORS = {
    "no data": ([], "one of --dataset_name, --train_data_dir and --latent_cache"),
    "two data sets": (["--dataset_name", "a", "--train_data_dir", "b"], "one of --dataset_name"),
    "no repository": (["--train_data_dir", "a", "--push_to_hub"], "--push_to_hub needs --hub_model_id"),
    "no base for LoRA": (["--train_data_dir", "a", "--lora_rank", "4"], "pass --pretrained_model_name_or_path"),
    "no images a step": (["--train_data_dir", "a", "--train_batch_size", "0"], "must be at least 1, got 0"),
    "unknown": (["--train_data_dir", "a", "--lr", "4"], "unrecognized arguments: --lr 4"),
    "abbreviated": (["--train_data_dir", "a", "--learning", "4"], "unrecognized arguments: --learning 4"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_wrong_usage_is_told(tmp_path, capsys, arguments, message):
    config = tmp_path / "cascade.json"
    config.write_text(json.dumps(CASCADE))
    with pytest.raises(SystemExit):
        train_command.parse_args(["--cascade_config", str(config), "--output_dir", "o", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_the_cascade_must_be_described(capsys):
    with pytest.raises(SystemExit):
        train_command.parse_args(["--train_data_dir", "a", "--output_dir", "o"])
    assert "--cascade_config, --pretrained_model_name_or_path or both" in capsys.readouterr().err


def test_a_recipe_gives_defaults_and_the_command_line_counts_more(tmp_path):
    config = tmp_path / "cascade.json"
    config.write_text(json.dumps({**CASCADE, "training": {"learning_rate": 0.5, "sil_weight": 0}}))
    arguments = ["--cascade_config", str(config), "--train_data_dir", "a", "--output_dir", "o"]
    args, recipe = train_command.parse_args([*arguments, "--sil_weight", "0.25"])
    assert (args.learning_rate, args.sil_weight) == (0.5, 0.25)
    assert recipe.stages == CASCADE["stages"]


def test_a_run_can_start_from_a_published_cascade(train):
    first = train("first", 4)
    published = load_file(first / "transformer" / "diffusion_pytorch_model.safetensors")
    second = train("second", 1, "--pretrained_model_name_or_path", str(first), "--learning_rate", "0")
    continued = load_file(second / "transformer" / "diffusion_pytorch_model.safetensors")
    assert [name for name in published if not torch.equal(published[name], continued[name])] == []


def test_a_checkpoint_can_be_named_as_in_its_folder(train, capsys):
    train("run", 8)
    output = train("run", 8, "--resume_from_checkpoint", "checkpoint-4")
    assert f"Resuming from {output / 'checkpoint-4'}" in capsys.readouterr().out


def test_each_stage_is_saved_with_the_schedule_that_it_was_trained_with_and_fine_tuned_with_it(train):
    output = train("run", 2, "--prediction_types", "v_prediction", "sample", "--noise_shifts", "1", "2")
    pipe = PISDMCascadePipeline.from_pretrained(output)
    assert [s.config.prediction_type for s in pipe.get_stage_schedulers()] == ["v_prediction", "sample"]
    expected = [scheduler.alphas_cumprod for scheduler in pipe.get_stage_schedulers()]
    assert not torch.equal(*expected)

    index = json.loads((output / "model_index.json").read_text())
    (output / "model_index.json").write_text(json.dumps({**index, "default_num_inference_steps": [7, 3]}))
    AcceleratorState._reset_state(reset_partial_state=True)
    tuned = output.with_name("tuned")
    arguments = ["--train_data_dir", str(REAL_IMAGES), "--max_train_steps", "1", "--train_batch_size", "4"]
    arguments += ["--validation_classes", "1", "--validation_inference_steps", "1", "--output_dir", str(tuned)]
    train_command.train(["--pretrained_model_name_or_path", str(output), *arguments])
    tuned = PISDMCascadePipeline.from_pretrained(tuned)
    assert tuned.config.default_num_inference_steps == [7, 3]
    schedulers = tuned.get_stage_schedulers()
    assert [s.config.prediction_type for s in schedulers] == ["v_prediction", "sample"]
    for scheduler, alphas in zip(schedulers, expected):
        torch.testing.assert_close(scheduler.alphas_cumprod, alphas)


def test_names_whose_parts_are_no_factors_are_refused(train):
    with pytest.raises(ValueError, match=r"Class '.+' has \d parts between '-', but 'animal-mammal' has 2"):
        train("run", 1, "--class_name_factors", "-")
