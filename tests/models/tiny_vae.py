"""Autoencoders of every kind, of a few thousand random weights, that shrink images by 4."""

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny


def make_kl(**config) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        **config,
    )


def make_tiny(**config) -> AutoencoderTiny:
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), **config)


def make_dc(**config) -> AutoencoderDC:
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    layers = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
    scales = {"encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ())}
    types = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    return AutoencoderDC(latent_channels=4, **blocks, **widths, **layers, **scales, **types, **config)


KINDS = {"kl": make_kl, "tiny": make_tiny, "dc": make_dc}
