"""Sampling with another scheduler than a pipeline was saved with."""

from __future__ import annotations

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin


def swap_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """
    Replaces the schedulers of a pipeline, those of all stages, by ones of another class with the same noise schedule.

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline to change.
        name (`str`): A class of diffusers, e.g. `"DDIMScheduler"`.

    Raises:
        ValueError: diffusers has no scheduler of that name.
    """
    scheduler_class = getattr(diffusers, name, None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flow")]
        raise ValueError(f"diffusers has no scheduler `{name}`. It has {', '.join(known)}.")
    for key, component in pipe.components.items():
        if isinstance(component, SchedulerMixin):
            setattr(pipe, key, scheduler_class.from_config(component.config))
