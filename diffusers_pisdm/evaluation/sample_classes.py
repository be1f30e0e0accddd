"""Which class each sample of a set is of."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline

from .sample_seeds import CLASSES, random_words
from .sample_settings import SampleSettings


# PIS-DM's, DiT's and the U-Net's name for the number of classes, none of which counts the null class of guidance.
NUM_CLASSES = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")


def count_classes(pipe: DiffusionPipeline) -> int | None:
    """The number of classes that a pipeline's model knows; `None` if it does not say."""
    configs = [model.config for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    return next((config[name] for config in configs for name in NUM_CLASSES if config.get(name) is not None), None)


def sample_classes(settings: SampleSettings, num_classes: int | None) -> list[int]:
    """
    The class of every sample: sample i's follows from the settings' `classes` and `seed` and i, not from the number of
    samples. Balanced ones come in rounds: each is a random order of all classes.

    Args:
        settings ([`SampleSettings`]): `num_samples`, `seed` and `classes` are used.
        num_classes (`int`, *optional*):
            The model's. Of a set on disk, it is `read_sample_set(folder)["num_classes"]`.

    Returns:
        `list[int]`: `num_samples` class ids.

    Raises:
        ValueError: A class id is out of range, or `num_classes` is unknown but needed.
    """
    if num_classes is None and isinstance(settings.classes, str):
        raise ValueError(f"The model does not say how many classes it has, as {settings.classes!r} needs: list them.")
    if settings.classes == "uniform":
        words = random_words(settings.seed, CLASSES, settings.num_samples)  # (num_samples,)
        return (words % np.uint64(num_classes)).tolist()  # of 2^64 values: uneven by one part in 2^64 / num_classes
    ids = np.array(range(num_classes) if settings.classes == "balanced" else settings.classes)
    wrong = ids[(ids < 0) if num_classes is None else (ids < 0) | (ids >= num_classes)]
    if len(wrong) > 0:
        known = "are not negative" if num_classes is None else f"are 0 to {num_classes - 1}"
        raise ValueError(f"`classes` contains {wrong[0]}, but this model's classes {known}.")
    rounds = -(-settings.num_samples // len(ids))
    words = random_words(settings.seed, CLASSES, rounds * len(ids)).reshape(rounds, len(ids))
    orders = words.argsort(axis=1, kind="stable")  # (rounds, len(ids)): a random permutation a row
    return ids[orders].reshape(-1)[: settings.num_samples].tolist()
