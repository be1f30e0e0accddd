import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.ops.conditioning_augmentation import augment_low_res, upsample_low_res
from diffusers_pisdm.training import CascadeObjective, image_pyramid, info_nce, shift_noise_schedule
from diffusers_pisdm.training.cascade_objective import stage_batch_size


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


def make_objective(sizes=(4, 8, 16), prediction_type="epsilon", shifts=(1, 1, 1), **kwargs):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    schedulers = [shift_noise_schedule(scheduler, shift) for _, shift in zip(sizes, shifts)]
    return CascadeObjective(make_stages(sizes), schedulers, **kwargs)


@pytest.fixture
def batch(real_images):
    """A pyramid of eight images, their labels, and a seed."""
    return image_pyramid(real_images[::6][:8], [4, 8, 16]), torch.arange(8) % NUM_CLASSES, 3


class Recorder:
    """Keeps what each stage was given and what it returned, its features apart."""

    def __init__(self, objective):
        self.calls, self.features = [], []
        for stage in objective.stages:
            stage.register_forward_hook(self, with_kwargs=True)

    def __call__(self, stage, args, kwargs, output):
        self.calls.append((*args, kwargs["low_res"], kwargs["noise_level"], output[0]))
        self.features.append(output[1])


def test_the_loss_is_equation_17_for_what_the_stages_were_given(batch):
    pyramid, labels, seed = batch
    sil = {"sil_weight": 0.5, "sil_temperature": 0.3, "sil_mask_same_class": True, "sil_per_value": False}
    objective = make_objective(loss_weighting="vlb", stage_loss_weights=[1.0, 0.5, 2.0], shifts=(1, 0.5, 2), **sil)
    recorder = Recorder(objective)
    losses = objective(pyramid, labels, seed)
    assert [len({id(s) for s in objective.schedulers[:n]}) for n in (1, 2, 3)] == [1, 2, 3]
    for index, (noisy, timesteps, _, _, _, prediction) in enumerate(recorder.calls):
        scheduler, clean = objective.schedulers[index], pyramid[index]
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        signal, sigma = (x.sqrt()[:, None, None, None] for x in (alpha_bar, 1 - alpha_bar))
        noise = (noisy - signal * clean) / sigma
        betas = scheduler.betas[timesteps]
        weight = betas / (2 * (1 - betas) * (1 - alpha_bar))
        expected = weight * (prediction - noise).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(losses.denoising[index], expected, rtol=1e-3, atol=0)
    heads = objective.scale_invariant_loss.heads.values()
    first, second, third = (
        F.normalize(head(features.mean(dim=1)), dim=1) for head, features in zip(heads, recorder.features)
    )
    expected = [info_nce(first, second, 0.3, labels), info_nce(second, third, 0.3, labels)]
    torch.testing.assert_close(losses.scale_invariant, torch.stack(expected).detach())
    assert not any(part.requires_grad for part in (*losses.denoising, losses.scale_invariant))
    first, second, third = (errors.mean() for errors in losses.denoising)
    expected_total = first + 0.5 * second + 2.0 * third + 0.5 * losses.scale_invariant.mean()
    torch.testing.assert_close(losses.total.detach(), expected_total)


def test_timesteps_are_uniform_over_the_whole_schedule():
    [stage] = make_stages((4,))
    objective = CascadeObjective([stage], [DDPMScheduler(num_train_timesteps=10)])
    recorder = Recorder(objective)
    (timesteps,) = objective([torch.zeros(4000, 3, 4, 4)], torch.zeros(4000, dtype=torch.long), 5).timesteps
    assert torch.equal(recorder.calls[0][1], timesteps)
    counts = timesteps.bincount(minlength=10)
    assert len(counts) == 10 and ((counts > 320) & (counts < 480)).all()  # 400 each, four standard deviations


