"""The scale-invariant loss L_s (SIL, the paper's eq. 17): an image's features should not depend on its resolution."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float = 0.1,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Symmetric InfoNCE: row `i` of `queries` and row `i` of `keys` are a positive pair, all other pairs are negatives.

    Args:
        queries, keys (`torch.Tensor` of shape `(B, E)`): Unit vectors.
        temperature (`float`, defaults to 0.1): Divides the cosine similarities.
        class_labels (`torch.Tensor` of shape `(B,)`, *optional*):
            If given, different images of the same class are not used as negatives.

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
    The paper's scale-invariant loss (SIL). It compares the last Mamba block's features of one image in two adjacent
    stages of the cascade at the same timestep: mean over the image tokens, a two-layer SiLU head, unit length,
    symmetric InfoNCE. In training, the images of all processes are each other's negatives, with gradients.

    The heads are used only in training; they are not part of a published transformer.

    Args:
        hidden_sizes (`list[int]`): Width of each stage's features.
        stages (`list[int]`, *optional*):
            The higher stage `s` of each pair `(s - 1, s)` to compare, counted from 0; all but the first if not given.
            Only the stages in these pairs have a head.
        embedding_size (`int`, defaults to 256): Width of the compared vectors.
        temperature (`float`, defaults to 0.1): Temperature of the softmax.
        mask_same_class (`bool`, defaults to `False`): Whether other images of the same class are left out.
    """

    def __init__(
        self,
        hidden_sizes: list[int],
        stages: list[int] | None = None,
        embedding_size: int = 256,
        temperature: float = 0.1,
        mask_same_class: bool = False,
    ):
        super().__init__()
        self.stages = list(range(1, len(hidden_sizes))) if stages is None else stages
        self.heads = nn.ModuleDict()
        for index in sorted({*self.stages, *(stage - 1 for stage in self.stages)}):
            size = hidden_sizes[index]
            self.heads[str(index)] = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, embedding_size))
        self.temperature = temperature
        self.mask_same_class = mask_same_class

    def forward(self, features: dict[int, torch.Tensor], class_labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`dict[int, torch.Tensor]` of shapes `(B_s, L_s, D_s)`):
                By stage, at least for those with a head. Row `i` is the same image in every stage; a stage may have
                fewer rows.
            class_labels (`torch.Tensor` of shape `(B,)`): Labels of the rows, for `mask_same_class`.

        Returns:
            `torch.Tensor` of shape `(len(stages),)`: The loss of each pair.
        """
        embeddings = {
            int(stage): F.normalize(head(features[int(stage)].mean(dim=1)).float(), dim=-1)  # (B_s, E)
            for stage, head in self.heads.items()
        }
        losses = []
        for stage in self.stages:
            lower, higher = embeddings[stage - 1], embeddings[stage]
            shared = min(len(lower), len(higher))
            lower, higher, labels = lower[:shared], higher[:shared], class_labels[:shared]
            if self.training:
                lower, higher, labels = gather_rows(lower), gather_rows(higher), gather_rows(labels)
            losses.append(info_nce(lower, higher, self.temperature, labels if self.mask_same_class else None))
        return torch.stack(losses)


class _GatherRows(torch.autograd.Function):
    """`torch.distributed.nn.functional.all_gather`, which PyTorch 2.13 deprecates in favour of a private function."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # Every process computes the same loss over all rows. DDP divides by the number of processes, so summing over
        # them here gives that loss's gradient.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, equally many of each, in process order, with gradient; `rows` for one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows  # (B, ...)
    return _GatherRows.apply(rows.contiguous())  # (B * num_processes, ...)
