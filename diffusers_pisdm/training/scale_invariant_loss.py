"""The scale-invariant loss L_s (paper, eq. 17): one image at two resolutions should have one representation."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float = 0.1,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Symmetric InfoNCE: row `i` of `queries` and row `i` of `keys` are a positive pair, all other pairs negatives.

    Args:
        queries, keys (`torch.Tensor` of shape `(B, E)`): Unit vectors.
        temperature (`float`, defaults to 0.1): Divides the cosine similarities.
        class_labels (`torch.Tensor` of shape `(B,)`, *optional*):
            If given, pairs of different images of one class are not used as negatives.

    Returns:
        `torch.Tensor`: The mean loss, a float32 scalar.
    """
    logits = queries.float() @ keys.float().T / temperature  # (B, B)
    positives = torch.arange(len(queries), device=queries.device)
    if class_labels is not None:
        same_class = class_labels[:, None] == class_labels[None]  # (B, B)
        same_class.fill_diagonal_(False)
        logits = logits.masked_fill(same_class, float("-inf"))
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


class ScaleInvariantLoss(nn.Module):
    r"""
    Compares the last Mamba block's features of one image in two adjacent stages of the cascade at the same timestep:
    mean over the image tokens, a two-layer SiLU head, unit length, symmetric InfoNCE.

    The heads belong to training only; they are not part of a published transformer.

    Args:
        hidden_sizes (`list[int]`): Width of the features of each stage; every stage has a head of its own.
        embedding_size (`int`, defaults to 256): Width of the compared vectors.
        temperature (`float`, defaults to 0.1): Temperature of the softmax.
        mask_same_class (`bool`, defaults to `False`): Whether other images of the same class are left out.
    """

    def __init__(
        self,
        hidden_sizes: list[int],
        embedding_size: int = 256,
        temperature: float = 0.1,
        mask_same_class: bool = False,
    ):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, embedding_size)) for size in hidden_sizes
        )
        self.temperature = temperature
        self.mask_same_class = mask_same_class

    def forward(self, features: list[torch.Tensor], class_labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`list[torch.Tensor]` of shapes `(B_s, L_s, D_s)`):
                One entry a stage. Row `i` is the same image in every stage; a stage may hold fewer rows.
            class_labels (`torch.Tensor` of shape `(B,)`): Labels of the rows, for `mask_same_class`.

        Returns:
            `torch.Tensor` of shape `(S - 1,)`: The loss of each pair of adjacent stages.
        """
        embeddings = [
            F.normalize(head(tokens.mean(dim=1)).float(), dim=-1)  # (B_s, E)
            for head, tokens in zip(self.heads, features, strict=True)
        ]
        losses = []
        for lower, higher in zip(embeddings, embeddings[1:]):
            shared = min(len(lower), len(higher))
            labels = class_labels[:shared] if self.mask_same_class else None
            losses.append(info_nce(lower[:shared], higher[:shared], self.temperature, labels))
        return torch.stack(losses)
