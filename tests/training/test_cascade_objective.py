import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.ops.conditioning_augmentation import augment_low_res, upsample_low_res
from diffusers_pisdm.training import CascadeObjective, image_pyramid


NUM_CLASSES = 4


def make_stages(sizes=(4, 8, 16)):
    torch.manual_seed(0)
    stages = [
        PISDMTransformer2DModel(
            sample_size=size,
            patch_size=2,
            in_channels=3,
            num_layers=2,
            hidden_size=16,
            state_size=4,
            num_classes=NUM_CLASSES,
            low_res_channels=None if size == sizes[0] else 3,
        )
        for size in sizes
    ]
    for stage in stages:  # a fresh model predicts zero whatever it sees
        torch.nn.init.normal_(stage.proj_out.weight, std=0.1)
    return stages


def make_objective(sizes=(4, 8, 16), prediction_type="epsilon", **kwargs):
    return CascadeObjective(make_stages(sizes), DDPMScheduler(prediction_type=prediction_type), **kwargs)


@pytest.fixture
def batch(real_images):
    images = real_images[::6][:8]
    return image_pyramid(images, [16])[0], torch.arange(8) % NUM_CLASSES


class Recorder:
    """Keeps what each stage was given and what it returned."""

    def __init__(self, objective):
        self.calls = []
        for stage in objective.stages:
            stage.register_forward_hook(self, with_kwargs=True)

    def __call__(self, stage, args, kwargs, output):
        self.calls.append((*args, kwargs["low_res"], kwargs["noise_level"], output[0]))


def test_the_loss_is_equation_17_for_what_the_stages_were_given(batch):
    images, labels = batch
    objective = make_objective(loss_weighting="vlb", sil_weight=0.5)
    recorder = Recorder(objective)
    losses = objective(images, labels)
    scheduler = objective.scheduler
    for index, (noisy, timesteps, _, _, _, prediction) in enumerate(recorder.calls):
        clean = image_pyramid(images, objective.sizes)[index]
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        signal, sigma = (x.sqrt()[:, None, None, None] for x in (alpha_bar, 1 - alpha_bar))
        noise = (noisy - signal * clean) / sigma
        betas = scheduler.betas[timesteps]
        weight = betas / (2 * (1 - betas) * (1 - alpha_bar))
        expected = (weight * (prediction - noise).square().mean(dim=(1, 2, 3))).mean()
        torch.testing.assert_close(losses.denoising[index], expected, rtol=1e-3, atol=0)
    expected_total = losses.denoising.sum() + 0.5 * losses.scale_invariant.mean()
    torch.testing.assert_close(losses.total.detach(), expected_total)


def test_stages_share_timestep_and_label_and_see_the_stage_below(batch):
    images, labels = batch
    objective = make_objective(label_dropout=0.5, max_noise_level=0.3)
    recorder = Recorder(objective)
    torch.manual_seed(3)
    objective(images, labels)
    (_, timesteps, first_labels, low_res, noise_level, _), *higher = recorder.calls
    assert low_res is None and noise_level is None
    assert (first_labels == NUM_CLASSES).any() and (first_labels == labels).any()
    pyramid = image_pyramid(images, objective.sizes)
    for index, (_, stage_timesteps, stage_labels, low_res, noise_level, _) in enumerate(higher):
        assert torch.equal(stage_timesteps, timesteps) and torch.equal(stage_labels, first_labels)
        assert ((noise_level >= 0) & (noise_level < 0.3)).all() and noise_level.unique().numel() == len(images)
        upsampled = upsample_low_res(pyramid[index], low_res.shape[-2:])
        added = low_res - augment_low_res(upsampled, torch.zeros_like(upsampled), noise_level)
        measured = added.flatten(1).std(dim=1)
        torch.testing.assert_close(measured, noise_level, rtol=0.35, atol=0.01)


def test_without_noise_level_the_condition_is_the_upsampled_image(batch):
    objective = make_objective(max_noise_level=0.0)
    recorder = Recorder(objective)
    objective(*batch)
    pyramid = image_pyramid(batch[0], objective.sizes)
    for index, (_, _, _, low_res, _, _) in enumerate(recorder.calls[1:]):
        torch.testing.assert_close(low_res, upsample_low_res(pyramid[index], low_res.shape[-2:]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_parameter_is_trained(batch, prediction_type):
    objective = make_objective(prediction_type=prediction_type)
    # The first pass moves the modulation off zero, the second reaches what is behind it.
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        objective(*batch).total.backward()
        optimizer.step()
    assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_without_the_scale_invariant_loss_nothing_of_it_is_left(batch):
    objective = make_objective(sil_weight=0.0)
    assert objective.scale_invariant_loss is None
    losses = objective(*batch)
    assert losses.scale_invariant.numel() == 0
    torch.testing.assert_close(losses.total.detach(), losses.denoising.sum())


def test_a_single_stage_has_no_scale_invariant_loss(batch):
    objective = make_objective(sizes=(16,))
    assert objective.scale_invariant_loss is None
    assert objective(*batch).denoising.shape == (1,)


def test_batch_shares_hold_in_training_only(batch):
    objective = make_objective(batch_shares=[1.0, 0.5, 0.25])
    for training, counts in ((True, [8, 4, 2]), (False, [8, 8, 8])):
        recorder = Recorder(objective.train(training))
        objective(*batch)
        assert [len(call[0]) for call in recorder.calls] == counts


def test_no_label_is_dropped_in_evaluation(batch):
    objective = make_objective(label_dropout=1.0).eval()
    recorder = Recorder(objective)
    objective(*batch)
    assert all(torch.equal(call[2], batch[1]) for call in recorder.calls)


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.5, 0.0], [1.0, 1.5, 1.0]])
def test_shares_that_do_not_fit_are_refused(shares):
    with pytest.raises(ValueError, match=r"one share in \(0, 1\] for each of the 3 stages"):
        make_objective(batch_shares=shares)


def test_training_lowers_every_loss(batch):
    objective = make_objective(label_dropout=0.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)

    def evaluate():
        torch.manual_seed(0)
        with torch.no_grad():
            losses = objective(*batch)
        return torch.cat([losses.denoising, losses.scale_invariant])

    before = evaluate()
    for _ in range(60):
        optimizer.zero_grad()
        objective(*batch).total.backward()
        optimizer.step()
    assert (evaluate() < 0.9 * before).all()
