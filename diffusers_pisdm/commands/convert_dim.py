"""Converts a checkpoint of DiM, as its authors published it, to a pipeline's folder.

    pisdm convert-dim nnet_ema.pth --output_dir dim-huge-256 --vae stabilityai/sd-vae-ft-ema

Download `nnet_ema.pth` from the links in the README of https://github.com/tyshiwo1/DiM-DiffusionMamba. Sizes are read
from the weights. No licence is stated for these weights: whether you may use them is yours to check.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DPMSolverSinglestepScheduler

from .. import DIM_SIZES, DiMTransformer2DModel, PISDMCascadePipeline
from ..models.dim_conversion import PUBLISHED_PADDINGS, convert_dim_weights, dim_config, dim_names
from ..models.dim_file import EMA_NAME, read_weights
from ..models.latents import load_vae, vae_scale_factor
from ..models.transformer_dim import PADDINGS
from ..pipelines.saved_files import RIGHTS_KEY
from ..publishing.model_card import DIM_CARD
from ..utils.arguments import CommandParser, with_options
from ..utils.files import check_writable, save_in_place
from ..utils.messages import count_of


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RIGHTS = "no licence is stated by DiM's authors, https://github.com/tyshiwo1/DiM-DiffusionMamba"
NUM_STEPS = 50
STRENGTHS = {"lateral": 0.4, "raster": 0.7}  # DiM's guidance at 256 and 512 pixels, 0 being none
PIXELS_PER_LATENT = 8  # of DiM's autoencoder
SIZE_OF_OTHER_FILES = 1_000_000


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help=f"{EMA_NAME}, its folder, or its tensors as .safetensors.")
    add("--output_dir", type=Path, required=True, help="A new folder.")
    add("--vae", help="The autoencoder's folder or Hub name; DiM's is stabilityai/sd-vae-ft-ema (default: none).")
    add("--dtype", choices=DTYPES, default="float32", help="The precision on disk (default: float32).")
    add("--padding", choices=PADDINGS, help="The padding rule of weights for other sizes than the published ones.")
    return parser.parse_args(arguments)


def make_pipeline(
    weights: dict[str, torch.Tensor],
    config: dict[str, Any],
    dtype: torch.dtype,
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
) -> PISDMCascadePipeline:
    """The pipeline with DiM's settings; float32 weights stay mapped into memory."""
    with torch.device("meta"):
        transformer = DiMTransformer2DModel(**config)
    transformer.load_state_dict(convert_dim_weights(weights, config), assign=True)
    names, storages = dim_names(transformer), set()
    for name, weight in transformer.named_parameters():
        kept = name.split(".")[-1] in transformer._keep_in_fp32_modules
        converted = weight.data.to(torch.float32 if kept else dtype)
        if not converted.isfinite().all():
            theirs = " + ".join(f"`{their_name}`" for their_name in names[name])
            if weight.isfinite().all():
                raise ValueError(
                    f"{theirs} does not fit {dtype}. Pass --dtype bfloat16 or float32.".replace("torch.", "")
                )
            raise ValueError(f"{theirs} holds NaN or infinite weights. Download the file again.")
        storage = converted.untyped_storage().data_ptr()
        weight.data = (
            converted.clone() if storage in storages else converted.contiguous()
        )  # safetensors wants them apart
        storages.add(storage)
    transformer.register_to_config(**{RIGHTS_KEY: RIGHTS})
    return PISDMCascadePipeline(
        transformer,
        make_scheduler(),
        vae=vae,
        id2label=imagenet_classes() if config["num_classes"] == 1000 else None,
        default_guidance_scale=1 + STRENGTHS[config["padding"]],
        default_num_inference_steps=NUM_STEPS,
    )


def read_config(weights: dict[str, torch.Tensor], padding: str | None) -> dict[str, Any]:
    """The model's arguments; raises a ValueError if a pipeline could not draw with it."""
    config = dim_config(weights, padding)
    if config["out_channels"] is not None:
        raise ValueError(
            f"`proj_out_2.weight` makes {config['out_channels']} channels of {config['in_channels']}, as models do"
            " that also predict variances. DiM's published weights do not, and a pipeline cannot draw with these."
        )
    return config


def make_scheduler() -> DPMSolverSinglestepScheduler:
    """DiM's sampler: DPM-Solver++(3S), uniform in time, without a last step to the noise-free image."""
    scheduler = DPMSolverSinglestepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        solver_order=3,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="sigma_min",
    )
    scheduler.register_to_config(clip_sample=False)  # for those that take its place: latents have no bounds
    return scheduler