def test_every_stage_has_noise_and_levels_of_its_own():
    """Of black images, only what is drawn is left: the noise times sigma, and in the condition times the level."""
    count = 600
    objective = make_objective(max_noise_level=0.3, sil_weight=0.0)
    recorder = Recorder(objective)
    objective([torch.zeros(count, 3, size, size) for size in (4, 8, 16)], torch.zeros(count, dtype=torch.long), 5)
    drawn, levels = [], []
    for noisy, timesteps, _, low_res, level, _ in recorder.calls:
        sigma = (1 - DDPMScheduler().alphas_cumprod[timesteps]).sqrt()
        drawn.append(noisy / sigma[:, None, None, None])
        if low_res is not None:
            levels.append(level)
            drawn.append(low_res / level[:, None, None, None])
    assert len(drawn) == 5 and len(levels) == 2
    for noise in drawn:
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        assert ((noise.flatten(1).std(dim=1) - 1).abs() < 5 / (2 * noise[0].numel()) ** 0.5).all()  # of each image
    same_places = torch.stack([noise[:, :, :4, :4].flatten() for noise in drawn])
    assert (torch.corrcoef(same_places) - torch.eye(5)).abs().max() < 0.03
    for level in levels:
        assert 0 <= level.min() < 0.01 and 0.29 < level.max() < 0.3 and abs(level.mean() - 0.15) < 0.015
    assert torch.corrcoef(torch.stack(levels))[0, 1].abs() < 0.2


def test_defaults(real_images):
    """Equation 17 as DDPM, U-ViT and DiM train it, and our reading of the rest."""
    pyramid, labels = image_pyramid(real_images, [4, 8, 16]), torch.arange(len(real_images)) % NUM_CLASSES
    stated = {
        "loss_weighting": "uniform",
        "label_dropout": 0.1,
        "max_noise_level": 0.5,
        "sil_weight": 1.0,
        "sil_temperature": 0.1,
        "sil_mask_same_class": False,
        "sil_per_value": True,
        "sil_form": "info_nce",
        "independent_conditions": False,
        "train_stages": [1, 2, 3],
        "batch_shares": [1.0, 1.0, 1.0],
        "stage_loss_weights": [1.0, 1.0, 1.0],
        "process_index": 0,
        "num_processes": 1,
    }
    assert make_objective()(pyramid, labels, 3).total == make_objective(**stated)(pyramid, labels, 3).total
    for weighting, default in (("min_snr", {"min_snr_gamma": 5.0}), ("sigmoid", {"sigmoid_bias": 2.0})):
        chosen, other = {"loss_weighting": weighting}, {name: value / 2 for name, value in default.items()}
        expected = make_objective(**chosen, **default)(pyramid, labels, 3).total
        assert make_objective(**chosen)(pyramid, labels, 3).total == expected
        assert make_objective(**chosen, **other)(pyramid, labels, 3).total != expected


def test_residual_stages_learn_what_the_clean_upsampled_image_lacks(batch):
    """Each stage has its scale, prediction type and weighting; only the condition has augmentation noise."""
    pyramid, labels, seed = batch
    stages = make_stages()
    stages[1].register_to_config(residual_scale=0.3)
    stages[2].register_to_config(residual_scale=0.2)
    types = ("epsilon", "sample", "v_prediction")
    schedulers = [DDPMScheduler(prediction_type=kind) for kind in types]
    objective = CascadeObjective(
        stages, schedulers, loss_weighting=["vlb", "min_snr", "uniform"], min_snr_gamma=2.0, sil_weight=0.0
    )
    recorder = Recorder(objective)
    losses = objective(pyramid, labels, seed)
    for index, scale in ((1, 0.3), (2, 0.2)):
        noisy, timesteps, _, low_res, level, prediction = recorder.calls[index]
        size = pyramid[index].shape[-2:]
        upsampled = F.interpolate(pyramid[index - 1], size, mode="bicubic", align_corners=False, antialias=True)
        residual = (pyramid[index] - upsampled) / scale
        alpha_bar = schedulers[index].alphas_cumprod[timesteps]
        signal, sigma = (x.sqrt()[:, None, None, None] for x in (alpha_bar, 1 - alpha_bar))
        noise = (noisy - signal * residual) / sigma
        assert abs(noise.std() - 1) < 0.1
        target = residual if index == 1 else signal * noise - sigma * residual
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=2.0) if index == 1 else 1.0
        expected = weight * (prediction - target).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(losses.denoising[index], expected, rtol=2e-3, atol=0)
        added = low_res - (1 - level**2).sqrt()[:, None, None, None] * upsampled
        torch.testing.assert_close(added.flatten(1).std(dim=1), level, rtol=0.35, atol=0.01)


