"""Ways to sample one and the same model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from diffusers_pisdm.evaluation import SampleSettings


@dataclass(frozen=True)
class SamplerSettings:
    """
    Args:
        scheduler (`str`): A scheduler class of diffusers.
        steps (`int`): Denoising steps of every stage.
        guidance_scale (`float`): w of classifier-free guidance; 1 is none.
        guidance_start, guidance_stop (`float`): The share of the steps, from the noisy end, in which guidance is on.
    """

    scheduler: str = "DPMSolverMultistepScheduler"
    steps: int = 20
    guidance_scale: float = 2.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0

    @property
    def name(self) -> str:
        """For folders."""
        parts = (self.scheduler.removesuffix("Scheduler"), self.steps, self.guidance_scale)
        return "-".join(map(str, (*parts, self.guidance_start, self.guidance_stop)))

    @property
    def guidance_label(self) -> str:
        """For plots and tables."""
        if self.guidance_scale <= 1 or (self.guidance_start, self.guidance_stop) == (0.0, 1.0):
            return f"w = {self.guidance_scale:g}"
        return f"w = {self.guidance_scale:g} in {self.guidance_start:g} to {self.guidance_stop:g}"

    def call_arguments(self) -> dict[str, float]:
        """What the pipeline is called with; the scheduler is one of its components."""
        arguments = asdict(self)
        del arguments["scheduler"]
        return {"num_inference_steps": arguments.pop("steps"), **arguments}

    def sample_settings(self, num_samples: int, seed: int) -> SampleSettings:
        """Of a sample set drawn this way."""
        return SampleSettings(num_samples, seed, scheduler=self.scheduler, **self.call_arguments())


def sampler_grid(
    schedulers: list[str], steps: list[int], guidance_scales: list[float], intervals: list[tuple[float, float]]
) -> list[SamplerSettings]:
    """
    Schedulers x steps at the first guidance scale and interval, and guidance scales x intervals at the first
    scheduler and number of steps: a product of all four would take days and show little more.

    Args:
        schedulers (`list[str]`), steps (`list[int]`), guidance_scales (`list[float]`),
        intervals (`list[tuple[float, float]]`): The first of each is what the other pair is tried at.

    Returns:
        `list[SamplerSettings]`: Without repetitions; unguided sampling has no interval.
    """
    grid = [SamplerSettings(name, count, guidance_scales[0], *intervals[0]) for name in schedulers for count in steps]
    for scale in guidance_scales:
        for interval in intervals if scale > 1 else [(0.0, 1.0)]:
            grid.append(SamplerSettings(schedulers[0], steps[0], scale, *interval))
    return list(dict.fromkeys(grid))
