"""A model gets other classes without being built anew."""

import pytest
import torch

from diffusers_pisdm.models.class_embedding import set_class_embedding
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
    with pytest.raises(ValueError, match=r"while its weights are offloaded\. Call the pipeline's `remove_all_hooks"):
        set_class_embedding(model, torch.randn(4, 32))
    assert model.config.num_classes == 10