def test_factors_are_dropped_one_by_one_beside_the_whole_label(real_images):
    factors = ((0, 0), (0, 1), (1, 0), (1, 1))
    torch.manual_seed(0)
    config = {"sample_size": 4, "in_channels": 3, "num_layers": 1, "hidden_size": 8, "num_classes": NUM_CLASSES}
    stage = PISDMTransformer2DModel(**config, class_factors=factors)
    objective = CascadeObjective([stage], [DDPMScheduler()], label_dropout=0.2, factor_dropout=0.3)
    recorder = Recorder(objective)
    labels = torch.arange(4000) % NUM_CLASSES
    pyramid = [torch.zeros(4000, 3, 4, 4)]
    objective(pyramid, labels, 5)
    seen, true = recorder.calls[0][2], torch.tensor(factors)[labels]
    dropped = seen == 2  # the null label of both factors
    assert torch.equal(seen[~dropped], true[~dropped])
    both, first = dropped.all(dim=1).float().mean(), dropped[:, 0].float().mean()
    assert abs(both - (0.2 + 0.8 * 0.3**2)) < 0.025
    assert abs(first - (0.2 + 0.8 * 0.3)) < 0.025
    objective.eval()(pyramid, labels, 5)
    assert torch.equal(recorder.calls[1][2], labels)
    objective = CascadeObjective([stage], [DDPMScheduler()], label_dropout=0.2)  # by default no factors are dropped
    objective(pyramid, labels, 5)
    assert set(recorder.calls[2][2].tolist()) == {*range(NUM_CLASSES + 1)}


