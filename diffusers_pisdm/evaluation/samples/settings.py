"""The settings of a sample set, and each sample's class and noise, which they determine."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
from diffusers import DiffusionPipeline


CLASS_RULES = ("balanced", "uniform")
# The settings that are arguments of a pipeline's `__call__`.
CALL_ARGUMENTS = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_start",
    "guidance_stop",
    "noise_level",
    "relay_strength",
)
NEEDED_ARGUMENTS = ("class_labels", "generator", "output_type")
# PIS-DM's, DiT's and the U-Net's names for the number of classes; none counts the null class of guidance.
NUM_CLASSES = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")
# Purposes of random numbers: each has its own independent stream.
NOISE, CLASSES = 1, 2
MAX_SAMPLES = 2**32


@dataclass(frozen=True)
class SampleSettings:
    """
    The settings that determine a set of samples: with the same model, equal settings give equal images.

    Args:
        num_samples (`int`, defaults to 50,000): At least 1; ImageNet models are usually evaluated on 50,000.
        seed (`int`, defaults to 0): Not negative. Sample i's noise and class depend only on `seed`, i and `classes`.
        classes (`str` or `list[int]`, defaults to `"balanced"`):
            `"balanced"` gives every class the same number of samples, within one, even if the set is cut short;
            `"uniform"` draws each sample's class independently, as ADM and DiT do; a list of ids balances over these
            ids, and an id listed twice gets twice as many samples.
        num_inference_steps, guidance_scale, guidance_start, guidance_stop, noise_level, relay_strength (*optional*):
            See [`PISDMCascadePipeline.__call__`]. `None` uses the pipeline's default, if it has such an argument.
        scheduler (`str`, *optional*):
            A diffusers scheduler class to sample with instead of the pipeline's own, e.g. `"DDIMScheduler"`.

    Raises:
        TypeError: A number or class id is not an integer.
        ValueError: A value is out of range.
    """

    num_samples: int = 50_000
    seed: int = 0
    classes: str | list[int] = "balanced"
    num_inference_steps: int | list[int] | None = None
    guidance_scale: float | list[float] | None = None
    guidance_start: float | list[float] | None = None
    guidance_stop: float | list[float] | None = None
    noise_level: float | list[float] | None = None
    relay_strength: float | list[float | None] | None = None
    scheduler: str | None = None

    def __post_init__(self):
        for name in ("num_samples", "seed"):
            object.__setattr__(self, name, _integer(f"`{name}`", getattr(self, name)))
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise ValueError(f"`num_samples` has to be from 1 to 2^32 but is {self.num_samples}.")
        if self.seed < 0:
            raise ValueError(f"`seed` has to be 0 or more but is {self.seed}.")
        if isinstance(self.classes, str):
            if self.classes not in CLASS_RULES:
                raise ValueError(
                    f"`classes` has to be {' or '.join(map(repr, CLASS_RULES))} or a list of class ids but is"
                    f" {self.classes!r}."
                )
            return
        if len(self.classes) == 0:
            raise ValueError(f"`classes` is empty. Pass class ids, or one of {', '.join(CLASS_RULES)}.")
        ids = [_integer("A class id in `classes`", class_id) for class_id in self.classes]
        object.__setattr__(self, "classes", ids)

    def resolve(self, pipe: DiffusionPipeline) -> SampleSettings:
        """
        Fills in the pipeline's defaults.

        Args:
            pipe ([`DiffusionPipeline`]): The pipeline that will draw the samples.

        Returns:
            [`SampleSettings`]: With a value for every argument that the pipeline takes.

        Raises:
            ValueError: The pipeline does not take an argument that is set, or is not class-conditional.
        """
        parameters = inspect.signature(pipe.__call__).parameters
        name = type(pipe).__name__
        missing = [f"`{argument}`" for argument in NEEDED_ARGUMENTS if argument not in parameters]
        if missing:
            raise ValueError(
                f"{name} does not take {', '.join(missing)}. Pass a class-conditional pipeline, such as"
                " `PISDMCascadePipeline` or `DiTPipeline`."
            )
        absent = [argument for argument in CALL_ARGUMENTS if argument not in parameters]
        refused = [f"`{argument}`" for argument in absent if getattr(self, argument) is not None]
        if refused:
            raise ValueError(f"{name} does not take {', '.join(refused)}. Leave it out (None).")
        # Defaults that the call leaves open are in the configuration.
        defaults = {
            argument: pipe.config.get(f"default_{argument}", parameters[argument].default)
            for argument in CALL_ARGUMENTS
            if argument in parameters and getattr(self, argument) is None
        }
        return replace(self, **defaults)


def _integer(name: str, value: int) -> int:
    """Converts NumPy integers, which JSON does not support, to Python's."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} has to be an integer but is {value!r} of type {type(value)}.")
    return int(value)


