#!/usr/bin/env python
"""Draws samples for evaluating a model: a folder of PNG files and, optionally, one file for ADM's evaluator.

    accelerate launch examples/sample.py --model checkpoints/pisdm-emoji128 --output_dir samples --num_samples 5000
    accelerate launch examples/sample.py ... --save_npz samples.npz

If interrupted, rerun the same command to resume. Several processes share the work; the images do not depend on their
number. `--model` can be any class-conditional diffusers pipeline, for example a DiT.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import timedelta

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline

import diffusers_pisdm  # noqa: F401  (makes diffusers know PISDMCascadePipeline)
from diffusers_pisdm.evaluation import SampleSettings, missing_samples, write_sample_archive, write_sample_set
from diffusers_pisdm.evaluation.samples.settings import CALL_ARGUMENTS, CLASS_RULES


# How long processes that are done wait for the slowest: torch's own 10 minutes would end a run of hours.
PATIENCE = timedelta(days=7)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="checkpoints/pisdm-emoji128", help="A folder or a Hub repository.")
    add("--revision", help="The repository's branch, tag or commit.")
    add("--output_dir", required=True, help="Where the images go.")
    add("--num_samples", type=int, default=50_000)
    add("--seed", type=int, default=0)
    add(
        "--classes",
        nargs="+",
        default=["balanced"],
        metavar="CLASS",
        help="balanced (the default): equally many of each; uniform: drawn anew for each sample; or class ids.",
    )
    add("--scheduler", help="A diffusers scheduler class to sample with, e.g. DDIMScheduler.")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--batch_size", type=int, default=50, help="Images per process and step.")
    add("--save_npz", metavar="FILE", help="Pack the complete set into this file for ADM's evaluator.")

    call = parser.add_argument_group("of the pipeline's call: one number, or one a stage; default: the pipeline's")
    call.add_argument("--num_inference_steps", type=int, nargs="+")
    for name in CALL_ARGUMENTS[1:]:
        call.add_argument(f"--{name}", type=float, nargs="+")
    return parser.parse_args(argv)


def read_settings(args: argparse.Namespace) -> SampleSettings:
    """
    Raises:
        ValueError: A value is out of range, or a class is neither an id nor a rule.
    """
    if len(args.classes) == 1 and args.classes[0] in CLASS_RULES:
        classes = args.classes[0]
    elif all(word.removeprefix("-").isdecimal() for word in args.classes):
        classes = [int(word) for word in args.classes]
    else:
        raise ValueError(f"--classes takes {' or '.join(CLASS_RULES)} or class ids, got {' '.join(args.classes)}.")
    values = {name: getattr(args, name) for name in CALL_ARGUMENTS}
    single = {name: value[0] if value is not None and len(value) == 1 else value for name, value in values.items()}
    return SampleSettings(args.num_samples, args.seed, classes, scheduler=args.scheduler, **single)


def load_pipeline(model: str, revision: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    """Loads a pipeline by its own class, whose checks `DiffusionPipeline.from_pretrained` would leave out."""
    config = DiffusionPipeline.load_config(model, revision=revision)
    pipeline_class = getattr(diffusers, config.get("_class_name") or "", None)
    if pipeline_class is None:
        raise ValueError(f"{model} is a pipeline of class {config.get('_class_name')}, which diffusers does not have.")
    return pipeline_class.from_pretrained(model, revision=revision, dtype=dtype)


def find_processes() -> PartialState:
    """Which process this is of those that `accelerate launch` or `torchrun` started."""
    # Unless told of the CPU, `PartialState` takes each process there for the only one.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    start = time.perf_counter()
    state = find_processes()
    try:
        settings = read_settings(args)
        pipe = load_pipeline(args.model, args.revision, getattr(torch, args.dtype)).to(state.device)
        write_sample_set(pipe, args.output_dir, settings, args.batch_size, state.process_index, state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            finish(args)
            print(f"{args.num_samples} samples in {args.output_dir}, {time.perf_counter() - start:.1f} s")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    state.destroy_process_group()


def finish(args: argparse.Namespace) -> None:
    """
    Checks that the set is complete, and packs it.

    Raises:
        OSError: The packed file cannot be written.
        ValueError: Samples are missing.
    """
    if args.save_npz:
        write_sample_archive(args.output_dir, args.save_npz)
        print(f"Wrote {args.save_npz}")
    elif missing := missing_samples(args.output_dir):
        raise ValueError(
            f"{len(missing)} samples are missing in {args.output_dir}, the first is number {missing[0]}. Check that"
            " all processes see the same folder, then rerun the command to draw the rest."
        )


if __name__ == "__main__":
    main()
