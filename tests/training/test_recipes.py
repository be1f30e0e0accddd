import json

import pytest

from diffusers_pisdm.training.recipes import Recipe, read_recipe, recipe_arguments
from examples.train_pisdm import TrainingArguments


CASCADE = {"scheduler": {}, "stages": [{"sample_size": 8}]}


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
    assert read(content) == Recipe({}, [{"sample_size": 8}], "a/b", {"seed": 3})
    assert read(CASCADE) == Recipe({}, [{"sample_size": 8}], None, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a JSON object"),
        ("{", "Expecting property name"),
        ({"stages": []}, "`scheduler` is missing"),
        ({**CASCADE, "trainings": {}}, "unknown key 'trainings'; .* training"),
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
        ({"random_flip": 1}, "'random_flip' must be true or false, not 1"),
        ({"loss_weighting": "snr"}, "'loss_weighting' must be one of uniform, vlb, min_snr, not 'snr'"),
    ],
)
def test_a_value_that_the_command_line_would_not_take_is_refused(training, message):
    with pytest.raises(ValueError, match=message):
        arguments(training)
