"""Latents of every kind of autoencoder: there and back, and through a cascade."""

import pytest
import torch

from diffusers_pisdm.models.latents import decode_latents, encode_latents, encode_moments, load_vae, vae_scale_factor
from tests.models.tiny_vae import KINDS, make_dc, make_kl
from tests.pipelines.tiny_cascade import generators, make_cascade


@pytest.fixture(params=KINDS)
def make_vae(request):
    return KINDS[request.param]


def make_images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_scale_factor(make_vae):
    vae = make_vae()
    factor = vae_scale_factor(vae)
    assert factor == 4
    latents = encode_latents(vae, make_images())
    assert latents.shape == (2, 4, 32 // factor, 32 // factor)
    assert decode_latents(vae, latents).shape == (2, 3, 32, 32)


def test_pixel_space():
    images = make_images()
    assert vae_scale_factor(None) == 1
    assert encode_latents(None, images) is images
    assert decode_latents(None, images) is images


@torch.no_grad()
def test_scaling_is_undone(make_vae):
    """Whatever the factors, decoding gets the autoencoder's own latents back, and training and sampling agree."""
    torch.manual_seed(0)
    plain = make_vae(scaling_factor=1.0)
    config = {"scaling_factor": 0.25} if make_vae is make_dc else {"scaling_factor": 0.25, "shift_factor": 0.5}
    scaled = make_vae(**config)
    scaled.load_state_dict(plain.state_dict())
    own = encode_latents(plain, make_images(), generator=torch.Generator().manual_seed(1))
    latents = encode_latents(scaled, make_images(), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(latents, (own - config.get("shift_factor", 0.0)) * 0.25)
    torch.testing.assert_close(decode_latents(scaled, latents), plain.decode(own).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_posterior_is_sampled_from_the_generators():
    vae = make_kl()
    images = make_images()[:1].expand(2, -1, -1, -1)
    latents = encode_latents(vae, images, generator=generators(0, 1))
    assert (latents[0] - latents[1]).abs().max() > 0.01
    torch.testing.assert_close(encode_latents(vae, images, generator=generators(0, 1)), latents)


@torch.no_grad()
def test_moments_are_those_of_the_latents(make_vae):
    """The latents are the mean where they are not drawn; else their mean and spread over many draws."""
    vae = make_vae(scaling_factor=0.25)
    images = make_images()[:1, :, :16, :16]
    mean, std = encode_moments(vae, images)
    if make_vae is not make_kl:
        assert std is None and torch.equal(encode_latents(vae, images), mean)
        return
    draws = encode_latents(vae, images.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    assert ((draws.mean(0) - mean[0]) / std[0]).abs().max() < 6 / 200**0.5
    torch.testing.assert_close(draws.std(0), std[0], rtol=0.35, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_and_images_are_float32(make_vae, dtype):
    vae = make_vae().to(dtype)
    latents = encode_latents(vae, make_images())
    assert latents.dtype == decode_latents(vae, latents).dtype == torch.float32


def test_cascade_in_latent_space(make_vae, capsys):
    vae = make_vae()
    pipe = make_cascade(2, in_channels=4, vae=vae)
    pipe.set_progress_bar_config()
    arguments = {"num_inference_steps": 2, "output_stages": True}
    images = pipe([1, 2], output_type="pt", generator=generators(0, 1), **arguments)
    latents = pipe([1, 2], output_type="latent", generator=generators(0, 1), **arguments)
    assert [stage.shape for stage in images.stage_images] == [(2, 3, 32, 32), (2, 3, 64, 64)]
    assert [stage.shape for stage in latents.stage_images] == [(2, 4, 8, 8), (2, 4, 16, 16)]
    for image, latent in zip(images.stage_images, latents.stage_images):
        with torch.no_grad():
            decoded = vae.decode(latent / vae.config.scaling_factor).sample
        torch.testing.assert_close(image, (decoded / 2 + 0.5).clamp(0, 1))
    assert pipe.get_stage_sizes(height=128) == [(16, 8), (32, 16)]
    bars = capsys.readouterr().err  # in pixels
    assert "stage 1/2 (32x32)" in bars and "stage 2/2 (64x64)" in bars


def test_cascade_with_its_autoencoder_is_saved(make_vae, tmp_path):
    pipe = make_cascade(1, in_channels=4, vae=make_vae())
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.vae) is type(pipe.vae)
    loaded.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    images = [p([1], generator=generators(0), **arguments).images for p in (pipe, loaded)]
    assert torch.equal(*images)


def make_overflowing_kl(scale, **config):
    """Activations, and with a larger `scale` weights, beyond float16, which norms hide from the images."""
    torch.manual_seed(0)
    vae = make_kl(latent_channels=4, **config)
    with torch.no_grad():
        vae.decoder.conv_in.weight *= scale
        vae.encoder.conv_in.weight *= scale
    return vae.eval()


@torch.no_grad()
def test_an_autoencoder_that_is_too_wide_for_half_precision_runs_in_single():
    vae, half = make_overflowing_kl(1e5), make_overflowing_kl(1e5).half()
    latents, images = torch.randn(2, 4, 4, 4), make_images()
    weights = half.decoder.conv_in.weight.clone()
    torch.testing.assert_close(decode_latents(half, latents), decode_latents(vae, latents), rtol=0, atol=2e-2)
    for found, wanted in zip(encode_moments(half, images), encode_moments(vae, images)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2)
    assert half.dtype == torch.float16 and torch.equal(half.decoder.conv_in.weight, weights)
    with pytest.raises(RuntimeError):
        decode_latents(half, torch.randn(1, 3, 4, 4))
    assert half.dtype == torch.float16
    assert not decode_latents(make_overflowing_kl(1e5, force_upcast=False).half(), latents).isfinite().all()


@pytest.mark.parametrize(("scale", "force_upcast"), [(1e6, True), (1.0, True), (1.0, False)])
def test_an_autoencoder_that_is_too_wide_for_half_precision_is_loaded_in_single(tmp_path, scale, force_upcast):
    vae = make_overflowing_kl(scale, force_upcast=force_upcast)
    pipe = make_cascade(1, in_channels=4, vae=vae)
    pipe.save_pretrained(tmp_path)
    wanted = torch.float32 if scale > 1 else torch.float16
    assert load_vae(str(tmp_path / "vae"), 4, torch.float16).dtype == wanted
    for name in ("dtype", "torch_dtype"):
        half = type(pipe).from_pretrained(tmp_path, **{name: torch.float16})
        assert (half.transformer.dtype, half.vae.dtype) == (torch.float16, wanted)
    half.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    images = [p([1], generator=generators(0), **arguments).images for p in (half, pipe)]
    assert abs(images[0] - images[1]).mean() < 0.02
    given = type(pipe).from_pretrained(tmp_path, dtype=torch.float16, vae=vae)
    assert given.vae is vae and vae.dtype == torch.float32


@pytest.mark.parametrize("scale", [float("nan"), 1e6])
def test_an_autoencoder_whose_weights_are_not_finite_is_named(tmp_path, scale):
    make_overflowing_kl(scale, force_upcast=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"conv_in\.weight` of the autoencoder {tmp_path} holds NaN or infinite"):
        load_vae(str(tmp_path), 4, torch.float16)


def test_cascade_in_half_precision_with_an_autoencoder(make_vae):
    pipe = make_cascade(1, in_channels=4, vae=make_vae()).to(torch.bfloat16)
    images = pipe([1], num_inference_steps=2, output_type="pt").images
    assert images.dtype == torch.float32
    assert images.isfinite().all()