def count_classes(pipe: DiffusionPipeline) -> int | None:
    """The number of classes of a pipeline's model; `None` if it does not say."""
    configs = [model.config for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    return next((config[name] for config in configs for name in NUM_CLASSES if config.get(name) is not None), None)


def sample_classes(settings: SampleSettings, num_classes: int | None) -> list[int]:
    """
    The class of every sample. Sample i's depends on i and the settings' `classes` and `seed`, not on the number of
    samples. Balanced classes come in rounds, each a random order of all classes.

    Args:
        settings ([`SampleSettings`]): Only `num_samples`, `seed` and `classes` are used.
        num_classes (`int`, *optional*):
            The model's number of classes. For a set on disk, it is `read_sample_set(folder)["num_classes"]`.

    Returns:
        `list[int]`: `num_samples` class ids.

    Raises:
        ValueError: A class id is out of range, or `num_classes` is unknown but needed.
    """
    if num_classes is None and isinstance(settings.classes, str):
        raise ValueError(f"{settings.classes!r} needs the number of classes, which the model does not say: list them.")
    if settings.classes == "uniform":
        words = random_words(settings.seed, CLASSES, settings.num_samples)  # (num_samples,)
        return (words % np.uint64(num_classes)).tolist()  # biased by one part in 2^64 / num_classes
    ids = np.array(range(num_classes) if settings.classes == "balanced" else settings.classes)
    wrong = ids[(ids < 0) if num_classes is None else (ids < 0) | (ids >= num_classes)]
    if len(wrong) > 0:
        known = "are not negative" if num_classes is None else f"are 0 to {num_classes - 1}"
        raise ValueError(f"`classes` contains {wrong[0]}, but this model's classes {known}.")
    rounds = -(-settings.num_samples // len(ids))
    words = random_words(settings.seed, CLASSES, rounds * len(ids)).reshape(rounds, len(ids))
    orders = words.argsort(axis=1, kind="stable")  # (rounds, len(ids)): a random permutation per row
    return ids[orders].reshape(-1)[: settings.num_samples].tolist()


def random_words(seed: int, purpose: int, count: int) -> np.ndarray:
    """Random numbers (count,), uint64; a larger `count` only appends to them. `purpose` is positive."""
    # NumPy guarantees that `SeedSequence` will not change, unlike its generators.
    return split_mix(np.random.SeedSequence((seed, purpose)).generate_state(1, np.uint64)[0], count)


def noise_seeds(seed: int, indices: Iterable[int]) -> np.ndarray:
    """
    A distinct 32-bit seed for each sample's noise: (B,), uint32. torch's CPU generator ignores the other bits of a
    seed, and 50,000 random 32-bit seeds would contain a duplicate in a quarter of all sample sets.
    """
    start = np.random.SeedSequence((seed, NOISE)).generate_state(1, np.uint32)  # (1,)
    return murmur_finalizer(start + np.fromiter(indices, dtype=np.uint32))


def sample_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """Each sample's noise generator, on the CPU so that the noise is the same on every device."""
    return [torch.Generator().manual_seed(word) for word in noise_seeds(seed, indices).tolist()]


def split_mix(start: np.uint64, count: int) -> np.ndarray:
    """The first `count` numbers, uint64, of SplitMix64 (Steele, Lea and Flood, 2014) from state `start`."""
    words = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def murmur_finalizer(words: np.ndarray) -> np.ndarray:
    """Scrambles 32-bit integers one to one, with the last step of MurmurHash3 (Appleby, 2011)."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))
