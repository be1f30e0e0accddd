"""A DiT pipeline of diffusers, small enough for a test."""

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests.models.tiny_vae import make_kl


def make_dit() -> DiTPipeline:
    """Draws 16x16 pixels. Its transformer has 1000 classes: the pipeline takes 1000 for the null class."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )
    pipe = DiTPipeline(transformer.eval(), make_kl(latent_channels=4).eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe
