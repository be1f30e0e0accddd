"""U-ViT, the peer in the paper's table 5, implemented from its own paper."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin

from diffusers_pisdm.models.transformer_pisdm import PISDMTransformer2DModelOutput

from .first_stage import check_first_stage


NUM_PREFIX_TOKENS = 2  # timestep and class


class UViTAttention(nn.Module):
    """Full self-attention without biases on queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(hidden_states).unflatten(2, (3, self.num_heads, -1))  # (B, L, 3, heads, D/heads)
        # On a CPU, attention is a fifth faster if each head's rows are adjacent, more than the copy costs.
        query, key, value = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (B, heads, L, D/heads) each
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, L, D/heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, L, D)


class UViTBlock(nn.Module):
    """A pre-norm ViT block; in the second half of the layers, it first merges in a long skip."""

    def __init__(self, hidden_size: int, num_heads: int, has_skip: bool):
        super().__init__()
        self.skip_proj = nn.Linear(2 * hidden_size, hidden_size) if has_skip else None
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = UViTAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_proj is not None:
            hidden_states = self.skip_proj(torch.cat([hidden_states, skip], dim=-1))  # (B, L, D)
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))  # (B, L, D)
        return hidden_states + self.mlp(self.norm2(hidden_states))  # (B, L, D)


class UViT2DModel(ModelMixin, ConfigMixin):
    """
    U-ViT ("All are Worth Words: A ViT Backbone for Diffusion Models", Bao et al. 2023), by default U-ViT-H: timestep,
    class and patches are all tokens of a plain ViT, whose halves are joined by long skips, each concatenated and
    projected; a 3x3 convolution smooths the output. It is called like a first stage of PIS-DM.

    Differences from the paper: torch's `scaled_dot_product_attention`, no dropout, any number of layers (an even
    number has no middle layer), and position embeddings that are interpolated for sizes other than `sample_size`, so
    the number of parameters does not depend on the image.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 29,
        hidden_size: int = 1152,
        num_heads: int = 16,
        num_classes: int = 1000,
    ):
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be divisible by `num_heads` ({num_heads}).")
        if sample_size % patch_size != 0:
            raise ValueError(f"`sample_size` ({sample_size}) must be divisible by `patch_size` ({patch_size}).")
        num_tokens = NUM_PREFIX_TOKENS + (sample_size // patch_size) ** 2

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(1, num_tokens, hidden_size))
        num_skips = num_layers // 2
        self.transformer_blocks = nn.ModuleList(
            UViTBlock(hidden_size, num_heads, has_skip=i >= num_layers - num_skips) for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.conv_out = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        low_res: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PISDMTransformer2DModelOutput | tuple[torch.Tensor, None]:
        """Like a first stage of `PISDMTransformer2DModel`; returns no features."""
        check_first_stage(low_res, noise_level)
        patch_size, hidden_size = self.config.patch_size, self.config.hidden_size
        rows, columns = (length // patch_size for length in hidden_states.shape[2:])
        patches = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, hw, D)
        # The sinusoids are the time token: U-ViT has no time MLP by default.
        time_token = get_timestep_embedding(timestep, hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        prefix = torch.stack([time_token.to(patches.dtype), self.class_embedding(class_labels)], dim=1)  # (B, 2, D)
        tokens = torch.cat([prefix, patches], dim=1) + self._positions(rows, columns)  # (B, 2 + hw, D)

        num_skips = len(self.transformer_blocks) // 2
        skips = []
        for i, block in enumerate(self.transformer_blocks):
            tokens = block(tokens) if block.skip_proj is None else block(tokens, skips.pop())  # (B, 2 + hw, D)
            if i < num_skips:
                skips.append(tokens)

        patches = self.proj_out(self.norm_out(tokens))[:, NUM_PREFIX_TOKENS:]  # (B, hw, p*p*C)
        patches = patches.unflatten(1, (rows, columns)).unflatten(3, (patch_size, patch_size, -1))
        sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
        sample = self.conv_out(sample)  # (B, C, H, W)
        if not return_dict:
            return (sample, None)
        return PISDMTransformer2DModelOutput(sample=sample)

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        base = self.config.sample_size // self.config.patch_size
        if rows == columns == base:
            return self.position_embedding  # (1, 2 + hw, D)
        prefix, grid = self.position_embedding.split((NUM_PREFIX_TOKENS, base**2), dim=1)
        grid = grid.transpose(1, 2).unflatten(2, (base, base))  # (1, D, base, base)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)  # (1, D, h, w)
        return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, 2 + hw, D)
