import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import DummyObject

from diffusers_pisdm.schedulers import (
    LARGEST_RATIOS,
    NO_SAMPLE_PREDICTION,
    SETTINGS,
    UNSUITABLE,
    check_scheduler,
    check_unbounded_scheduler,
    relay_start,
    sampling_schedulers,
    set_timesteps,
    shift_noise_schedule,
    stage_noise_schedules,
    swap_scheduler,
    warn_of_uneven_steps,
)
from tests.pipelines.tiny_cascade import make_cascade


# --- Swapping --------------------------------------------------------------------------------------------------------


def test_all_stages_get_the_class_and_keep_their_noise_schedule():
    pipe = make_cascade(2, scheduler_2=EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    swap_scheduler(pipe, "DDIMScheduler")
    assert type(pipe.scheduler).__name__ == type(pipe.scheduler_2).__name__ == "DDIMScheduler"
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler_2.config.beta_schedule == "scaled_linear"


def test_a_stage_without_a_scheduler_stays_without():
    pipe = make_cascade(2)
    swap_scheduler(pipe, "DDIMScheduler")
    assert pipe.scheduler_2 is None


@pytest.mark.parametrize("name", ["DDIMSchedular", "PISDMTransformer2DModel", "__version__"])
def test_what_is_no_scheduler_is_refused(name):
    with pytest.raises(ValueError, match=rf"diffusers has no scheduler `{name}`") as error:
        swap_scheduler(make_cascade(1), name)
    if name == "DDIMSchedular":
        assert re.search("Did you mean 'DDIMScheduler'", str(error.value))
        return
    known = re.search(r"It has (.*)\.", str(error.value))[1].split(", ")
    assert "DDIMScheduler" in known
    assert all(re.fullmatch(r"(?!Flow)\w+Scheduler", scheduler) for scheduler in known)  # flow matching does not fit


# --- Schedules of training, and of sampling --------------------------------------------------------------------------


def snr(scheduler):
    alpha_bar = scheduler.alphas_cumprod.double()
    return alpha_bar / (1 - alpha_bar)


@pytest.mark.parametrize("shift", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_signal_to_noise_ratio_falls_by_the_square(shift, beta_schedule):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, prediction_type="v_prediction")
    shifted = shift_noise_schedule(scheduler, shift)
    assert shifted.config.prediction_type == "v_prediction"
    torch.testing.assert_close(snr(shifted) * shift**2, snr(scheduler), rtol=2e-3, atol=1e-9)
    wanted = scheduler.alphas_cumprod.double().numpy()
    wanted = 1 / (1 + shift**2 * (1 / wanted - 1))
    # Not rounded to float32 on the way: the last steps' signal is a small difference of large numbers.
    np.testing.assert_allclose(np.cumprod(1 - np.array(shifted.config.trained_betas)), wanted, rtol=1e-12)


def test_the_shift_survives_saving_and_a_change_of_scheduler(tmp_path):
    shifted = shift_noise_schedule(DDPMScheduler(), 3.0)
    DPMSolverMultistepScheduler.from_config(shifted.config).save_pretrained(tmp_path)
    loaded = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.alphas_cumprod, shifted.alphas_cumprod)


def test_no_shift_changes_nothing_and_a_wrong_one_is_refused():
    scheduler = DDPMScheduler()
    assert shift_noise_schedule(scheduler, 1.0) is scheduler
    for shift in (0, 9e-4, 1.1e3, 1e30, float("nan")):
        with pytest.raises(ValueError, match=rf"from 0.001 to 1000, got {re.escape(str(shift))}\."):
            shift_noise_schedule(scheduler, shift)


@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("shift", [1e-3, 1e3])
def test_the_greatest_shifts_leave_numbers(shift, beta_schedule, zero_snr):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    (sampler,) = sampling_schedulers([shift_noise_schedule(scheduler, shift)])
    sampler.set_timesteps(10)
    assert sampler.alphas_cumprod.isfinite().all() and 0 < sampler.sigmas[0] < torch.inf


