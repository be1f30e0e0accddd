"""transformers' Mamba mixer without CUDA kernels: an independent implementation to compare with ours."""

from __future__ import annotations

import torch
import torch.nn as nn

from diffusers_pisdm.models.transformer_pisdm import PISDMMambaMixer


def slow_name(name: str) -> str:
    """transformers' name for a parameter of our mixer."""
    return "dt_proj.bias" if name == "dt_bias" else name


class SlowMixer(nn.Module):
    """transformers' `MambaMixer` without CUDA kernels, with the weights of one of our mixers."""

    def __init__(self, mixer: PISDMMambaMixer):
        super().__init__()
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        inner_size, state_size = mixer.A_log.shape
        config = MambaConfig(
            hidden_size=mixer.out_proj.out_features,
            state_size=state_size,
            conv_kernel=mixer.conv1d.kernel_size[0],
            expand=inner_size // mixer.out_proj.out_features,
            time_step_rank=mixer.dt_proj.in_features,
            num_hidden_layers=1,
            use_bias=False,
            use_conv_bias=True,
        )
        self.mixer = MambaMixer(config, layer_idx=0).to(mixer.D.dtype)
        self.mixer.load_state_dict({slow_name(name): value for name, value in mixer.state_dict().items()})

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # `forward` dispatches to CUDA kernels in transformers 4, and is the slow path in version 5.
        return getattr(self.mixer, "slow_forward", self.mixer)(hidden_states)  # (B, L, D)
