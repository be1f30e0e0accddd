"""A model gets other classes without being built anew."""

import pytest
import torch

from diffusers_pisdm.models.transformer_pisdm import (
    class_factors_from_names,
    get_class_embedding,
    set_class_embedding,
)
from tests.models.tiny_model import make_inputs, make_model


@torch.no_grad()
def run(model, label):
    inputs = make_inputs(model)
    return model(**{**inputs, "class_labels": torch.full_like(inputs["class_labels"], label)}).sample


def test_the_model_knows_the_new_classes():
    model = make_model()
    expected = run(model, 7)
    module, rows = model.class_embedding, model.class_embedding.weight[[7, 1, 10]]
    set_class_embedding(model, rows)
    assert model.config.num_classes == 2
    assert torch.equal(run(model, 0), expected)
    assert model.class_embedding is module  # hooks stay where they are
    assert module.num_embeddings == 3
    rows.data.zero_()
    assert torch.equal(run(model, 0), expected)  # a copy


def test_saved_and_loaded(tmp_path):
    model = make_model()
    set_class_embedding(model, model.class_embedding.weight[[7, 10]])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.num_classes == 1
    assert torch.equal(run(loaded, 0), run(model, 0))


def test_factors_become_rows_and_rows_factors(tmp_path):
    factors = tuple((i % 2, i // 2) for i in range(10))
    model = make_model(class_factors=factors)
    expected, weight = [run(model, label) for label in (3, 10)], model.class_embedding.weight.clone()
    rows = get_class_embedding(model)
    assert rows.shape == (11, 32)
    set_class_embedding(model, rows[[3, 10]])
    assert (model.config.num_classes, model.config.class_factors) == (1, None)
    for label in (0, 1):
        torch.testing.assert_close(run(model, label), expected[label])
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), 0), run(model, 0))

    set_class_embedding(model, weight, factors)
    assert (model.config.num_classes, model.config.class_factors) == (10, factors)
    assert [torch.equal(run(model, label), image) for label, image in zip((3, 10), expected)] == [True, True]


@pytest.mark.parametrize("unknown", [-1, 11])
@pytest.mark.parametrize("factors", [None, tuple((i % 2, i // 2) for i in range(10))])
def test_an_unknown_label_is_refused(factors, unknown):
    model = make_model(class_factors=factors)
    with pytest.raises(ValueError, match=rf"`class_labels` has to be in 0 to 10 .* holds {unknown} to {unknown}"):
        run(model, unknown)


@pytest.mark.parametrize("unknown", [(-1, 0), (3, 0), (0, -1), (0, 6)])
def test_an_unknown_factor_is_refused_and_none_of_another_taken(unknown):
    model = make_model(class_factors=tuple((i % 2, i // 2) for i in range(10)))
    inputs = make_inputs(model)
    known = torch.tensor([2, 5]).expand(len(inputs["hidden_states"]), -1)  # no class
    assert torch.equal(model(**{**inputs, "class_labels": known}).sample, run(model, 10))
    labels = known.clone()
    labels[-1] = torch.tensor(unknown)
    with pytest.raises(ValueError, match=rf"`class_labels` has to be in 0 to \[2, 5\] .* holds {min(*unknown, 2)} to"):
        model(**{**inputs, "class_labels": labels})


def test_factors_are_read_off_names():
    names = ["noto/animal", "fluent/face", "noto/face", "twemoji/animal"]
    assert class_factors_from_names(names, "/") == ((1, 0), (0, 1), (1, 1), (2, 0))
    assert class_factors_from_names(["b", "a"], "/") == ((1,), (0,))


def test_names_have_no_parts_without_a_separator():
    with pytest.raises(ValueError, match="separator of class names' parts is empty"):
        class_factors_from_names(["noto/animal"], "")


def test_names_with_another_number_of_parts_are_refused():
    with pytest.raises(ValueError, match=r"'face' .* 1 .*'noto/animal' .* 2"):
        class_factors_from_names(["noto/animal", "face"], "/")


@pytest.mark.parametrize("trains", [False, True])
def test_precision_and_freezing_stay(trains):
    model = make_model().to(torch.bfloat16)
    model.class_embedding.requires_grad_(trains)
    set_class_embedding(model, torch.randn(4, 32))
    assert model.class_embedding.weight.dtype == torch.bfloat16
    assert model.class_embedding.weight.requires_grad == trains


def test_offloaded_embeddings_are_refused():
    model = make_model()
    model.class_embedding.to("meta")
    with pytest.raises(ValueError, match=r"offloaded.*`remove_all_hooks"):
        set_class_embedding(model, torch.randn(4, 32))
    assert model.config.num_classes == 10
