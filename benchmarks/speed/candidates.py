"""The models compared: PIS-DM and its peers with equal parameters, built whole or as a stack of a few layers."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from diffusers.models.modeling_utils import ModelMixin

from benchmarks.peers import HEAD_SIZE, PEERS, DiTPeer, equal_parameters
from diffusers_pisdm import DiMTransformer2DModel, PISDMTransformer2DModel
from diffusers_pisdm.ops.common.backends import force_backends


VAE_FACTOR = 8  # pixels per latent pixel of Stable Diffusion's VAE
PATCH_SIZE = 2
PISDM = "PIS-DM"


def num_tokens(image_size: int) -> int:
    """The number of patches in a square image's latent."""
    return (image_size // (VAE_FACTOR * PATCH_SIZE)) ** 2


def parse_image_size(text: str) -> int:
    """Parses the side of an image that consists of whole patches."""
    unit = VAE_FACTOR * PATCH_SIZE
    if not text.isdecimal() or int(text) == 0 or int(text) % unit != 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive multiple of {unit} pixels")
    return int(text)


@dataclass(frozen=True)
class Candidate:
    """One of the models compared."""

    name: str
    model_class: type[ModelMixin]
    config: dict  # arguments of the whole model
    parameters: int  # of the whole model
    has_long_skips: bool  # whether outputs of the first half of the layers are kept for the second

    @property
    def num_layers(self) -> int:
        """The depth of the whole model."""
        return self.config["num_layers"]

    def build(self, image_size: int, num_layers: int | None = None, dtype: torch.dtype = torch.float32) -> ModelMixin:
        """The model for images of `image_size` pixels with random weights, whole or as `num_layers` layers."""
        config = {**self.config, "num_layers": num_layers or self.num_layers}
        # DiT's positions are a parameter-free table for one size; the others' fit every size.
        if self.model_class is DiTPeer:
            config["sample_size"] = image_size // VAE_FACTOR
        return cast_model(self.model_class(**config).eval(), dtype)

    def missing_skip_bytes(self, num_layers: int, batch_size: int, image_size: int, dtype: torch.dtype) -> int:
        """
        The memory that the whole model needs at its middle layer beyond a stack of `num_layers`: the outputs of more
        layers. Accurate to within a token tensor or two, as a stack may peak at another moment.
        """
        if not self.has_long_skips:
            return 0
        missing = (self.num_layers + 1) // 2 - (num_layers + 1) // 2
        tokens, itemsize = num_tokens(image_size), dtype.itemsize
        if self.model_class is DiMTransformer2DModel:  # its padding makes the grid larger; its stream has float32
            tokens, itemsize = (math.isqrt(tokens) + 3) ** 2 + 5, torch.float32.itemsize
        return missing * batch_size * tokens * self.config["hidden_size"] * itemsize


def cast_model(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """Casts like `from_pretrained` with `torch_dtype`: all parameters except those that the model keeps in float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def make_candidates(pisdm_config: dict, peers: Iterable[str] = PEERS) -> list[Candidate]:
    """PIS-DM, followed by peers with its width and number of parameters."""
    pisdm_config = {**pisdm_config, "patch_size": PATCH_SIZE}
    equals = {name: equal_parameters(pisdm_config, name) for name in peers}
    parameters = next(iter(equals.values())).pisdm_parameters
    candidates = [Candidate(PISDM, PISDMTransformer2DModel, pisdm_config, parameters, has_long_skips=True)]
    for name, peer in equals.items():
        has_long_skips = PEERS[name] is not DiTPeer
        candidates.append(Candidate(name, PEERS[name], peer.config, peer.parameters, has_long_skips))
    return candidates


def make_inputs(
    batch_size: int, image_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of every candidate: noise for latents of `image_size` pixels, a timestep and a class."""
    side = image_size // VAE_FACTOR
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, 4, side, side, generator=generator).to(device, dtype)  # (B, 4, S, S)
    timestep = torch.full((batch_size,), 500, device=device)
    return latents, timestep, torch.zeros(batch_size, dtype=torch.long, device=device)


SMALL_CONFIG = {"num_layers": 16, "hidden_size": 128, "num_classes": 10}  # PIS-DM's eight directions twice
SMALL_IMAGE = 64  # pixels: 16 tokens
TOLERANCE = 1e-4  # of the largest value


def check_candidates(candidates: list[Candidate], device: torch.device) -> dict[str, float]:
    """
    Compares a narrow version of every candidate, in float32 with the device's kernels, to float64 on the CPU, where
    PIS-DM scans with the textbook loop: the largest errors as shares of the largest value. Raises RuntimeError above
    `TOLERANCE`.
    """
    errors = {}
    for candidate in candidates:
        small = {**candidate.config, **SMALL_CONFIG}
        if "num_heads" in small:
            small["num_heads"] = SMALL_CONFIG["hidden_size"] // HEAD_SIZE
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = replace(candidate, config=small).build(SMALL_IMAGE)
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))  # parameters that start at zero would hide errors
        inputs = make_inputs(2, SMALL_IMAGE, torch.device("cpu"), torch.float64)
        with torch.no_grad(), force_backends(selective_scan="reference", causal_conv="torch"):
            wanted = copy.deepcopy(model).double()(*inputs, return_dict=False)[0]  # (B, C, H, W)
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # cuDNN's convolutions round by default
            inputs = make_inputs(2, SMALL_IMAGE, device, torch.float32)
            sample = model.to(device)(*inputs, return_dict=False)[0].double().cpu()  # (B, C, H, W)
        errors[candidate.name] = ((sample - wanted).abs().max() / wanted.abs().max()).item()
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]  # NaN is also wrong
    if wrong:
        raise RuntimeError(
            f"{', '.join(wrong)} differ from float64 by more than {TOLERANCE} of the largest value: {errors}."
            + (" Run the tests of diffusers_pisdm.ops to find the faulty kernel." if PISDM in wrong else "")
        )
    return errors
