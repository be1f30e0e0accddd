"""Converts a checkpoint of DiM, as its authors published it, to a pipeline's folder.

    pisdm convert-dim nnet_ema.pth --output_dir dim-huge-256 --vae stabilityai/sd-vae-ft-ema

Download `nnet_ema.pth` from the links in the README of https://github.com/tyshiwo1/DiM-DiffusionMamba. Sizes are read
from the weights. No licence is stated for these weights: whether you may use them is yours to check.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from diffusers import DPMSolverSinglestepScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import DiMTransformer2DModel, PISDMCascadePipeline
from ..models.dim_conversion import convert_dim_weights, dim_config
from ..models.latents import load_vae
from ..models.strict_loading import check_finite_weights
from ..models.transformer_dim import PADDINGS
from ..publishing.hub import RIGHTS_KEY
from ..publishing.model_card import DIM_CARD
from ..utils.files import save_in_place


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMA_NAME, RAW_NAME = "nnet_ema.pth", "nnet.pth"
RIGHTS = "no licence is stated by DiM's authors, https://github.com/tyshiwo1/DiM-DiffusionMamba"
NUM_STEPS = 50
STRENGTHS = {"lateral": 0.4, "raster": 0.7}  # DiM's guidance at 256 and 512 pixels, 0 being none
PIXELS_PER_LATENT = 8


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help=f"{EMA_NAME}, its folder, or its tensors as .safetensors")
    add("--output_dir", type=Path, required=True, help="a new folder")
    add("--vae", help="the autoencoder's folder or Hub name; DiM's is stabilityai/sd-vae-ft-ema (default: none)")
    add("--dtype", choices=DTYPES, default="float32", help="the precision on disk (default: float32)")
    add("--padding", choices=PADDINGS, help="the padding rule of weights for other sizes than the published ones")
    return parser.parse_args(arguments)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """DiM's tensors by name, mapped into memory; raises a ValueError that says what a wrong file is."""
    if path.is_dir():
        path = path / EMA_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Pass DiM's {EMA_NAME}, or the folder that holds it.")
    if path.name == RAW_NAME:
        raise ValueError(
            f"{path} holds the raw weights of the last training step, which draw worse. Pass their average, {EMA_NAME}"
            " in the same folder; to convert the raw ones anyway, rename the file."
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a safetensors file, or not all of it: {error}. Download it again."
            ) from error
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            is_start_of_zip = file.read(2) == b"PK"
        if is_start_of_zip:
            size = path.stat().st_size
            raise ValueError(
                f"{path} is truncated at {size:,} bytes (the published files have 3.45 GB). Download it again."
            )
        raise ValueError(
            f"{path} was not saved by PyTorch. Is it a web page, such as Google Drive's warning, instead of the file?"
            " Download it again."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        unsafe = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or "what only code can make"
        raise ValueError(
            f"{path} holds more than tensors ({unsafe}) and could run code, so we do not read it. DiM's {EMA_NAME}"
            " holds tensors only: download it from its authors' links."
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]} Download it again.") from error
    if isinstance(content, dict) and "param_groups" in content:
        raise ValueError(f"{path} holds the optimizer's state, not weights. Pass {EMA_NAME} from the same folder.")
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds a {type(content).__name__} that is not tensors by name. Pass {EMA_NAME}.")
    return content


def make_pipeline(
    weights: dict[str, torch.Tensor], padding: str | None, dtype: torch.dtype, vae: str | None
) -> PISDMCascadePipeline:
    """The pipeline with DiM's settings; float32 weights stay mapped into memory."""
    config = dim_config(weights, padding)
    with torch.device("meta"):
        transformer = DiMTransformer2DModel(**config)
    transformer.load_state_dict(convert_dim_weights(weights, config), assign=True)
    for name, weight in transformer.named_parameters():
        kept = name.split(".")[-1] in transformer._keep_in_fp32_modules
        weight.data = weight.data.to(torch.float32 if kept else dtype)
    check_finite_weights("this checkpoint", transformer)
    transformer.register_to_config(**{RIGHTS_KEY: RIGHTS})
    return PISDMCascadePipeline(
        transformer,
        make_scheduler(),
        vae=None if vae is None else load_vae(vae, transformer.config.in_channels),
        id2label=imagenet_classes() if config["num_classes"] == 1000 else None,
        default_guidance_scale=1 + STRENGTHS[config["padding"]],
        default_num_inference_steps=NUM_STEPS,
    )


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


def make_card(pipe: PISDMCascadePipeline, folder: str) -> str:
    config = pipe.transformer.config
    return DIM_CARD.read_text(encoding="utf-8").format(
        folder=folder,
        layers=config.num_layers,
        pixels=config.sample_size * PIXELS_PER_LATENT,
        parameters=pipe.transformer.num_parameters(),
        guidance=pipe.config.default_guidance_scale,
        strength=STRENGTHS[config.padding],
    )


def check_output(folder: Path, pipe: PISDMCascadePipeline) -> None:
    """Raises an OSError if a folder is not new, or its disk too small."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OSError(f"{folder} exists and is not an empty folder. Choose a new --output_dir.")
    models = [model for model in (pipe.transformer, pipe.vae) if model is not None]
    needed = sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB left. Free up space, choose"
            " another --output_dir, or halve the files with --dtype bfloat16."
        )


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        pipe = make_pipeline(read_weights(args.checkpoint), args.padding, DTYPES[args.dtype], args.vae)
        check_output(args.output_dir, pipe)

        def write(folder: Path) -> None:
            pipe.save_pretrained(folder)
            (folder / "README.md").write_text(make_card(pipe, args.output_dir.name), encoding="utf-8")

        save_in_place(write, args.output_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    config = pipe.transformer.config
    print(
        f"Wrote {args.output_dir}: DiM with {config.num_layers} layers of width {config.hidden_size},"
        f" {pipe.transformer.num_parameters():,} parameters, for latents of {config.sample_size} x"
        f' {config.sample_size}. Load it with PISDMCascadePipeline.from_pretrained("{args.output_dir}")'
    )
    if args.vae is None:
        print(
            'It has no autoencoder, so it draws latents (output_type="latent"). For images, pass --vae here, or vae='
            " to from_pretrained."
        )
    print("No licence is stated for DiM's weights: whether you may use or share them is yours to check.")


if __name__ == "__main__":
    main()
