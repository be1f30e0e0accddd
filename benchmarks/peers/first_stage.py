"""What peers share with a first stage of PIS-DM."""

from __future__ import annotations

import torch


def check_first_stage(low_res: torch.Tensor | None, noise_level: torch.Tensor | None) -> None:
    """Raises ValueError if a peer is given arguments for a higher stage of PIS-DM."""
    if low_res is not None or noise_level is not None:
        raise ValueError("Peers are first stages: they take neither `low_res` nor `noise_level`.")
