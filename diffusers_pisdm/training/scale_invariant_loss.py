"""The scale-invariant loss L_s (SIL, the paper's eq. 17): an image's features should not depend on its resolution."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding


FORMS = ("info_nce", "dispersive")


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float = 0.1,
    class_labels: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Symmetric InfoNCE: row `i` of `queries` and row `i` of `keys` are a positive pair, all other pairs are negatives.

    Args:
        queries, keys (`torch.Tensor` of shape `(B, E)`): Unit vectors.
        temperature (`float`, defaults to 0.1): Divides the cosine similarities.
        class_labels (`torch.Tensor` of shape `(B,)`, *optional*):
            If given, different images of the same class are not used as negatives.
        counted (`torch.Tensor` of shape `(B,)`, bool, *optional*):
            The positive pairs that the loss is the mean of; all by default. The others are still negatives.

    Returns:
        `torch.Tensor`: The mean loss, a float32 scalar; 0 if no pair counts.
    """
    logits = queries.float() @ keys.float().T / temperature  # (B, B)
    positives = torch.arange(len(queries), device=queries.device)
    if class_labels is not None:
        same_class = class_labels[:, None] == class_labels[None]  # (B, B)
        same_class.fill_diagonal_(False)
        logits = logits.masked_fill(same_class, float("-inf"))
    if counted is None:
        return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2
    losses = [F.cross_entropy(direction, positives, reduction="none") for direction in (logits, logits.T)]  # (B,) each
    return (sum(losses) * counted).sum() / (2 * counted.sum().clamp(min=1))


