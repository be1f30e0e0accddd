"""How sure a classifier is of each image, and how varied its answers are."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore as _InceptionScore
from torchmetrics.utilities.data import dim_zero_cat


class InceptionScore(_InceptionScore):
    """
    torchmetrics' `InceptionScore` of logits that are computed already: the mean over splits of
    exp(mean of KL(p(y|x) || p(y))).

    As in ADM, a split has `split_size` images. Images left over are spread over the splits, where ADM makes a smaller
    split of them, which scores less. Images are shuffled first, so that one split does not get the first classes only;
    ADM's samples are in random order already.

    Args:
        split_size (`int`, defaults to 5000): Images a split; fewer images are one split.
        seed (`int`, defaults to 0): Of the shuffling. The global generator is left alone.
        sync_on_compute (`bool`, defaults to `True`):
            Whether `compute` gathers the logits of all processes, which then must all call it.

    Source: Salimans et al., "Improved Techniques for Training GANs", 2016.
    """

    def __init__(self, split_size: int = 5000, seed: int = 0, sync_on_compute: bool = True):
        if split_size < 1:
            raise ValueError(f"`split_size` has to be at least 1 but is {split_size}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps the logits: 200 MB for 50,000 images
            super().__init__(feature=nn.Identity(), sync_on_compute=sync_on_compute)
        self.split_size = split_size
        self.seed = seed

    @staticmethod
    def num_splits(num_images: int, split_size: int) -> int:
        """How many splits there are: at least 1."""
        return max(1, num_images // split_size)

    def update(self, logits: torch.Tensor) -> None:
        """
        Args:
            logits (`torch.Tensor` of shape `(B, C)`): Of some images.
        """
        super().update(logits.float())

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Mean and standard deviation over the splits, float64. One split has a
            deviation of 0.
        """
        logits = dim_zero_cat(self.features)  # (N, C)
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(self.seed))
        splits = order.tensor_split(self.num_splits(len(logits), self.split_size))
        scores = torch.stack([_score_of_split(logits[split.to(logits.device)]) for split in splits])
        return scores.mean(), scores.std(unbiased=False)


def _score_of_split(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.double().log_softmax(dim=1)  # (N, C)
    log_mean_p = log_p.logsumexp(dim=0) - math.log(len(log_p))  # (C,): finite where the mean underflows
    return (log_p.exp() * (log_p - log_mean_p)).sum(dim=1).mean().exp()
