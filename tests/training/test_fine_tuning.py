"""What a published cascade keeps on its way to new classes, and what trains."""

import sys

import pytest
import torch

from diffusers_pisdm.training.fine_tuning import (
    LORA_TARGET_MODULES,
    add_lora,
    known_class_order,
    pretrained_defaults,
    resize_class_embedding,
    start_cascade,
)
from tests.models.tiny_model import make_inputs, make_model, mean_square_error_gradients
from tests.pipelines.tiny_cascade import make_cascade


OLD_NAMES = list("abcdefghij")
NEW_NAMES = ["c", "new", "a", "newer"]


def stage_config(stage, **changes):
    """What `make_transformer` builds, as a recipe has it: JSON, without what has a default."""
    config = {"sample_size": 4 * 2**stage, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
    return {**config, **({"low_res_channels": 3} if stage > 1 else {}), **changes}


# Sampling settings


@pytest.mark.parametrize(
    ("num_stages", "expected"),
    [(1, ([2.0], [5], [])), (2, ([2.0, 1.0], [5, 3], [0.3])), (3, ([2.0, 1.0, 1.0], [5, 3, 3], [0.3, 0.3]))],
)
def test_a_new_cascade_starts_with_the_settings_of_the_published_one(num_stages, expected):
    settings = {"default_guidance_scale": [2.0, 1.0], "default_num_inference_steps": [5, 3]}
    defaults = pretrained_defaults(make_cascade(2, default_noise_level=[0.3], **settings), num_stages)
    names = ("default_guidance_scale", "default_num_inference_steps", "default_noise_level")
    assert tuple(defaults[name] for name in names) == expected
    assert pretrained_defaults(make_cascade(2), num_stages)["default_guidance_scale"] == 4.0


def test_stages_added_to_a_single_one_get_the_usual_noise_level():
    assert pretrained_defaults(make_cascade(1, default_noise_level=[]), 2)["default_noise_level"] == 0.1


# Class embeddings


def test_a_class_named_after_a_part_of_others_starts_as_their_mean():
    model = make_model()
    old = model.class_embedding.weight.detach().clone()
    names = ["noto/bird", "noto/cat", "fluent/bird", "bird-house", *"abcdef"]
    resize_class_embedding(model, names, ["bird", "dog", "noto", "fluent/bird"])
    new = model.class_embedding.weight
    torch.testing.assert_close(new[0], (old[0] + old[2]) / 2)
    torch.testing.assert_close(new[2], (old[0] + old[1]) / 2)
    assert torch.equal(new[[1, 3, 4]], old[[10, 2, 10]])  # `dog` is part of no name: the null label


def test_embeddings_are_kept_by_name():
    model = make_model()
    old = model.class_embedding.weight.detach().clone()
    resize_class_embedding(model, OLD_NAMES, NEW_NAMES)
    null_label = old[10]
    expected = torch.stack([old[2], null_label, old[0], null_label, null_label])
    assert torch.equal(model.class_embedding.weight, expected)
    assert model.config.num_classes == 4


@torch.no_grad()
def test_a_new_class_is_unconditional_at_first():
    model = make_model()
    inputs = make_inputs(model)
    labels = torch.full_like(inputs["class_labels"], model.config.num_classes)
    unconditional = model(**{**inputs, "class_labels": labels}).sample
    resize_class_embedding(model, OLD_NAMES, NEW_NAMES)
    for label in (1, 4):  # a new class and the null label
        sample = model(**{**inputs, "class_labels": torch.full_like(labels, label)}).sample
        assert torch.equal(sample, unconditional)


def test_classes_of_factors_become_rows():
    factors = tuple((i % 2, i // 2) for i in range(10))
    model = make_model(class_factors=factors)
    old = model.class_embedding.weight.detach().clone()
    resize_class_embedding(model, OLD_NAMES, ["c", "new"])
    null_label = old[2] + old[3 + 5]
    torch.testing.assert_close(model.class_embedding.weight, torch.stack([old[0] + old[4], null_label, null_label]))
    assert (model.config.num_classes, model.config.class_factors) == (2, None)


def test_the_same_classes_change_nothing():
    model = make_model()
    weight, config = model.class_embedding.weight, dict(model.config)
    repeated = ["a"] * 10  # allowed: nothing has to be found again
    for names in (OLD_NAMES, repeated):
        resize_class_embedding(model, names, tuple(names))
    assert model.class_embedding.weight is weight
    assert dict(model.config) == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            OLD_NAMES[:9],
            NEW_NAMES,
            r"`old_class_names` has 9 names, but the model has 10 classes.*Pass the name",
        ),
        (
            ["a", "a", *OLD_NAMES[2:]],
            ["a"],
            r"^'a': the name of several classes.*Give each class .* unique",
        ),
        (OLD_NAMES, ["c", "b", "c"], r"^'c': the name of several classes"),
    ],
)
def test_names_that_cannot_be_matched(old, new, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        resize_class_embedding(model, old, new)
    assert model.config.num_classes == 10


def test_repeated_names_that_are_not_kept_do_not_matter():
    model = make_model()
    resize_class_embedding(model, ["a", "a", *OLD_NAMES[2:]], ["c", "x", "x"])
    assert model.config.num_classes == 3


# Cascades


def test_start_cascade_takes_weights_and_adds_stages():
    pretrained = make_cascade(2, id2label=OLD_NAMES)
    before = [
        {name: value.clone() for name, value in transformer.state_dict().items()} for transformer in pretrained.stages
    ]
    configs = [stage_config(stage) for stage in (1, 2, 3)]
    stages = start_cascade(pretrained, configs, NEW_NAMES)

    assert [stage.config.sample_size for stage in stages] == [8, 16, 32]
    assert [stage.config.num_classes for stage in stages] == [4, 4, 4]
    assert all(stage.training for stage in stages)
    for stage, state_dict in zip(stages, before):
        embedding = state_dict.pop("class_embedding.weight")
        assert torch.equal(stage.class_embedding.weight[[0, 2, 4]], embedding[[2, 0, 10]])
        assert all(torch.equal(value, stage.state_dict()[name]) for name, value in state_dict.items())
    pipe = make_cascade(3, transformer=stages[0], transformer_2=stages[1], transformer_3=stages[2], id2label=NEW_NAMES)
    assert pipe("newer", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 32, 32)


def test_start_cascade_leaves_out_upper_stages():
    pretrained = make_cascade(2, id2label=OLD_NAMES)
    assert start_cascade(pretrained, [stage_config(1)], NEW_NAMES) == [pretrained.transformer]


def test_start_cascade_reads_lists_as_tuples():
    pretrained = make_cascade(1, id2label=OLD_NAMES)
    directions = list(pretrained.transformer.config.scan_directions)
    assert len(start_cascade(pretrained, [stage_config(1, scan_directions=directions)], NEW_NAMES)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"stage 2 does not fit the pretrained cascade: `hidden_size` is 32 instead of 16\. Use"),
        ({"snake": True, "expand": 3}, r"`expand` is 3 instead of 2, `snake` is True instead of False"),
        ({"num_layer": 4}, r"`num_layer` is 4 instead of None"),
    ],
)
def test_another_configuration_is_refused(changes, message):
    pretrained = make_cascade(2, id2label=OLD_NAMES)
    with pytest.raises(ValueError, match=message):
        start_cascade(pretrained, [stage_config(1), stage_config(2, **changes)], NEW_NAMES)
    assert pretrained.transformer.config.num_classes == 10  # nothing was changed before