def imagenet_classes() -> list[str]:
    """The names of ImageNet's classes, by id."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def make_card(pipe: PISDMCascadePipeline, folder: str, in_file: int) -> str:
    config = pipe.transformer.config
    pixels = config.sample_size * (PIXELS_PER_LATENT if pipe.vae is None else vae_scale_factor(pipe.vae))
    text = DIM_CARD.read_text(encoding="utf-8")
    is_published = published_size(config)
    for part, stays in (("published", is_published), ("other", not is_published), ("no-vae", pipe.vae is None)):
        section = rf"<!-- {part}:begin -->\n\n(.*?)<!-- {part}:end -->\n+"
        text = re.sub(section, r"\1" if stays else "", text, flags=re.DOTALL)
    return text.format(
        folder=folder,
        layers=config.num_layers,
        pixels=pixels,
        parameters=pipe.transformer.num_parameters(),
        in_file=in_file,
        guidance=pipe.config.default_guidance_scale,
        strength=STRENGTHS[config.padding],
        label='"golden retriever"' if pipe.config.id2label else 0,
    )


def published_size(config: Mapping[str, Any]) -> bool:
    """Whether a model is of one of the two shapes whose weights were published."""
    shape = {**DIM_SIZES["H"], "in_channels": 4, "patch_size": 2, "num_classes": 1000}
    return config["sample_size"] in PUBLISHED_PADDINGS and all(config[name] == value for name, value in shape.items())


def check_output(folder: Path, needed: int) -> None:
    """Raises an OSError if a folder is not new, cannot be written, or is on a disk with fewer bytes than needed."""
    check_writable(folder, is_folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise OSError(f"{folder} exists and is not an empty folder. Choose a new --output_dir.")
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    usage = shutil.disk_usage(place)
    if usage.total == 0:
        raise OSError(f"Cannot write {folder}: {place} is not on a disk. Choose another --output_dir.")
    if usage.free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e6:,.1f} MB, but its disk has {usage.free / 1e6:,.1f} MB left. Free up space,"
            " choose another --output_dir, or halve the files with --dtype bfloat16."
        )


def load_autoencoder(name: str, channels: int) -> AutoencoderKL | AutoencoderTiny | AutoencoderDC:
    try:
        vae = load_vae(name, channels)
    except (OSError, ValueError) as error:
        raise ValueError(f"--vae: {error}") from error
    return vae


def convert(args: argparse.Namespace) -> str:
    """Writes the folder; returns what to tell of it. What may be wrong is looked at before what takes long."""
    check_output(args.output_dir, 0)
    weights, dtype = read_weights(args.checkpoint), DTYPES[args.dtype]
    config = read_config(weights, args.padding)
    vae = None if args.vae is None else load_autoencoder(args.vae, config["in_channels"])
    sizes = [weight.numel() * dtype.itemsize for weight in weights.values()]
    sizes += [weight.nbytes for weight in (() if vae is None else vae.parameters())]
    check_output(args.output_dir, sum(sizes) + SIZE_OF_OTHER_FILES)
    pipe = make_pipeline(weights, config, dtype, vae)
    in_file, added = sum(weight.numel() for weight in weights.values()), len(pipe.transformer.skip_projections)

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(make_card(pipe, args.output_dir.name, in_file), encoding="utf-8")

    save_in_place(write, args.output_dir)
    lines = [
        f"Wrote {args.output_dir}: DiM with {count_of(config['num_layers'], 'layer')} of width"
        f" {config['hidden_size']}, {pipe.transformer.num_parameters():,} parameters, for latents of"
        f" {config['sample_size']} x"
        f' {config["sample_size"]}. Load it with PISDMCascadePipeline.from_pretrained("{args.output_dir}")',
        f"The file has {in_file:,} parameters: it adds two biases in each of {count_of(added, 'long skip')}, which are"
        " one here.",
    ]
    if vae is None:
        lines.append(
            'It has no autoencoder, so it draws latents (output_type="latent"). For images, pass --vae here, or vae='
            " to from_pretrained."
        )
    lines.append("No licence is stated for DiM's weights: whether you may use or share them is yours to check.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        print(convert(args))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {with_options(error, args)}")


if __name__ == "__main__":
    main()