def test_errors_are_taken_in_single_precision(batch):
    """Also where prediction and target are both halves: the clean image, under autocast."""
    pyramid, labels, seed = batch
    objective = make_objective(sizes=(16,), prediction_type="sample")
    recorder = Recorder(objective)
    clean = pyramid[2].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [errors] = objective([clean], labels, seed).denoising
    prediction = recorder.calls[0][-1]
    assert prediction.dtype == torch.bfloat16
    expected = (prediction.double() - clean.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(errors.double(), expected, rtol=1e-5, atol=0)


def test_all_is_computed_on_the_batchs_device(batch):
    """Whatever the default device: there, nothing could be computed."""
    objective = make_objective()
    expected = objective(*batch)
    with torch.device("meta"):
        losses = objective(*batch)
    assert losses.total == expected.total and torch.equal(losses.scale_invariant, expected.scale_invariant)


def test_factor_dropout_needs_factors():
    with pytest.raises(ValueError, match=r"`factor_dropout` .* `class_factors`"):
        make_objective(factor_dropout=0.1)


def test_one_weighting_for_each_stage():
    with pytest.raises(ValueError, match=r"`loss_weighting` .* one for each of the 3 stages"):
        make_objective(loss_weighting=["uniform", "vlb"])


def test_a_seeded_generator_is_as_good_as_the_seed(batch):
    pyramid, labels, seed = batch
    objective = make_objective()
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(objective(pyramid, labels, generator).total, objective(*batch).total)


def test_stages_share_timestep_and_label_and_see_the_stage_below(batch):
    pyramid, labels, seed = batch
    objective = make_objective(label_dropout=0.5, max_noise_level=0.3)
    recorder = Recorder(objective)
    objective(pyramid, labels, seed)
    (_, timesteps, first_labels, low_res, noise_level, _), *higher = recorder.calls
    assert low_res is None and noise_level is None
    assert (first_labels == NUM_CLASSES).any() and (first_labels == labels).any()
    for index, (_, stage_timesteps, stage_labels, low_res, noise_level, _) in enumerate(higher):
        assert torch.equal(stage_timesteps, timesteps) and torch.equal(stage_labels, first_labels)
        assert ((noise_level >= 0) & (noise_level < 0.3)).all() and noise_level.unique().numel() == len(labels)
        upsampled = upsample_low_res(pyramid[index], low_res.shape[-2:])
        added = low_res - augment_low_res(upsampled, torch.zeros_like(upsampled), noise_level)
        measured = added.flatten(1).std(dim=1)
        torch.testing.assert_close(measured, noise_level, rtol=0.35, atol=0.01)


def test_stages_may_draw_timesteps_and_dropped_labels_of_their_own(batch):
    pyramid, labels, seed = batch
    objective = make_objective(label_dropout=0.5, independent_conditions=True, train_stages=[2, 3])
    recorder = Recorder(objective)
    losses = objective(pyramid, labels, seed)
    timesteps = [call[1] for call in recorder.calls]
    assert torch.equal(losses.timesteps, torch.stack(timesteps[1:]))  # of the trained stages
    assert len({tuple(t.tolist()) for t in timesteps}) == 3
    dropped = [call[2] == NUM_CLASSES for call in recorder.calls]
    assert len({tuple(d.tolist()) for d in dropped}) == 3
    for call, given in zip(recorder.calls, dropped):
        assert torch.equal(call[2][~given], labels[~given])
    first, second = objective.eval()(pyramid, labels, seed).timesteps  # held-out losses are comparable
    assert torch.equal(first, second)


def test_the_scale_invariant_losses_weight_per_value_and_as_it_decays(batch):
    """Read literally, eq. 17 sums squares over values where we take means, and weighs L_s by 1."""
    weight = 40.0
    objective = make_objective(sil_weight=weight, sil_per_value=True, sil_decay_steps=8)
    for step, share in ((None, 1.0), (0, 1.0), (2, 0.75), (8, 0.0), (9, 0.0)):
        if step is not None:
            objective.set_step(step)
        losses = objective(*batch)
        denoising = sum(errors.mean() for errors in losses.denoising)
        first, second = losses.scale_invariant  # images of 8 and 16 pixels
        wanted = denoising + share * weight * (first / (3 * 8 * 8) + second / (3 * 16 * 16)) / 2
        torch.testing.assert_close(losses.total.detach(), wanted)
    plain = make_objective(sil_weight=weight, sil_per_value=False)
    plain.set_step(5)  # no decay: nothing to set
    losses = plain(*batch)
    wanted = sum(errors.mean() for errors in losses.denoising) + weight * losses.scale_invariant.mean()
    torch.testing.assert_close(losses.total.detach(), wanted)


@pytest.mark.parametrize("independent", [False, True])
def test_the_scale_invariant_loss_sees_what_each_stage_was_given(batch, independent):
    objective = make_objective(
        independent_conditions=independent, label_dropout=0.5, sil_max_timestep=700, sil_subtract_condition=True
    )
    seen = []
    objective.scale_invariant_loss.register_forward_pre_hook(lambda module, args: seen.append(args))
    recorder = Recorder(objective)
    objective(*batch).total.backward()
    ((_, _, timesteps, given),) = seen
    for stage, call in enumerate(recorder.calls):
        assert torch.equal(timesteps[stage], call[1]) and torch.equal(given[stage], call[2])
    assert all(p.grad is not None and p.grad.any() for p in objective.scale_invariant_loss.guesses.parameters())


@pytest.mark.parametrize(
    "options",
    [{"sil_form": "dispersive", "sil_max_timestep": 5}, {"sil_form": "dispersive", "sil_stop_gradient": True}],
)
def test_options_for_positives_need_positives(options):
    with pytest.raises(ValueError, match="positive pairs"):
        make_objective(**options)


def test_the_dispersive_form_has_no_heads(batch):
    objective = make_objective(sil_form="dispersive", sil_temperature=0.5)
    assert [*objective.scale_invariant_loss.parameters()] == []
    losses = objective(*batch)
    assert len(losses.scale_invariant) == 2
    losses.total.backward()


def test_checkpoints_hold_the_stages_and_the_heads_alone():
    assert {name.split(".")[0] for name in make_objective().state_dict()} == {"stages", "scale_invariant_loss"}


def test_without_noise_level_the_condition_is_the_upsampled_image(batch):
    objective = make_objective(max_noise_level=0.0)
    recorder = Recorder(objective)
    objective(*batch)
    pyramid = batch[0]
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
    torch.testing.assert_close(losses.total.detach(), sum(errors.mean() for errors in losses.denoising))


def test_a_single_stage_has_no_scale_invariant_loss(batch):
    objective = make_objective(sizes=(16,))
    assert objective.scale_invariant_loss is None
    assert len(objective(*batch).denoising) == 1


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


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 0.0]])
def test_stage_loss_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="one positive weight for each of the 3 stages"):
        make_objective(stage_loss_weights=weights)