@pytest.mark.parametrize("id2label", [None, {0: "a"}])
def test_classes_without_names_are_refused(id2label):
    pretrained = make_cascade(1, id2label=id2label)
    with pytest.raises(ValueError, match=r"10 classes but [01] class names .*Pass their names to `from_pretrained`"):
        start_cascade(pretrained, [stage_config(1)], NEW_NAMES)


# LoRA


@torch.no_grad()
def test_an_adapter_changes_nothing_at_first():
    model = make_model()
    before = model(**make_inputs(model)).sample
    add_lora(model, rank=2, alpha=4)
    torch.testing.assert_close(model(**make_inputs(model)).sample, before)


@pytest.mark.parametrize("train_class_embedding", [False, True])
def test_what_trains(train_class_embedding):
    model = make_model()
    add_lora(model, rank=2, alpha=4, train_class_embedding=train_class_embedding)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    embedding = {"class_embedding.weight"} if train_class_embedding else set()
    assert embedding <= trained
    layers = {name.split(".lora_")[0].split(".")[-1] for name in trained - embedding}
    assert layers == set(LORA_TARGET_MODULES) - {"skip_projections"}  # those are DiM's
    assert all(".lora_" in name for name in trained - embedding)
    gradients = mean_square_error_gradients(model)
    assert set(gradients) == trained


def test_rank_alpha_and_targets():
    model = make_model()
    add_lora(model, rank=3, alpha=6, target_modules=["x_proj"])
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3, 6)
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"x_proj"}


def test_targets_that_a_model_lacks_are_no_default():
    model = make_model(long_skips=False)
    add_lora(model, rank=2, alpha=2)
    assert model.peft_config["default"].target_modules == {"in_proj", "out_proj"}


def test_what_trains_is_float32():
    model = make_model().to(torch.bfloat16)
    add_lora(model, rank=2, alpha=2, train_class_embedding=True)
    frozen, trained = (
        {parameter.dtype for parameter in model.parameters() if parameter.requires_grad == trains}
        for trains in (False, True)
    )
    assert frozen == {torch.bfloat16}
    assert trained == {torch.float32}
    assert mean_square_error_gradients(model, dtype=torch.bfloat16)


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match=r"contains 'to_q', .* no such layer\. Pass names of .*'in_proj'"):
        add_lora(make_model(), rank=2, alpha=2, target_modules=["in_proj", "to_q"])


def test_rank_below_one():
    with pytest.raises(ValueError, match="positive integer"):
        add_lora(make_model(), rank=0, alpha=2)


def test_missing_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"need PEFT, which cannot be imported\. Run `pip install -U peft`"):
        add_lora(make_model(), rank=2, alpha=2)


def test_a_run_keeps_the_ids_of_its_own_cascade_or_else_of_the_pretrained_one(tmp_path):
    names = [f"class {i * 7 % 10}" for i in range(10)]
    pretrained = make_cascade(1, id2label=names)
    assert known_class_order(tmp_path) is None and known_class_order(tmp_path, make_cascade(1)) is None
    assert known_class_order(tmp_path, pretrained) == names
    make_cascade(1, id2label=names[::-1]).save_pretrained(tmp_path)
    assert known_class_order(tmp_path, pretrained) == known_class_order(tmp_path) == names[::-1]


@pytest.mark.parametrize("content", ["{", "[]", '{"id2label": 3}', '{"id2label": {"x": "a"}}'])
def test_a_damaged_index_stops_no_run(tmp_path, caplog, content):
    pretrained = make_cascade(1, id2label=list("abcdefghij"))
    (tmp_path / "model_index.json").write_text(content)
    assert known_class_order(tmp_path) is None
    assert known_class_order(tmp_path, pretrained) == list("abcdefghij")
    assert "model_index.json is damaged" in caplog.text
