"""`class_labels={class: weight}`: the embeddings of all stages are averaged."""

import pytest
import torch

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.models.transformer_pisdm import get_class_embedding, set_class_embedding
from tests.pipelines.tiny_cascade import NUM_CLASSES, generators, make_cascade, make_scheduler, make_transformer


FACTORS = [(i % 2, i // 2) for i in range(NUM_CLASSES)]
NAMES = ["cat", "dog, hound", "crane", "crane"]


@pytest.fixture(params=[None, FACTORS], ids=["classes", "factors"])
def pipe(request):
    stages = [make_transformer(1, class_factors=request.param), make_transformer(2, class_factors=request.param)]
    pipe = PISDMCascadePipeline.from_stages(stages, make_scheduler(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, class_labels, **arguments):
    defaults = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "output_stages": True}
    return pipe(class_labels, **{**defaults, **arguments}).stage_images


def test_the_ends_are_the_pure_classes(pipe):
    seeds = generators(0, 1, 2), generators(0, 1, 2)
    mixed = draw(pipe, [{3: 1.0, 5: 0.0}, {3: 0.0, 5: 1}, {7: 1}], generator=seeds[0])
    pure = draw(pipe, [3, 5, 7], generator=seeds[1])
    assert all(torch.equal(*pair) for pair in zip(mixed, pure, strict=True))


def test_a_mix_is_the_class_of_the_average_embedding(pipe):
    """Each label has its own number of classes, and two images."""
    mixes = [{3: 0.2, "dog": 0.3, 4: 0.5}, 8, {"cat": 0.25, 1: 0.25, "hound": 0.5}]
    weights = torch.zeros(3, NUM_CLASSES)
    for label, class_id, weight in [(0, 3, 0.2), (0, 1, 0.3), (0, 4, 0.5), (1, 8, 1), (2, 0, 0.25), (2, 1, 0.75)]:
        weights[label, class_id] = weight
    arguments = {"num_images_per_prompt": 2}
    mixed = draw(pipe, mixes, generator=generators(*range(6)), **arguments)
    for transformer in pipe.stages:
        embedding = get_class_embedding(transformer)
        set_class_embedding(transformer, torch.cat([weights @ embedding[:-1], embedding[-1:]]))
    pipe.register_to_config(id2label=None)
    for images, wanted in zip(mixed, draw(pipe, [0, 1, 2], generator=generators(*range(6)), **arguments), strict=True):
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)
        assert (images[::2] - images[1::2]).abs().max() > 0.1


def test_mixes_by_id(pipe):
    assert pipe.get_class_mixes([{"hound": 0.5, 1: 0.25, 9: 0.25}, [2, "cat"]]) == [{1: 0.75, 9: 0.25}, {2: 1}, {0: 1}]


def test_mixes_with_sliced_guidance(pipe):
    arguments = {"guidance_stop": 0.5, "generator": torch.Generator().manual_seed(0)}
    whole = draw(pipe, [{3: 0.5, 5: 0.5}, 1], **arguments)
    pipe.enable_guidance_slicing()
    sliced = draw(pipe, [{3: 0.5, 5: 0.5}, 1], **{**arguments, "generator": torch.Generator().manual_seed(0)})
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("mix", "exception", "message"),
    [
        ({3: 0.5, 5: 0.4}, ValueError, r"weights sum to 0\.9\. Pass weights that sum to 1"),
        ({3: 2, 5: 2}, ValueError, r"3 the weight 2, .* in \[0, 1\]"),
        ({3: 1.5, 5: -0.5}, ValueError, r"3 the weight 1\.5"),
        ({3: float("nan"), 5: 0.5}, ValueError, "3 the weight nan"),
        ({3: True}, ValueError, "3 the weight True"),
        ({3: "1"}, ValueError, "3 the weight '1'"),
        ({}, ValueError, "sum to 0"),
        ({10: 1.0}, ValueError, "contains 10, but .* 0 to 9"),
        ({"dgo": 1.0}, ValueError, "'dgo'.* Did you mean 'dog"),
        ({"crane": 1.0}, ValueError, "the name of several classes"),
        ({1.0: 1.0}, TypeError, "class ids .* has 1.0"),
        ({None: 1.0}, TypeError, "class ids .* has None"),
    ],
    ids=repr,
)
def test_bad_mixes(mix, exception, message):
    with pytest.raises(exception, match=message):
        make_cascade(1, id2label=NAMES)([1, mix])


def test_thirds_may_be_rounded():
    assert make_cascade(1).get_class_mixes({1: 0.333, 2: 0.333, 3: 0.333}) == [{1: 0.333, 2: 0.333, 3: 0.333}]


def test_ids_are_of_single_classes():
    with pytest.raises(TypeError, match="class ids"):
        make_cascade(1).get_label_ids([{3: 1.0}])
