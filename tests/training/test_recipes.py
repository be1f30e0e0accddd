import json

import pytest

from diffusers_pisdm.training.recipes import Recipe, apply_recipe, read_recipe
from examples.train_pisdm import make_parser


CASCADE = {"scheduler": {}, "stages": [{"sample_size": 8}]}
REQUIRED = ["--output_dir", "o"]


@pytest.fixture
def read(tmp_path):
    def read(content):
        file = tmp_path / "recipe.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_recipe(file)

    return read


def defaults(training, vae=None):
    parser = make_parser()
    apply_recipe(Recipe({}, [], vae, training), parser)
    return parser.parse_args(REQUIRED)


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
        ({**CASCADE, "trainings": {}}, "unknown part 'trainings'"),
    ],
)
def test_a_recipe_that_is_none_is_refused(read, content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


def test_arguments_become_defaults_of_their_type():
    args = defaults(
        {"learning_rate": 1, "random_flip": True, "batch_shares": [1, 0.5], "loss_weighting": "vlb", "seed": 7}, "v"
    )
    assert args.learning_rate == 1.0 and isinstance(args.learning_rate, float)
    assert args.random_flip is True and args.batch_shares == [1.0, 0.5] and args.loss_weighting == ["vlb"]
    assert args.seed == 7 and args.pretrained_vae_model_name_or_path == "v"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rat": 1e-3}, "unknown training argument 'learning_rat'; did you mean 'learning_rate'"),
        ({"train_batch_size": 0.5}, "'train_batch_size' must be of type int, not 0.5"),
        ({"train_batch_size": True}, "'train_batch_size' must be of type int, not True"),
        ({"learning_rate": "1e-3"}, "'learning_rate' must be of type float, not '1e-3'"),
        ({"random_flip": 1}, "'random_flip' is a switch: true or false, not 1"),
        ({"loss_weighting": "snr"}, "'loss_weighting' must be one of uniform, vlb, min_snr, not 'snr'"),
    ],
)
def test_a_value_that_the_command_line_would_not_take_is_refused(training, message):
    with pytest.raises(ValueError, match=message):
        defaults(training)
