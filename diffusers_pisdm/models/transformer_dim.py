"""
DiM, the class-conditional Mamba backbone that PIS-DM builds on: *DiM: Diffusion Mamba for Efficient High-Resolution
Image Synthesis* (Teng et al., 2024), as released. `pisdm convert-dim` converts its checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin

from ..ops.cached_table import cached_table
from ..ops.scan_paths import SCAN_DIRECTIONS, move_tokens, scan_transitions
from .adapter_saving import AdapterSavingMixin
from .strict_loading import StrictLoadingMixin
from .transformer_pisdm import (
    TIME_FREQUENCIES,
    PISDMMambaMixer,
    PISDMTransformer2DModelOutput,
    at_least_float32,
    check_input,
    check_sizes,
    look_up,
    mix_embeddings,
)


# Keyword arguments of DiMTransformer2DModel. Weights of H were released for latents of 32 and 64 pixels a side.
DIM_SIZES = {
    "S": {"num_layers": 25, "hidden_size": 512},
    "L": {"num_layers": 49, "hidden_size": 1024},
    "H": {"num_layers": 49, "hidden_size": 1536},
}

PADDINGS = ("lateral", "raster")
NUM_CONDITION_TOKENS = 2  # timestep and class


@cached_table(maxsize=32)
def padded_grid(
    height: int, width: int, num_padding_tokens: int, padding: str, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """
    Where the tokens of a padded grid come from: indices ((height + P) * (width + P),) in raster order into
    `[image tokens in raster order, P padding tokens]`, P columns being added on the right and P rows below.

    Args:
        padding (`str`):
            `"lateral"`: each added column holds one padding token, and each added row one, corner included;
            `"raster"`: the added cells, in raster order, hold the padding tokens in turn.
    """
    rows = torch.arange(height + num_padding_tokens, device=device)[:, None]  # (h + P, 1)
    columns = torch.arange(width + num_padding_tokens, device=device)[None]  # (1, w + P)
    is_image = (rows < height) & (columns < width)  # (h + P, w + P)
    if padding == "lateral":
        pads = torch.where(rows < height, columns - width, rows - height)  # (h + P, w + P)
    else:
        pads = ((~is_image).flatten().cumsum(0).view_as(is_image) - 1) % num_padding_tokens  # (h + P, w + P)
    return torch.where(is_image, rows * width + columns, height * width + pads).flatten()  # ((h + P)(w + P),)


class DiMBlock(nn.Module):
    """
    One layer: modulated norm, Mamba mixer, gated residual. The residual stream has at least float32; the mixer
    computes in the precision of the modulation.
    """

    def __init__(self, hidden_size: int, state_size: int, conv_kernel: int, expand: int, time_step_rank: int):
        super().__init__()
        self.norm = DiMRMSNorm(hidden_size)
        self.mixer = PISDMMambaMixer(hidden_size, state_size, conv_kernel, expand, time_step_rank)
        self.scale_shift_table = nn.Parameter(torch.zeros(3, hidden_size))

    def forward(self, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        modulated = modulation.to(hidden_states.dtype) + self.scale_shift_table  # (B, 3, D)
        shift, scale, gate = modulated.chunk(3, dim=1)  # (B, 1, D) each
        normed = torch.addcmul(shift, self.norm(hidden_states), 1 + scale)  # (B, L, D)
        mixed = self.mixer(normed.to(modulation.dtype))  # (B, L, D)
        return torch.addcmul(hidden_states, 1 + gate, mixed)  # (B, L, D)


class DiMRMSNorm(nn.RMSNorm):
    """Computes in the precision of its input, whatever its weight is stored in."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, eps=1e-5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


