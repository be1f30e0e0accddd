import argparse
import json
import re

import pytest

from diffusers_pisdm.commands.train import TrainingArguments
from diffusers_pisdm.training.recipes import (
    Recipe,
    make_parser,
    parse_arguments,
    per_stage,
    read_recipe,
    recipe_arguments,
)


CASCADE = {"scheduler": {}, "stages": [{"sample_size": 8, "in_channels": 3}]}


@pytest.fixture
def read(tmp_path):
    def read(content):
        file = tmp_path / "recipe.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_recipe(file)

    return read


def arguments(training, vae=None):
    return recipe_arguments(Recipe({}, [], vae, training), TrainingArguments)


def test_a_recipe_is_read_whole(read):
    content = {**CASCADE, "vae": "a/b", "training": {"seed": 3}}
    assert read(content) == Recipe({}, [{"sample_size": 8, "in_channels": 3}], "a/b", {"seed": 3})
    assert read(CASCADE) == Recipe({}, [{"sample_size": 8, "in_channels": 3}], None, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a JSON object"),
        ("{", "Expecting property name"),
        ({"stages": []}, "`scheduler` is missing"),
        ("[" * 100_000, "nested too deeply"),
        ({**CASCADE, "trainings": {}}, "unknown key 'trainings'; did you mean 'training'"),
        ({**CASCADE, "stages": []}, "`stages` must be a list of at least one"),
        ({**CASCADE, "stages": {}}, "`stages` must be a list"),
        ({**CASCADE, "stages": [CASCADE["stages"][0], 3]}, r"`stages\[1\]` must be an object, not 3"),
        ({**CASCADE, "stages": [{"in_channels": 3}]}, r"`sample_size` is missing in stages\[0\]"),
        ({**CASCADE, "stages": [{"sample_siz": 8}]}, r"stages\[0\] 'sample_siz'; did you mean 'sample_size'"),
        ({**CASCADE, "stages": [{"num_classes": 8}]}, r"stages\[0\] 'num_classes'"),
        ({**CASCADE, "scheduler": {"beta_schedul": "linear"}}, "'beta_schedul'; did you mean 'beta_schedule'"),
        ({**CASCADE, "scheduler": None}, "`scheduler` must be an object"),
        ({**CASCADE, "training": [1]}, "`training` must be an object"),
        ({**CASCADE, "vae": 3}, "`vae` must be the name"),
    ],
)
def test_a_recipe_that_is_none_is_refused(read, content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


def test_arguments_get_the_type_of_their_field():
    training = {
        "learning_rate": 1,
        "random_flip": True,
        "batch_shares": [1, 0.5],
        "loss_weighting": "vlb",
        "seed": 7.0,
    }
    found = arguments(training, "v")
    assert found == {
        **{"learning_rate": 1.0, "random_flip": True, "batch_shares": [1.0, 0.5], "loss_weighting": ["vlb"]},
        **{"seed": 7, "pretrained_vae_model_name_or_path": "v"},
    }
    kinds = [type(found["learning_rate"]), type(found["batch_shares"][0]), type(found["seed"])]
    assert kinds == [float, float, int]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rat": 1e-3}, "unknown training argument 'learning_rat'; did you mean 'learning_rate'"),
        ({"train_batch_size": 0.5}, "'train_batch_size' must be of type int, not 0.5"),
        ({"train_batch_size": True}, "'train_batch_size' must be of type int, not True"),
        ({"learning_rate": "1e-3"}, "'learning_rate' must be of type float, not '1e-3'"),
        ({"output_dir": "a"}, "'output_dir' belongs on the command line"),
        ({"train_batch_size": 0}, "'train_batch_size' must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "'learning_rate' must be finite, got nan"),
        ({"seed": float("inf")}, "'seed' must be finite, got inf"),
        ({"seed": 10**400}, "'seed' must be at most 4294967295"),
        ({"learning_rate": 10**400}, "'learning_rate' must be of type float"),
        ({"batch_shares": [0.5, 0]}, "'batch_shares' must be more than 0, got 0"),
        ({"batch_shares": []}, "'batch_shares' must have at least one value"),
        ({"random_flip": 1}, "'random_flip' must be true or false, not 1"),
        ({"loss_weighting": "snr"}, "'loss_weighting' must be one of uniform, vlb, min_snr, sigmoid, not 'snr'"),
    ],
)
def test_a_value_that_the_command_line_would_not_take_is_refused(training, message):
    with pytest.raises(ValueError, match=message):
        arguments(training)


