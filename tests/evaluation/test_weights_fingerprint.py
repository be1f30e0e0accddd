import pytest
import torch

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.evaluation.weights_fingerprint import weights_fingerprint
from tests.pipelines.tiny_cascade import make_cascade, make_transformer


def test_a_saved_and_loaded_or_compiled_pipeline_keeps_it(tmp_path):
    pipe = make_cascade()
    expected = weights_fingerprint(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = PISDMCascadePipeline.from_pretrained(tmp_path)
    assert weights_fingerprint(loaded) == expected
    loaded.transformer = torch.compile(loaded.transformer)
    assert weights_fingerprint(loaded) == expected


def test_any_change_of_the_model_shows():
    def changed_weight(pipe):
        with torch.no_grad():
            pipe.transformer_2.proj_out.bias[-1] += 1e-6

    def swapped(pipe):
        pipe.transformer.proj_out.weight, pipe.transformer_2.proj_out.weight = (
            pipe.transformer_2.proj_out.weight,
            pipe.transformer.proj_out.weight,
        )

    def other_configuration(pipe):
        pipe.transformer = make_transformer(1, snake=True)

    def cast(pipe):
        pipe.to(torch.bfloat16)

    def shortened(pipe):
        pipe.transformer_2 = None

    fingerprints = {weights_fingerprint(make_cascade())}
    changes = [changed_weight, swapped, other_configuration, cast, shortened]
    for change in changes:
        pipe = make_cascade()
        change(pipe)
        fingerprints.add(weights_fingerprint(pipe))
    assert len(fingerprints) == 1 + len(changes)


def test_weights_that_are_not_in_memory_are_named():
    pipe = make_cascade(1)
    pipe.transformer.proj_out.to("meta")
    with pytest.raises(ValueError, match=r"`transformer.proj_out.bias` is not in memory.*enable_model_cpu_offload"):
        weights_fingerprint(pipe)
