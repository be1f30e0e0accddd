import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler

from benchmarks.equal_budget.contestants import NOISE_SCHEDULE
from benchmarks.peers.dit import DiTPeer
from benchmarks.peers.equal_parameters import count_parameters
from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.training import CascadeObjective


CONFIG = {"sample_size": 8, "num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_classes": 3}


def make_model():
    torch.manual_seed(0)
    model = DiTPeer(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # what starts at zero would hide errors
    return model


def make_inputs(size=8):
    images = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([500, 20]), torch.tensor([1, 3])


def test_parameter_count_is_that_of_dit_xl():
    assert round(count_parameters(DiTPeer, {}) / 1e6) == 675


def test_computes_what_diffusers_does():
    model = make_model().eval()
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, num_embeds_ada_norm=3
    ).eval()
    theirs.load_state_dict(model.model.state_dict())  # each block with a copy of the shared embeddings
    assert theirs.num_parameters() > model.num_parameters()
    for size in (8, 16):
        inputs = make_inputs(size)
        with torch.no_grad():
            sample = model(*inputs).sample
            torch.testing.assert_close(sample, theirs(*inputs).sample)
        assert sample.shape == (2, 4, size, size)


def test_starts_as_the_paper_says():
    torch.manual_seed(0)
    model = DiTPeer(**CONFIG)
    blocks = {}
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda block, inputs, output: blocks.update({block: (inputs[0], output)}))
    with torch.no_grad():
        assert model(*make_inputs()).sample.abs().max() == 0
    for inputs, output in blocks.values():
        assert torch.equal(inputs, output)


def test_labels_are_not_dropped_in_training():
    model = make_model().train()
    with torch.no_grad():
        samples = [model(*make_inputs()).sample for _ in range(20)]
    assert all(torch.equal(sample, samples[0]) for sample in samples)


def test_trains_like_a_first_stage():
    objective = CascadeObjective([make_model()], [DDPMScheduler()])
    losses = objective([torch.randn(2, 4, 8, 8)], torch.tensor([0, 2]), seed=0)
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_the_pipeline_samples_it():
    scheduler = DPMSolverMultistepScheduler.from_config(NOISE_SCHEDULE)
    pipe = PISDMCascadePipeline(transformer=make_model(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(class_labels=[0, 2], num_inference_steps=2, guidance_scale=2.0, output_type="latent").images
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="must be divisible by `num_heads`"):
        DiTPeer(**{**CONFIG, "hidden_size": 30})
    model, (images, timestep, labels) = make_model(), make_inputs()
    with pytest.raises(ValueError, match=r"squares, .* 8 x 4"):
        model(images[..., :4], timestep, labels)
    with pytest.raises(ValueError, match="take neither"):
        model(images, timestep, labels, noise_level=torch.zeros(2))