def dispersive_loss(features: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    r"""
    Pushes the features of a batch's images apart, without positive pairs: `log mean_ij exp(-|h_i - h_j|^2 / (D tau))`
    over all pairs, those of an image with itself included (Wang and He, 2025, arXiv:2506.09027, the form with squared
    distances, each a mean over values).

    Args:
        features (`torch.Tensor` of shape `(B, ...)`): An image's features, D values in all.
        temperature (`float`, defaults to 0.5): The tau of the formula.

    Returns:
        `torch.Tensor`: A float32 scalar, at most 0.
    """
    features = features.flatten(1).float()  # (B, D)
    count = len(features)
    distances = torch.pdist(features).square() / features.shape[1]  # (B (B - 1) / 2,)
    both_ways = math.log(2.0) + torch.logsumexp(-distances / temperature, 0)
    return torch.logaddexp(both_ways, both_ways.new_tensor(math.log(count))) - 2 * math.log(count)


class ScaleInvariantLoss(nn.Module):
    r"""
    The paper's scale-invariant loss (SIL). It compares the last Mamba block's features of one image in two adjacent
    stages of the cascade at the same timestep: mean over the image tokens, a two-layer SiLU head, unit length,
    symmetric InfoNCE. In training, the images of all processes are each other's negatives, with gradients.

    The heads are used only in training; they are not part of a published transformer.

    The options below are ours. A positive pair shares more than its image: timestep and class are inputs of both
    stages, and suffice to recognise many positives. `max_timestep`, `subtract_condition` and
    `CascadeObjective(independent_conditions=True)` each take some of that away.

    Args:
        hidden_sizes (`list[int]`): Width of each stage's features.
        stages (`list[int]`, *optional*):
            The higher stage `s` of each pair `(s - 1, s)` to compare, counted from 0; all but the first if not given.
            Only the stages in these pairs have a head.
        embedding_size (`int`, defaults to 256): Width of the compared vectors.
        temperature (`float`, defaults to 0.1): Temperature of the softmax.
        mask_same_class (`bool`, defaults to `False`): Whether other images of the same class are left out.
        form (`str`, defaults to `"info_nce"`):
            `"info_nce"`, or `"dispersive"`: a pair's loss is then the mean [`dispersive_loss`] of its two stages'
            features, token by token, without heads or positives.
        stop_gradient (`bool`, defaults to `False`): Whether the lower stage of a pair is not trained by it.
        max_timestep (`int`, *optional*): Only images below this timestep in both stages are positive pairs.
        subtract_condition (`bool`, defaults to `False`):
            Whether the heads see what is left of the features after a small network's guess of them from timestep and
            class alone, which is fitted along the way.
        num_classes (`int`, *optional*): Of `subtract_condition`.

    Raises:
        ValueError: An option needs another form.
    """

    def __init__(
        self,
        hidden_sizes: list[int],
        stages: list[int] | None = None,
        embedding_size: int = 256,
        temperature: float = 0.1,
        mask_same_class: bool = False,
        form: str = "info_nce",
        stop_gradient: bool = False,
        max_timestep: int | None = None,
        subtract_condition: bool = False,
        num_classes: int | None = None,
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form}.")
        only_with_positives = {
            "mask_same_class": mask_same_class,
            "stop_gradient": stop_gradient,
            "max_timestep": max_timestep is not None,
            "subtract_condition": subtract_condition,
        }
        for name, is_on in only_with_positives.items():
            if is_on and form == "dispersive":
                raise ValueError(f"`{name}` is about positive pairs, which the dispersive form does not have.")
        self.stages = list(range(1, len(hidden_sizes))) if stages is None else stages
        self.heads, self.guesses = nn.ModuleDict(), nn.ModuleDict()
        for index in sorted({*self.stages, *(stage - 1 for stage in self.stages)}) if form == "info_nce" else ():
            size = hidden_sizes[index]
            self.heads[str(index)] = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, embedding_size))
            if subtract_condition:
                self.guesses[str(index)] = ConditionGuess(num_classes, size)
        self.temperature = temperature
        self.mask_same_class = mask_same_class
        self.form = form
        self.stop_gradient = stop_gradient
        self.max_timestep = max_timestep

    def forward(
        self,
        features: dict[int, torch.Tensor],
        class_labels: torch.Tensor,
        timesteps: dict[int, torch.Tensor] | None = None,
        given_labels: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            features (`dict[int, torch.Tensor]` of shapes `(B_s, L_s, D_s)`):
                By stage, at least for those with a head. Row `i` is the same image in every stage; a stage may have
                fewer rows.
            class_labels (`torch.Tensor` of shape `(B,)`): Labels of the rows, for `mask_same_class`.
            timesteps (`dict[int, torch.Tensor]` of shapes `(B,)`, *optional*):
                By stage; for `max_timestep` and `subtract_condition`.
            given_labels (`dict[int, torch.Tensor]` of shapes `(B,)`, *optional*):
                The labels that the stages were given, some of them null; for `subtract_condition`.

        Returns:
            `torch.Tensor` of shape `(len(stages),)`: The loss of each pair. With `subtract_condition`, their gradient
            also fits the guesses.
        """
        if self.form == "dispersive":
            return torch.stack(
                [(self._disperse(features[s - 1]) + self._disperse(features[s])) / 2 for s in self.stages]
            )
        pooled = {int(stage): features[int(stage)].mean(dim=1) for stage in self.heads}  # (B_s, D_s)
        guess_error = 0.0
        for stage, guess in self.guesses.items():
            index, count = int(stage), len(pooled[int(stage)])
            guessed = guess(timesteps[index][:count], given_labels[index][:count])  # (B_s, D_s)
            guess_error = guess_error + F.mse_loss(guessed, pooled[index].detach().float())
            pooled[index] = pooled[index] - guessed.detach()
        losses = []
        for stage in self.stages:
            shared = min(len(pooled[stage - 1]), len(pooled[stage]))
            lower = pooled[stage - 1].detach() if self.stop_gradient else pooled[stage - 1]
            lower, higher = (
                self._embed(stage - 1, lower[:shared]),
                self._embed(stage, pooled[stage][:shared]),
            )  # (B, E)
            labels, counted = class_labels[:shared], None
            if self.max_timestep is not None:
                counted = torch.maximum(timesteps[stage - 1], timesteps[stage])[:shared] < self.max_timestep  # (B,)
            if self.training:
                lower, higher, labels = gather_rows(lower), gather_rows(higher), gather_rows(labels)
                counted = None if counted is None else gather_rows(counted)
            labels = labels if self.mask_same_class else None
            losses.append(info_nce(lower, higher, self.temperature, labels, counted))
        losses = torch.stack(losses)
        return losses + (guess_error - guess_error.detach()) if self.guesses else losses

    def _embed(self, stage: int, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.heads[str(stage)](pooled).float(), dim=-1)  # (B, E)

    def _disperse(self, features: torch.Tensor) -> torch.Tensor:
        return dispersive_loss(gather_rows(features) if self.training else features, self.temperature)


class ConditionGuess(nn.Module):
    """What timesteps and labels alone, each (B,), say about pooled features: (B, hidden_size), float32."""

    def __init__(self, num_classes: int, hidden_size: int, frequencies: int = 64):
        super().__init__()
        self.time_embedding = TimestepEmbedding(frequencies, hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)  # the null label last
        self.proj_out = nn.Linear(hidden_size, hidden_size)
        self.frequencies = frequencies

    def forward(self, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sinusoids = get_timestep_embedding(timesteps, self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        hidden = self.time_embedding(sinusoids) + self.class_embedding(labels)  # (B, D)
        return self.proj_out(F.silu(hidden)).float()


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
