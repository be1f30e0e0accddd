import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_pisdm import PISDMCascadePipeline
from examples import train_pisdm


STAGE = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
CASCADE = {
    "scheduler": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "stages": [{"sample_size": 4, **STAGE}, {"sample_size": 8, "low_res_channels": 3, **STAGE}],
}


@pytest.fixture
def train(tmp_path, real_image_dir):
    config = tmp_path / "cascade.json"
    config.write_text(json.dumps(CASCADE))

    def run(name, steps, *more):
        train_pisdm.main(
            [
                *("--cascade_config", str(config), "--train_data_dir", str(real_image_dir)),
                *("--output_dir", str(tmp_path / name), "--max_train_steps", str(steps)),
                *("--train_batch_size", "8", "--lr_warmup_steps", "2", "--logging_steps", "2"),
                *("--validation_steps", "4", "--validation_classes", "3", "--validation_inference_steps", "2"),
                *("--checkpointing_steps", "4", *more),
            ]
        )
        return tmp_path / name

    return run


def weights(folder):
    found = load_file(folder / "model.safetensors")
    return found | {f"ema.{name}": tensor for name, tensor in load_file(folder / "ema.safetensors").items()}


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


def test_the_data_must_be_named(capsys):
    with pytest.raises(SystemExit):
        train_pisdm.parse_args(["--cascade_config", "c.json", "--output_dir", "o"])
    assert "either --dataset_name or --train_data_dir" in capsys.readouterr().err


def test_a_run_can_start_from_a_published_cascade(train):
    first = train("first", 4)
    published = load_file(first / "transformer" / "diffusion_pytorch_model.safetensors")
    second = train("second", 1, "--pretrained_model_name_or_path", str(first), "--learning_rate", "0")
    continued = load_file(second / "transformer" / "diffusion_pytorch_model.safetensors")
    assert [name for name in published if not torch.equal(published[name], continued[name])] == []