@pytest.mark.parametrize("stages", [[], [0], [4], [1, 1]])
def test_stages_that_do_not_exist_cannot_be_trained(stages):
    with pytest.raises(ValueError, match=r"`train_stages` .* number from 1 to 3"):
        make_objective(train_stages=stages)


def test_the_same_seed_gives_the_same_loss(batch):
    objective = make_objective()
    pyramid, labels, seed = batch
    global_state = torch.get_rng_state()
    first = objective(pyramid, labels, seed).total
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.rand(1)
    assert objective(pyramid, labels, seed).total == first
    assert objective(pyramid, labels, seed + 1).total != first


def test_only_the_chosen_stages_are_run_and_trained(batch):
    objective = make_objective(train_stages=[1])
    recorder = Recorder(objective)
    losses = objective(*batch)
    losses.total.backward()
    assert len(recorder.calls) == 1 and len(losses.denoising) == 1 and losses.scale_invariant.numel() == 0
    assert [
        index for index, stage in enumerate(objective.stages) if any(p.requires_grad for p in stage.parameters())
    ] == [0]


def test_a_stage_trained_alone_is_compared_with_the_frozen_one_below_it(batch):
    objective = make_objective(train_stages=[3], sil_weight=0.5, sil_per_value=False)
    recorder, grad_enabled = Recorder(objective), []
    for stage in objective.stages:
        stage.register_forward_hook(lambda *call: grad_enabled.append(torch.is_grad_enabled()))
    losses = objective(*batch)
    losses.total.backward()
    assert [call[0].shape[-1] for call in recorder.calls] == [8, 16] and len(losses.denoising) == 1
    assert grad_enabled == [False, True]
    torch.testing.assert_close(losses.total.detach(), losses.denoising[0].mean() + 0.5 * losses.scale_invariant.mean())
    with_gradient = [name for name, p in objective.named_parameters() if p.grad is not None]
    assert any(name.startswith("stages.2.") for name in with_gradient)
    assert not any(name.startswith(("stages.0.", "stages.1.")) for name in with_gradient)
    assert sorted(objective.scale_invariant_loss.heads) == ["1", "2"]


def test_two_processes_draw_the_rows_of_one(batch):
    pyramid, labels, seed = batch
    halves = []
    alone = make_objective(label_dropout=0.5, batch_shares=[1.0, 0.5, 0.5])
    whole = Recorder(alone)
    alone(pyramid, labels, seed)
    for rank in range(2):
        objective = make_objective(
            label_dropout=0.5, batch_shares=[1.0, 0.5, 0.5], process_index=rank, num_processes=2
        )
        halves.append(Recorder(objective))
        objective([level[rank::2] for level in pyramid], labels[rank::2], seed)
    for stage, call in enumerate(whole.calls):
        for rank, half in enumerate(halves):
            for mine, all_rows in zip(half.calls[stage][:3], call[:3]):  # noisy images, timesteps, labels
                assert torch.equal(mine, all_rows[rank::2])
    # In evaluation a process is alone.
    expected, second = alone.eval()(pyramid, labels, seed), objective.eval()(pyramid, labels, seed)
    assert torch.equal(second.total, expected.total)


def test_training_lowers_every_loss(batch):
    objective = make_objective(label_dropout=0.0, sil_per_value=False)  # or the others' loss outweighs it
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)

    pyramid, labels, seed = batch

    def evaluate():
        with torch.no_grad():
            losses = objective(pyramid, labels, seed)
        return torch.cat([torch.stack([errors.mean() for errors in losses.denoising]), losses.scale_invariant])

    before = evaluate()
    for step in range(60):
        optimizer.zero_grad()
        objective(pyramid, labels, step).total.backward()
        optimizer.step()
    assert (evaluate() < 0.9 * before).all()


@pytest.mark.parametrize(
    ("share", "batch_size", "images"), [(1.0, 8, 8), (0.25, 8, 2), (0.3, 8, 2), (0.4, 8, 3), (0.1, 4, 1), (0.5, 1, 1)]
)
def test_a_share_is_rounded_to_whole_images_and_never_empty(share, batch_size, images):
    assert stage_batch_size(share, batch_size) == images