def test_each_stage_has_its_shift_and_its_prediction_type():
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    first, second, third = stage_noise_schedules(
        scheduler, 3, shifts=[1.0, 2.0, 1.0], prediction_types=["v_prediction", "sample", "epsilon"]
    )
    assert first is scheduler
    assert [s.config.prediction_type for s in (first, second, third)] == ["v_prediction", "sample", "epsilon"]
    torch.testing.assert_close(snr(second) * 4, snr(scheduler), rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(snr(third), snr(scheduler))
    assert not third.config.clip_sample
    assert stage_noise_schedules(scheduler, 2) == [scheduler] * 2
    assert stage_noise_schedules([second, first], 2) == [second, first]  # each stage's own


@pytest.mark.parametrize(
    "arguments", [{"shifts": [1.0]}, {"prediction_types": ["sample"]}, {"schedulers": []}], ids=str
)
def test_one_of_each_for_every_stage(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` .* each of the 2 stages"):
        stage_noise_schedules(**{"schedulers": DDPMScheduler(), "num_stages": 2, **arguments})


def test_samplers_are_dpm_solver_with_each_stages_schedule():
    schedulers = stage_noise_schedules(DDPMScheduler(), 2, shifts=[1.0, 3.0], prediction_types=["epsilon", "sample"])
    samplers = sampling_schedulers(schedulers)
    for scheduler, sampler in zip(schedulers, samplers, strict=True):
        assert type(sampler) is DPMSolverMultistepScheduler
        assert sampler.config.timestep_spacing == "trailing"
        assert sampler.config.prediction_type == scheduler.config.prediction_type
        torch.testing.assert_close(sampler.alphas_cumprod, scheduler.alphas_cumprod)


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_timesteps_are_on_the_cpu_whatever_the_default_device():
    scheduler = DDPMWuerstchenScheduler()  # diffusers would make its timesteps there
    with torch.device("meta"):
        set_timesteps(scheduler, 3)
    assert scheduler.timesteps.device.type == "cpu"


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize(("strength", "steps"), [(0.01, 1), (0.3, 3), (0.39, 3), (1.0, 10)])
def test_a_relay_runs_its_share_of_the_steps(scheduler_class, strength, steps):
    """Rounded down, but at least one; each of Heun's ten steps is two timesteps long, except for the last."""
    scheduler = scheduler_class()
    set_timesteps(scheduler, 10)
    assert relay_start(scheduler, strength) == (10 - steps) * scheduler.order


# --- Schedulers that do not fit --------------------------------------------------------------------------------------


INSTALLED = [name for name in dir(diffusers) if name.endswith("Scheduler")]
SUITABLE = {
    *("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "LMSDiscreteScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"),
    *("SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
}
UNSUITABLE_NAMES = {name: reason for reason, names in UNSUITABLE.items() for name in names}


def cosine_cascade(prediction_type: str, num_stages: int = 1):
    training = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    return make_cascade(num_stages, scheduler=sampling_schedulers([training])[0])


def test_every_installed_scheduler_is_judged():
    assert set(INSTALLED) == SUITABLE | UNSUITABLE_NAMES.keys()
    assert SUITABLE.isdisjoint(UNSUITABLE_NAMES)
    assert {*SETTINGS, *NO_SAMPLE_PREDICTION} <= SUITABLE and LARGEST_RATIOS.keys() <= SETTINGS.keys()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", sorted(SUITABLE))
def test_a_suitable_scheduler_draws_or_is_refused_before_anything_is_drawn(name, prediction_type, monkeypatch):
    if issubclass(type(getattr(diffusers, name)), DummyObject):
        with pytest.raises(ImportError, match=f"{name} requires"):
            swap_scheduler(cosine_cascade(prediction_type), name)
        return
    pipe = cosine_cascade(prediction_type)
    if prediction_type == "sample" and name in NO_SAMPLE_PREDICTION:
        before = pipe.scheduler
        with pytest.raises(ValueError, match=rf"`scheduler` .*{name}.*predicts the sample.*DPMSolver"):
            swap_scheduler(pipe, name)
        assert pipe.scheduler is before
        scheduler = getattr(diffusers, name).from_config(before.config)
        with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):  # in diffusers, too
            scheduler.set_timesteps(20)
            sample = torch.zeros(1, 3, 8, 8)
            scheduler.step(sample, scheduler.timesteps[0], scheduler.scale_model_input(sample, scheduler.timesteps[0]))
        return
    swap_scheduler(pipe, name)
    assert torch.isfinite(pipe(1, num_inference_steps=20, output_type="latent").images).all()


@pytest.mark.parametrize("name", sorted(UNSUITABLE_NAMES))
def test_an_unsuitable_scheduler_is_refused_with_the_reason(name):
    scheduler_class, pipe = getattr(diffusers, name), cosine_cascade("v_prediction", 2)
    if issubclass(type(scheduler_class), DummyObject):
        pytest.skip(f"{name} needs another package")
    with pytest.raises(ValueError, match=rf"`{name}` {UNSUITABLE_NAMES[name]}, but .*`DPMSolverMultistepScheduler`"):
        swap_scheduler(pipe, name)
    if name in ("AmusedScheduler", "RFD4ProteinaScheduler", "VQDiffusionScheduler"):  # have arguments without default
        return
    made = scheduler_class.from_config(pipe.scheduler.config)
    for scheduler in (made, type("Own", (scheduler_class,), {}).from_config(made.config)):
        with pytest.raises(ValueError, match=rf"`scheduler_2` .*{type(scheduler).__name__}.*{UNSUITABLE_NAMES[name]}"):
            make_cascade(2, scheduler_2=scheduler)


def test_a_scheduler_unknown_to_us_needs_the_schedule_of_training():
    class Stranger(diffusers.ConfigMixin, diffusers.SchedulerMixin):
        config_name = "scheduler_config.json"

        @register_to_config
        def __init__(self, sigma_max: float = 80.0):
            pass

    with pytest.raises(ValueError, match=r"Stranger.*does not take the noise schedule"):
        check_scheduler("scheduler", Stranger())


@pytest.mark.parametrize(
    ("scheduler", "culprit", "remedy"),
    [
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "flow matching", "DPMSolverMultistepScheduler"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "flow matching", "DPMSolverMultistepScheduler"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "continuous", "DPMSolverMultistepScheduler"),
        (CogVideoXDDIMScheduler(), r"`snr_shift_scale=3\.0`", r"snr_shift_scale=1\.0"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type='learned_range'", "variance_type=None"),
        (DPMSolverMultistepScheduler(variance_type="learned"), "variance_type='learned'", "variance_type=None"),
        (DDIMScheduler(prediction_type="x0"), "prediction_type='x0'", "epsilon, v_prediction, sample"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(scheduler, culprit, remedy):
    with pytest.raises(ValueError, match=f"`scheduler_3` .*{culprit}.*{remedy}"):
        check_scheduler("scheduler_3", scheduler)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("HeunDiscreteScheduler", {}, 10),
        ("HeunDiscreteScheduler", {}, 50),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, 10),
        ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}, 5),
        ("KDPM2AncestralDiscreteScheduler", {}, 20),
        ("EulerAncestralDiscreteScheduler", {}, 3),
    ],
)
def test_steps_that_are_too_long_are_refused_before_anything_is_drawn(name, options, steps):
    pipe = cosine_cascade("v_prediction", 2)
    pipe.scheduler_2 = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *inputs: calls.append(inputs))
    setting = next(iter(SETTINGS[name]))
    with pytest.raises(
        ValueError, match=rf"`{name}` draws noise .*sigma [\d,.e+]+ to [\d,.e+]+\. Pass .*{setting}=True"
    ):
        pipe(1, num_inference_steps=[2, steps])
    assert calls == []


def test_pndm_needs_steps_to_start():
    pipe = cosine_cascade("v_prediction")
    swap_scheduler(pipe, "PNDMScheduler")
    pipe(1, num_inference_steps=4)
    with pytest.raises(ValueError, match=r"`PNDMScheduler` needs at least 4 steps.*skip_prk_steps=True"):
        pipe(1, num_inference_steps=3)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe(1, num_inference_steps=3)


@pytest.mark.parametrize("name", sorted(LARGEST_RATIOS))
def test_with_the_settings_of_the_swap_they_are_not(name):
    pipe = cosine_cascade("v_prediction")
    swap_scheduler(pipe, name)
    for steps in (20, 50):
        pipe.retrieve_timesteps(pipe.scheduler, steps, None, None, None)


def test_a_swap_leaves_no_settings_behind_and_keeps_chosen_sigmas():
    pipe = cosine_cascade("v_prediction")
    before = pipe.scheduler.config
    swap_scheduler(pipe, "HeunDiscreteScheduler")
    assert pipe.scheduler.config.use_exponential_sigmas
    swap_scheduler(pipe, "DPMSolverMultistepScheduler")
    assert not pipe.scheduler.config.use_exponential_sigmas
    assert pipe.scheduler.config.timestep_spacing == before.timestep_spacing
    pipe.scheduler = EulerDiscreteScheduler.from_config(before, use_karras_sigmas=True)
    swap_scheduler(pipe, "HeunDiscreteScheduler")
    assert pipe.scheduler.config.use_karras_sigmas and not pipe.scheduler.config.use_exponential_sigmas


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_not(prediction_type):
    check_scheduler("scheduler", DPMSolverMultistepScheduler(prediction_type=prediction_type))


@pytest.mark.parametrize("bounds", [["clip_sample"], ["thresholding"], ["clip_sample", "thresholding"]], ids=str)
def test_bounds_are_refused_for_residuals(bounds):
    scheduler = DDIMScheduler(**{"clip_sample": False, **dict.fromkeys(bounds, True)})
    remedy = ", ".join(f"{bound}=False" for bound in bounds)
    with pytest.raises(ValueError, match=rf"`scheduler_2` .*`{bounds[0]}=True`.*`residual_scale`.*Pass .*{remedy}\)"):
        check_unbounded_scheduler("scheduler_2", scheduler, "residuals (`residual_scale`)")
    free = DDIMScheduler.from_config(scheduler.config, **dict.fromkeys(bounds, False))
    check_unbounded_scheduler("scheduler_2", free, "residuals")
    # What the configuration keeps for others does not clip.
    check_unbounded_scheduler("scheduler_2", EulerDiscreteScheduler.from_config(scheduler.config), "residuals")


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDIMParallelScheduler, PNDMScheduler])
def test_uneven_steps_are_warned_of(scheduler_class, caplog):
    """They step 1000 // N timesteps, while "linspace" puts N steps 999 / (N - 1) apart."""
    for spacing in ("trailing", "leading"):
        warn_of_uneven_steps(scheduler_class(timestep_spacing=spacing), 20)
    warn_of_uneven_steps(scheduler_class(timestep_spacing="linspace", num_train_timesteps=21), 6)  # 3 and 4 apart
    warn_of_uneven_steps(scheduler_class(timestep_spacing="linspace", num_train_timesteps=20), 20)  # 1 and 1
    (record,) = caplog.records
    assert record.name == "diffusers_pisdm.schedulers"
    message = record.getMessage()
    assert "3 timesteps" in message and "6 steps 4.0 apart" in message
    assert f"`{scheduler_class.__name__}.from_config(scheduler.config, timestep_spacing='trailing')`" in message


def test_a_single_step_is_uneven_too(caplog):
    warn_of_uneven_steps(DDIMScheduler(timestep_spacing="linspace"), 1)
    assert "1 steps 999.0 apart" in caplog.text


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDPMScheduler])
def test_schedulers_that_step_to_the_next_timestep_are_not_warned_of(scheduler_class, caplog):
    warn_of_uneven_steps(scheduler_class(timestep_spacing="linspace"), 20)
    assert not caplog.records
