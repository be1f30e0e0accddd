"""diffusers' DiT, called like a first stage of PIS-DM."""

from __future__ import annotations

import torch
import torch.nn as nn
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from diffusers_pisdm.models.transformer_pisdm import PISDMTransformer2DModelOutput

from .first_stage import check_first_stage


class DiTPeer(ModelMixin, ConfigMixin):
    """
    diffusers' `DiTTransformer2DModel` ("Scalable Diffusion Models with Transformers", Peebles and Xie 2023); by
    default DiT-XL.

    diffusers gives every block its own timestep and class embeddings (`num_embeds_ada_norm` is the number of classes
    in each), a tenth of a block's parameters, which are equal in all blocks of a converted checkpoint. Here all blocks
    share those of the first, as in the paper, so the number of parameters is DiT's (675M for DiT-XL/2). The initial
    weights are also DiT's (adaLN-Zero: a block starts as the identity). As for PIS-DM, the training objective drops
    labels, not the model.

    Build one per image size: positions are a parameter-free table for `sample_size`, which diffusers recomputes in
    every pass at any other size.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        hidden_size: int = 1152,
        num_heads: int = 16,
        num_classes: int = 1000,
    ):
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be divisible by `num_heads` ({num_heads}).")
        self.model = DiTTransformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            num_attention_heads=num_heads,
            attention_head_dim=hidden_size // num_heads,
            num_embeds_ada_norm=num_classes,
        )
        shared = self.transformer_blocks[0].norm1.emb
        shared.class_embedder.dropout_prob = 0.0
        for block in self.transformer_blocks[1:]:
            block.norm1.emb = shared
        self._initialize_weights()

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        return self.model.transformer_blocks

    def _initialize_weights(self) -> None:
        # The paper's initial weights: diffusers keeps torch's defaults, as its DiT is not meant for training.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.model.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        nn.init.zeros_(patches.bias)
        embeddings = self.transformer_blocks[0].norm1.emb
        for weight in (
            embeddings.class_embedder.embedding_table.weight,
            embeddings.timestep_embedder.linear_1.weight,
            embeddings.timestep_embedder.linear_2.weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for linear in (*(block.norm1.linear for block in self.transformer_blocks), self.model.proj_out_1):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.model.proj_out_2.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        low_res: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PISDMTransformer2DModelOutput | tuple[torch.Tensor, None]:
        """Like a first stage of `PISDMTransformer2DModel`, but only for squares; returns no features."""
        check_first_stage(low_res, noise_level)
        height, width = hidden_states.shape[2:]
        if height != width:
            raise ValueError(f"diffusers' DiT only takes squares, but the input is {height} x {width}.")
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))  # (B,)
        sample = self.model(hidden_states, timestep, class_labels, return_dict=False)[0]  # (B, C, S, S)
        if not return_dict:
            return (sample, None)
        return PISDMTransformer2DModelOutput(sample=sample)
