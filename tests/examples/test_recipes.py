"""The published recipes: they build, they chain, and they say what the paper says."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from diffusers_pisdm import PISDM_SIZES, PISDMTransformer2DModel
from diffusers_pisdm.commands import train
from diffusers_pisdm.training.recipes import read_recipe
from examples import train_on_device


FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
NUM_CLASSES = {
    "ablation32": 10,
    "emoji64": 288,
    "emoji128_gpu": 740,
    "fashion_mnist32": 10,
    "imagenet256": 1000,
    "imagenet512": 1000,
}
ON_DEVICE = ["emoji128_gpu"]  # for train_on_device.py
PARAMETERS = {
    "ablation32": [357_708, 372_972],
    "emoji64": [2_897_100, 2_408_460, 2_429_232, 888_496],
    "emoji128_gpu": [17_871_678, 4_138_214, 4_234_982, 1_890_758],
    "fashion_mnist32": [1_054_220, 839_052, 852_912],
    "imagenet256": [50_926_096, 51_328_528, 386_022_416, 863_132_176],
    "imagenet512": [50_926_096, 51_328_528, 386_022_416, 863_132_176],
}
DIM_HUGE = 862e6
IMAGENET = ["imagenet256", "imagenet512"]

every_recipe = pytest.mark.parametrize("name", NUM_CLASSES)


def read(name):
    return read_recipe(FOLDER / f"{name}.json")


def arguments(name):
    """What the training script is told by the recipe alone."""
    script = train_on_device if name in ON_DEVICE else train
    return script.parse_args(
        ["--cascade_config", str(FOLDER / f"{name}.json"), "--train_data_dir", "d", "--output_dir", "o"]
    )[0]


def test_every_recipe_is_tested_and_documented():
    names = {path.stem for path in FOLDER.glob("*.json")}
    assert names == set(NUM_CLASSES)
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in names if f"{name}.json" not in readme] == []


@every_recipe
def test_stages_have_the_documented_size_and_chain(name):
    below = None
    for config, count in zip(read(name).stages, PARAMETERS[name], strict=True):
        size, channels = config["sample_size"], config["in_channels"]
        with torch.device("meta"):
            model = PISDMTransformer2DModel(num_classes=NUM_CLASSES[name], **config)
            labels, low_res, level = torch.zeros(2, dtype=torch.long), None, None
            if below is not None:
                low_res, level = torch.randn(2, below["in_channels"], size, size), torch.zeros(2)
            sample = model(torch.randn(2, channels, size, size), labels, labels, low_res, level).sample
        assert sample.shape == (2, channels, size, size)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        if below is not None:
            assert size == 2 * below["sample_size"] and channels == below["in_channels"]
        below = config


@every_recipe
def test_the_training_script_knows_every_argument(name):
    args, recipe = arguments(name), read(name)
    for key, value in recipe.training.items():
        assert getattr(args, key) in (value, [value])  # one value for all stages is a list of one
    assert recipe.vae is None or args.pretrained_vae_model_name_or_path == recipe.vae
    per_stage = {"batch_shares", "stage_loss_weights", "noise_shifts", "prediction_types", "minutes"}
    per_stage |= {name for name, value in recipe.training.items() if isinstance(value, list)}
    for value in (getattr(args, name, None) for name in per_stage):
        assert value is None or len(value) == len(recipe.stages)


@every_recipe
def test_the_noise_schedule_ends_in_noise(name):
    scheduler = DDPMScheduler(**read(name).scheduler)
    assert not scheduler.config.clip_sample
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.alphas_cumprod[-1] < 0.005


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_is_trained_as_the_paper_says(name):
    recipe, args = read(name), arguments(name)
    assert len(recipe.stages) == 4
    last = recipe.stages[-1]
    assert abs(PARAMETERS[name][-1] / DIM_HUGE - 1) < 0.03
    assert {key: last[key] for key in PISDM_SIZES["H"]} == PISDM_SIZES["H"]
    for stage in recipe.stages:
        assert (stage["patch_size"], stage["state_size"], stage["conv_kernel"], stage["expand"]) == (2, 16, 3, 2)
    assert recipe.scheduler["prediction_type"] == "epsilon"  # eq. 17
    assert 8 * args.train_batch_size * args.gradient_accumulation_steps == 256  # in eight processes
    assert args.max_train_steps == 500_000
    assert (args.learning_rate, args.adam_weight_decay) == (2e-4, 0.03)
    assert (args.adam_beta1, args.adam_beta2) == (0.99, 0.999)
    assert args.ema_decay == 0.9999
    assert args.sil_weight > 0


@pytest.mark.parametrize(("name", "pixels"), [("imagenet256", 256), ("imagenet512", 512)])
def test_stable_diffusions_vae_makes_the_latents_of_every_stage(name, pixels):
    with torch.device("meta"):
        vae = AutoencoderKL(  # the configuration of `recipe.vae`
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=4,
        )
        for stage, side in zip(read(name).stages, (pixels // 8, pixels // 4, pixels // 2, pixels), strict=True):
            latents = vae.encode(torch.randn(1, 3, side, side)).latent_dist.mean
            assert latents.shape[1:] == (stage["in_channels"], stage["sample_size"], stage["sample_size"])
