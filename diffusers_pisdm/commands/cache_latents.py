"""Encodes a data set into the latents of every stage once, so that training needs no VAE.

    pisdm cache-latents --cascade_config imagenet256 --train_data_dir imagenet --random_flip --output_dir latents
    pisdm train --cascade_config imagenet256 --latent_cache latents ...

Several processes share the work: accelerate launch -m diffusers_pisdm.commands.cache_latents ...
If interrupted, rerun the same command to resume. An image of 256 pixels takes 22 kB in four stages, 44 kB with its
mirror image: 56 GB for ImageNet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from accelerate import Accelerator
from diffusers import AutoencoderKL

from ..data.image_rows import ON_BAD_IMAGE, ImageRows
from ..data.image_transform import ImageTransform
from ..data.latent_cache import DTYPES, INDEX_FILE, CacheIndex
from ..data.latent_cache_writer import vae_fingerprint, write_latent_cache
from ..models.latents import load_vae, vae_scale_factor
from ..training.recipes import Recipe, read_recipe
from ..utils.arguments import COUNT, COUNT_OR_ZERO, CommandParser, not_empty
from ..utils.messages import count_of
from .data_sources import add_data_arguments, check_source, load_data


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", type=not_empty, required=True, help="The folder for the cache.")
    add(
        "--cascade_config",
        required=True,
        help="A recipe, by file or name; its stages set the sizes to encode.",
    )
    add("--pretrained_vae_model_name_or_path", help="Default: the recipe's.")
    add("--vae_dtype", choices=DTYPES, default="float32", help="Precision of the VAE.")
    add("--latent_dtype", choices=DTYPES, default="float16", help="Precision of the stored latents.")
    add("--images_per_shard", type=COUNT, default=4096)
    add("--batch_size", type=COUNT, default=64, help="Images per process and step.")

    data = add_data_arguments(parser)
    data.add_argument("--random_flip", action="store_true", help="Also encode the mirrored images.")
    data.add_argument("--on_bad_image", choices=ON_BAD_IMAGE, default="stop")
    data.add_argument("--dataloader_num_workers", type=COUNT_OR_ZERO, default=0)

    args = parser.parse_args(argv)
    check_source(parser, args)
    return args


def load_recipe(file: str) -> Recipe:
    try:
        return read_recipe(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--cascade_config {file}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator()
    try:
        recipe = load_recipe(args.cascade_config)
        vae_name = args.pretrained_vae_model_name_or_path or recipe.vae
        if vae_name is None:
            raise ValueError("The recipe has no `vae`: pass one as --pretrained_vae_model_name_or_path.")
        vae = load_vae(vae_name, recipe.stages[-1]["in_channels"], DTYPES[args.vae_dtype][0]).to(accelerator.device)
        sizes = [stage["sample_size"] for stage in recipe.stages]
        is_begun = Path(args.output_dir, INDEX_FILE).is_file()
        data = load_data(args, class_order=CacheIndex.read(Path(args.output_dir)).class_names if is_begun else None)
        index = CacheIndex(
            dataset=args.dataset_name or args.train_data_dir,
            split=args.split,
            num_images=data.num_rows,
            class_names=data.class_names,
            image_size=vae_scale_factor(vae) * max(sizes),
            stage_sizes=sizes,
            channels=vae.config.latent_channels,
            vae=vae_name,
            vae_class=type(vae).__name__,
            vae_sha256=vae_fingerprint(vae),
            vae_dtype=args.vae_dtype,
            has_std=isinstance(vae, AutoencoderKL),
            has_flips=args.random_flip,
            dtype=args.latent_dtype,
            images_per_shard=args.images_per_shard,
        )
        rows = ImageRows(data, ImageTransform(index.image_size), args.on_bad_image)
        write_latent_cache(
            rows, vae, index, args.output_dir, accelerator, args.batch_size, args.dataloader_num_workers
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    accelerator.print(
        f"{count_of(len(rows), 'image')} of {count_of(len(data.class_names), 'class')} in {args.output_dir}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