# Values just outside of each argument's range; all refuse what is not finite, too.
OUT_OF_RANGE = {
    "0 -1": """validation_classes validation_inference_steps logging_steps train_stages train_batch_size
        max_train_steps gradient_accumulation_steps lora_rank checkpoints_total_limit shuffle_buffer_size max_grad_norm
        adam_epsilon snr_gamma sil_temperature sil_max_timestep sil_decay_steps lora_alpha noise_shifts
        stage_loss_weights""",
    "-1 4294967296": "seed",
    "-1": """checkpointing_steps validation_steps lr_warmup_steps lr_cooldown_steps max_skipped_steps keep_images_gib
        dataloader_num_workers""",
    "-1e-9": "learning_rate adam_weight_decay sil_weight validation_guidance_scale",
    "-0.1 1.1": "label_dropout factor_dropout max_noise_level ema_decay",
    "-0.1 1": "adam_beta1 adam_beta2",
    "-20.1 20.1": "sigmoid_bias",
    "0 1.01": "batch_shares",
}


def test_every_number_has_its_range(capsys):
    parser = make_parser(TrainingArguments)
    numbers = {action.dest for action in parser._actions if getattr(action.type, "__name__", "") in ("int", "float")}
    outside = {name: values.split() for values, names in OUT_OF_RANGE.items() for name in names.split()}
    assert numbers == outside.keys()
    for name, values in outside.items():
        for value in [*values, "nan", "inf", "-inf"]:
            with pytest.raises(SystemExit):
                parser.parse_args(["--output_dir", "a", f"--{name}={value}"])
            assert f"--{name}" in capsys.readouterr().err


def test_a_recipes_switch_can_be_turned_off(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({**CASCADE, "training": {"random_flip": True}}))
    parser, given = make_parser(TrainingArguments), ["--output_dir", "a", "--cascade_config", str(file)]
    assert parse_arguments(parser, TrainingArguments, given)[0].random_flip
    parser = make_parser(TrainingArguments)
    assert not parse_arguments(parser, TrainingArguments, [*given, "--no-random_flip"])[0].random_flip


@pytest.mark.parametrize("steps", [True, 0, 1.5, 10**9])
def test_timesteps_that_no_schedule_has_are_refused(steps):
    with pytest.raises(ValueError, match="`num_train_timesteps` must be an integer from 1 to"):
        Recipe({"num_train_timesteps": steps}, []).noise_schedule()


def test_one_value_is_for_all_stages():
    assert per_stage("noise_shifts", [2.0], 3) == [2.0] * 3
    assert per_stage("noise_shifts", [1.0, 2.0], 2) == [1.0, 2.0]
    assert per_stage("noise_shifts", None, 2) is None
    with pytest.raises(ValueError, match=r"--noise_shifts .*per stage \(4\), got 2"):
        per_stage("noise_shifts", [1.0, 2.0], 4)


def test_the_help_tells_every_default_once():
    told = {}
    for action in make_parser(TrainingArguments)._actions:
        has_value = action.default not in (None, argparse.SUPPRESS) and action.nargs != 0
        if has_value or any(option.startswith("--no-") for option in action.option_strings):
            told[action.dest] = re.findall(r"\(default: ([^)]*)\)", action.help)
    assert told["sil_per_value"] == ["True"] and told["sil_weight"] == ["1.0"] and told["random_flip"] == ["False"]
    assert {name for name, defaults in told.items() if len(defaults) != 1} == set()
