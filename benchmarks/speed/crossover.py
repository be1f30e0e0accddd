"""The number of tokens from which one model is faster than another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.speed.candidates import PATCH_SIZE, VAE_FACTOR


@dataclass(frozen=True)
class Crossover:
    """Where a model becomes faster than a peer."""

    faster: str  # "from": from `tokens` on; "always": at all measured sizes; "never": not at the largest
    tokens: float | None = None  # where both times are equal

    @property
    def image_size(self) -> float | None:
        """Side in pixels of the square image with this many tokens."""
        return None if self.tokens is None else math.sqrt(self.tokens) * VAE_FACTOR * PATCH_SIZE

    def __str__(self) -> str:
        if self.faster == "from":
            return f"faster from {self.tokens:,.0f} tokens ({self.image_size:,.0f} px) on"
        return "faster at all sizes measured" if self.faster == "always" else "not faster at the largest size measured"


def find_crossover(tokens: list[int], seconds: list[float], peer_seconds: list[float]) -> Crossover:
    """
    The number of tokens from which a model is faster than a peer, up to the largest measured; the last such number if
    noise makes several. Between measurements, times are interpolated as powers of the number of tokens.
    """
    if not tokens or not len(tokens) == len(seconds) == len(peer_seconds):
        raise ValueError(
            f"Expected one time per number of tokens, got {len(tokens)} numbers of tokens, {len(seconds)} times and"
            f" {len(peer_seconds)} times of the peer."
        )
    if any(after <= before for before, after in zip(tokens, tokens[1:])):
        raise ValueError(f"`tokens` must be ascending, got {tokens}.")
    gains = [math.log(peer / own) for own, peer in zip(seconds, peer_seconds)]  # positive: the model is faster
    if gains[-1] <= 0:
        return Crossover("never")
    for i in range(len(gains) - 2, -1, -1):
        if gains[i] <= 0:
            share = -gains[i] / (gains[i + 1] - gains[i])
            return Crossover("from", tokens[i] * (tokens[i + 1] / tokens[i]) ** share)
    return Crossover("always")
