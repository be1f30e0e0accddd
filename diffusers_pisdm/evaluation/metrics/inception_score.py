"""How confident a classifier is about each image, and how varied its predictions are."""

from __future__ import annotations

import math

import torch


def inception_score(logits: torch.Tensor, split_size: int = 5000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean over splits of exp(mean of KL(p(y|x) || p(y))) (Salimans et al., "Improved Techniques for Training GANs",
    2016).

    As in ADM, a split has `split_size` images. We spread leftover images over the splits; ADM puts them in a smaller
    split of their own, which scores lower. Images are shuffled first so that no split gets only the first classes;
    ADM's samples are already in random order.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`): A classifier's logits, one row per image.
        split_size (`int`, defaults to 5000): Images per split, at least 1; fewer images form one split.
        seed (`int`, defaults to 0): Seeds the shuffling. The global generator is not used.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Mean and standard deviation over the splits, float64. With one split, the
        standard deviation is 0.

    Raises:
        ValueError: `split_size` is less than 1.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    splits = order.tensor_split(count_splits(len(logits), split_size))
    scores = torch.stack([_score_of_split(logits[split]) for split in splits])
    return scores.mean(), scores.std(unbiased=False)


def count_splits(num_images: int, split_size: int) -> int:
    """The number of splits, at least 1; raises ValueError for a `split_size` below 1."""
    if split_size < 1:
        raise ValueError(f"`split_size` has to be at least 1 but is {split_size}.")
    return max(1, num_images // split_size)


def _score_of_split(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.double().log_softmax(dim=1)  # (N, C)
    log_mean_p = log_p.logsumexp(dim=0) - math.log(len(log_p))  # (C,): finite even if the mean underflows
    return (log_p.exp() * (log_p - log_mean_p)).sum(dim=1).mean().exp()