class DiMSmoother(nn.Conv2d):
    """A 3x3 depthwise convolution over the token grid; unlike PIS-DM's local enhancement, it is not residual."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, D, h, w)
        return super().forward(grid).flatten(2).transpose(1, 2)  # (B, hw, D)


class DiMTransformer2DModel(StrictLoadingMixin, AdapterSavingMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    DiM's Mamba backbone as released: it predicts the noise of a class-conditional image or latent, and can be the
    first stage of a [`PISDMCascadePipeline`]. The defaults are Huge/2 at 256 pixels.

    It differs from [`PISDMTransformer2DModel`] in its learned positions, RMS norms, a second class table for the class
    token, non-residual convolutions, long skips between neighbouring depths, and padding tokens that are cells of a
    larger grid.

    Args:
        sample_size (`int`, defaults to 32):
            Height and width in (latent) pixels the model is trained on. Inputs of any other size, rectangles included,
            also work; the learned positions are resized.
        patch_size (`int`, defaults to 2): Side in pixels of the square patch that becomes a token.
        in_channels (`int`, defaults to 4): Channels of the noisy input.
        out_channels (`int`, *optional*): Channels of the output, `in_channels` if not given.
        num_layers (`int`, defaults to 49): Mamba layers.
        hidden_size (`int`, defaults to 1536): Width of a token, even.
        state_size (`int`, defaults to 16): States of the scan per channel.
        conv_kernel (`int`, defaults to 3): Length of the causal convolution.
        expand (`int`, defaults to 2): Inner width of a layer as a multiple of `hidden_size`.
        time_step_rank (`int`, *optional*): Rank of the step size projection; `ceil(hidden_size / 16)` if not given.
        num_classes (`int`, defaults to 1000):
            Labels are `0..num_classes - 1`; `num_classes` is the null label of classifier-free guidance.
        num_padding_tokens (`int`, defaults to 3): Columns and rows that are added to the grid of tokens, at least 1.
        padding (`str`, defaults to `"lateral"`): How they are filled: `"lateral"` (the weights for 256 pixels) or
            `"raster"` (those for 512); see [`padded_grid`].

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    class_tables = ("class_embedding", "class_token_embedding")

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiMBlock"]
    _repeated_blocks = ["DiMBlock"]
    _keep_in_fp32_modules = ["A_log", "D", "dt_bias"]
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "class_embedding",
        "class_token_embedding",
        "norm",
        "modulation",
        "proj_out",
        "smoother",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 49,
        hidden_size: int = 1536,
        state_size: int = 16,
        conv_kernel: int = 3,
        expand: int = 2,
        time_step_rank: int | None = None,
        num_classes: int = 1000,
        num_padding_tokens: int = 3,
        padding: str = "lateral",
    ):
        super().__init__()
        check_sizes(self.config)
        if hidden_size % 2 != 0:
            raise ValueError(f"`hidden_size` must be even for the timestep's sinusoids, got {hidden_size}.")
        if sample_size % patch_size != 0:
            raise ValueError(f"`sample_size` ({sample_size}) must be divisible by `patch_size` ({patch_size}).")
        if num_padding_tokens < 1:
            raise ValueError(f"`num_padding_tokens` must be at least 1, got {num_padding_tokens}.")
        if padding not in PADDINGS:
            raise ValueError(f"`padding` must be one of {', '.join(PADDINGS)}, got {padding!r}.")
        time_step_rank = time_step_rank or math.ceil(hidden_size / 16)
        num_outputs = out_channels or in_channels
        num_patches = (sample_size // patch_size) ** 2
        # DiM's four directions; each layer of the second half scans like its mirror image in the first.
        directions = SCAN_DIRECTIONS[:4]
        self.layer_directions = tuple(directions[min(i, num_layers - 1 - i) % 4] for i in range(num_layers))

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, NUM_CONDITION_TOKENS + num_patches, hidden_size) * 0.02)
        self.first_smoother = DiMSmoother(hidden_size)
        self.padding_tokens = nn.Parameter(torch.randn(num_padding_tokens, hidden_size) * 0.02)
        self.prefix_padding_tokens = nn.Parameter(torch.randn(num_padding_tokens, hidden_size) * 0.02)

        self.time_proj = Timesteps(TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_token_proj = Timesteps(hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_FREQUENCIES, hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.class_token_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)

        self.transformer_blocks = nn.ModuleList(
            DiMBlock(hidden_size, state_size, conv_kernel, expand, time_step_rank) for _ in range(num_layers)
        )
        # From the layer after the middle one on: layer i merges in the stream after layer num_layers - i.
        self.first_skip = num_layers // 2 + 1
        self.skip_projections = nn.ModuleList(
            nn.Linear(2 * hidden_size, hidden_size) for _ in range(self.first_skip, num_layers)
        )

        self.last_smoother = DiMSmoother(hidden_size)
        self.norm_out = DiMRMSNorm(hidden_size)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * num_outputs)

        self._initialize_weights()
        self.gradient_checkpointing = False

    def _initialize_weights(self) -> None:
        # The release holds no recipe that its weights tell; this is PIS-DM's, for a fair baseline.
        for embedding in (self.class_embedding, self.class_token_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.proj_out.weight, std=0.02)
        nn.init.zeros_(self.proj_out.bias)
        for linear in (self.modulation, self.modulation_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for conv in (self.first_smoother, self.last_smoother):  # initially the identity
            nn.init.dirac_(conv.weight, groups=conv.groups)
            nn.init.zeros_(conv.bias)
        with torch.no_grad():
            for skip in self.skip_projections:  # starts closed: [identity | 0]
                skip.weight.copy_(torch.eye(*skip.weight.shape))
                skip.bias.zero_()
            # Residual branches add up over the layers: scaling them down preserves the variance (Mamba, GPT-2).
            for block in self.transformer_blocks:
                block.mixer.out_proj.weight /= math.sqrt(len(self.transformer_blocks))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | int | float,
        class_labels: torch.Tensor,
        low_res: None = None,
        noise_level: None = None,
        return_dict: bool = True,
        class_weights: torch.Tensor | None = None,
    ) -> PISDMTransformer2DModelOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                The noisy image or latent; `H` and `W` divisible by `patch_size`.
            timestep (`torch.Tensor` of shape `(B,)` or a scalar):
                Diffusion timestep as diffusers counts, from 0 (DiM's own is one more), embedded in float32.
            class_labels (`torch.Tensor` of shape `(B,)`, int64): In `0..num_classes`; `num_classes` means no class.
            low_res, noise_level (`None`): For the signature of a cascade's stages: DiM has no condition.
            return_dict (`bool`, defaults to `True`): Whether to return a [`PISDMTransformer2DModelOutput`].
            class_weights (`torch.Tensor` of shape `(B, K)`, *optional*):
                Makes each image a mix of K classes: their shares, for `class_labels` of shape `(B, K)`.

        Returns:
            [`PISDMTransformer2DModelOutput`], or the tuple `(sample, features)`: the predicted noise
            `(B, out_channels, H, W)`, and the image tokens after the last layer, `(B, H/p * W/p, hidden_size)`.

        Raises:
            ValueError: The size is not divisible by the patch size, a label is unknown, or a condition is given.
        """
        patch_size = self.config.patch_size
        rows, columns = check_input(self.config, hidden_states)
        if low_res is not None or noise_level is not None:
            raise ValueError("DiM is a first stage: it takes neither `low_res` nor `noise_level`.")
        dtype = hidden_states.dtype

        # 1. Conditioning
        noise_levels = self._noise_levels(timestep, hidden_states)  # (B,)
        embedded = self.time_embedding(self.time_proj(noise_levels).to(dtype))  # (B, D)
        class_embedding = look_up(self.class_embedding, class_labels, self.config.num_classes)  # (B, D) or (B, K, D)
        class_embedding = mix_embeddings(class_embedding, class_weights)  # (B, D)
        embedded = embedded + class_embedding.to(dtype)  # (B, D)
        modulation = self.modulation(F.silu(embedded)).unflatten(1, (3, -1))  # (B, 3, D)
        time_token = self.time_token_proj(noise_levels).to(dtype)  # (B, D)
        class_token = mix_embeddings(self.class_token_embedding(class_labels), class_weights).to(dtype)  # (B, D)

        # 2. Tokens: timestep, class, P padding tokens, the padded grid in raster order
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, hw, D)
        prefix_positions, positions = self._positions(rows, columns)  # (1, 2, D), (1, hw, D)
        tokens = self.first_smoother(tokens + positions.to(dtype), rows, columns)  # (B, hw, D)
        prefix = torch.stack([time_token, class_token], dim=1) + prefix_positions.to(dtype)  # (B, 2, D)
        num_pads = self.config.num_padding_tokens
        pads, prefix_pads = (
            parameter.to(dtype).expand(tokens.shape[0], -1, -1)  # (B, P, D)
            for parameter in (self.padding_tokens, self.prefix_padding_tokens)
        )
        grid = padded_grid(rows, columns, num_pads, self.config.padding, device=tokens.device)  # ((h + P)(w + P),)
        grid = torch.cat([tokens, pads], dim=1).index_select(1, grid)  # (B, (h + P)(w + P), D)
        sequence = torch.cat([prefix, prefix_pads, grid], dim=1)  # (B, L, D)
        hidden_states = at_least_float32(sequence)

        # 3. Layers, each in its own scan order; a skip comes in the order of the layer before
        *moves, to_raster = scan_transitions(
            rows + num_pads,
            columns + num_pads,
            self.layer_directions,
            num_prefix_tokens=prefix.shape[1] + num_pads,
            device=hidden_states.device,
        )
        skips = []
        for i, (block, move) in enumerate(zip(self.transformer_blocks, moves)):
            if i >= self.first_skip:
                merged = torch.cat([hidden_states, skips.pop()], dim=-1).to(dtype)  # (B, L, 2D)
                merged = self.skip_projections[i - self.first_skip](merged)  # (B, L, D)
                hidden_states = merged.to(hidden_states.dtype)
            if move is not None:
                hidden_states = move_tokens(hidden_states, move)  # (B, L, D)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, modulation)
            else:
                hidden_states = block(hidden_states, modulation)  # (B, L, D)
            if 1 <= i <= len(self.skip_projections):
                skips.append(hidden_states)

        # 4. Output
        if to_raster is None:
            hidden_states = hidden_states[:, prefix.shape[1] + num_pads :]  # (B, (h + P)(w + P), D)
        else:
            hidden_states = move_tokens(hidden_states, to_raster)  # (B, (h + P)(w + P), D)
        hidden_states = hidden_states.unflatten(1, (rows + num_pads, columns + num_pads))
        features = hidden_states[:, :rows, :columns].flatten(1, 2)  # (B, hw, D)
        hidden_states = self.norm_out(self.last_smoother(features.to(dtype), rows, columns))  # (B, hw, D)
        modulation = self.modulation_out(F.silu(time_token + class_token))[:, None]  # (B, 1, 2D)
        shift, scale = modulation.chunk(2, dim=-1)  # (B, 1, D) each
        hidden_states = torch.addcmul(shift, hidden_states, 1 + scale)  # (B, hw, D)
        patches = self.proj_out(hidden_states).unflatten(2, (patch_size, patch_size, -1))  # (B, hw, p, p, C)
        patches = patches.unflatten(1, (rows, columns))  # (B, h, w, p, p, C)
        sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
        if not return_dict:
            return (sample, features)
        return PISDMTransformer2DModelOutput(sample=sample, features=features)

    def _noise_levels(self, timestep: torch.Tensor | int | float, hidden_states: torch.Tensor) -> torch.Tensor:
        # DiM counts from 1 to 1000.
        timestep = torch.as_tensor(timestep, device=hidden_states.device).float() + 1
        return timestep.expand(hidden_states.shape[0])  # (B,)

    def _positions(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The learned positions of the condition tokens and of a grid, resized if it is not the trained one."""
        prefix, image = self.position_embedding.tensor_split([NUM_CONDITION_TOKENS], dim=1)  # (1, 2, D), (1, hw, D)
        side = self.config.sample_size // self.config.patch_size
        if (rows, columns) != (side, side):
            grid = image.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
            image = F.interpolate(grid, (rows, columns), mode="bilinear").flatten(2).transpose(1, 2)  # (1, hw, D)
        return prefix, image
