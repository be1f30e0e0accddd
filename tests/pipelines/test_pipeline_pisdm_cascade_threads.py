"""Images do not depend on what else runs in the process."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

from diffusers_pisdm import PISDMCascadePipeline
from tests.pipelines.tiny_cascade import generators, make_cascade


SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
THREADS = 4


def draw(pipe: PISDMCascadePipeline, seed: int) -> torch.Tensor:
    """Steps, guidance and class differ between seeds."""
    arguments = {"num_inference_steps": [4 + seed, 6], "guidance_scale": 1.0 + seed, "output_type": "latent"}
    return pipe(seed, generator=generators(seed), **arguments).images


def at_once(pipes: list[PISDMCascadePipeline]) -> list[torch.Tensor]:
    """Each pipeline draws its own image, all starting at the same time."""
    start = threading.Barrier(len(pipes))

    def work(pipe, seed):
        start.wait()
        return draw(pipe, seed)

    with ThreadPoolExecutor(len(pipes)) as pool:
        return list(pool.map(work, pipes, range(len(pipes))))


@pytest.mark.parametrize(
    "scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, PNDMScheduler, DDPMScheduler]
)
@pytest.mark.parametrize("shared", ["the pipeline", "the models, by from_pipe", "all components"])
def test_threads_draw_what_one_thread_draws(scheduler_class, shared):
    pipe = make_cascade(2, scheduler=scheduler_class(**SCHEDULE))
    wanted = [draw(pipe, seed) for seed in range(THREADS)]
    makers = {
        "the pipeline": lambda: pipe,
        "the models, by from_pipe": lambda: PISDMCascadePipeline.from_pipe(pipe),
        "all components": lambda: PISDMCascadePipeline(**pipe.components),
    }
    pipes = [makers[shared]() for _ in range(THREADS)]
    for other in pipes:
        other.set_progress_bar_config(disable=True)
    for images, expected in zip(at_once(pipes), wanted, strict=True):
        assert torch.equal(images, expected)


def test_from_pipe_shares_models_but_no_scheduler():
    pipe = make_cascade(2, scheduler_2=DDPMScheduler(**SCHEDULE))
    other = PISDMCascadePipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    for name in ("scheduler", "scheduler_2"):
        assert getattr(other, name) is not getattr(pipe, name)
        assert getattr(other, name).config == getattr(pipe, name).config
    assert other.scheduler_3 is None


def test_callbacks_see_the_running_schedulers_and_may_call_the_pipeline():
    pipe = make_cascade(2)
    given, seen = pipe.scheduler, []

    def look(running, step, timestep, callback_kwargs):
        seen.append((running is pipe, pipe.scheduler.step_index))
        return callback_kwargs

    def preview(running, step, timestep, callback_kwargs):
        running(1, num_inference_steps=1, output_type="latent")
        return callback_kwargs

    pipe(1, num_inference_steps=[3, 1], callback_on_step_end=look)
    assert seen[:3] == [(True, 1), (True, 2), (True, 3)]
    assert given.num_inference_steps is None  # another pipeline may hold it
    pipe(1, num_inference_steps=2, callback_on_step_end=preview)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_pipeline_can_be_copied(duplicate):
    pipe = make_cascade(2)
    other = duplicate(pipe)
    assert torch.equal(draw(other, 1), draw(pipe, 1))
    assert other._call_lock.lock is not pipe._call_lock.lock
