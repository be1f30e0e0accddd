"""Draws samples to evaluate a model by: a folder of PNG files, or one file for ADM's evaluator.

    pisdm sample --output_dir samples --num_samples 5000
    pisdm sample ... --save_npz samples.npz

If interrupted, rerun the same command to resume. Several processes share the work, and the images do not depend on
their number: accelerate launch -m diffusers_pisdm.commands.sample ...
`--model` can be any class-conditional diffusers pipeline, for example a DiT.
"""

from __future__ import annotations

import argparse
import time

from ..evaluation import missing_samples, write_sample_archive
from ..utils.arguments import COUNT, COUNT_OR_ZERO, CommandParser, not_empty
from ..utils.messages import count_of, show_duration
from ..utils.shipped_files import CHECKPOINT
from .drawing import (
    ERRORS,
    MODEL_HELP,
    add_adapter_arguments,
    add_drawing_arguments,
    check_adapter_arguments,
    draw_sample_set,
    exit_with,
    find_processes,
    load_pipeline,
    pipeline_name,
    together,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=pipeline_name, default=str(CHECKPOINT), help=f"{MODEL_HELP} (the default).")
    add("--revision", help="The repository's branch, tag or commit.")
    add_adapter_arguments(add)
    add("--output_dir", type=not_empty, required=True, help="Where the images go.")
    add("--num_samples", type=COUNT, default=50_000)
    add("--seed", type=COUNT_OR_ZERO, default=0)
    add("--batch_size", type=COUNT, default=50, help="Images per process and step.")
    add("--save_npz", type=not_empty, metavar="FILE", help="Pack the complete set into this file for ADM's evaluator.")

    add_drawing_arguments(parser.add_argument_group("how they are drawn").add_argument)
    args = parser.parse_args(argv)
    check_adapter_arguments(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    start = time.perf_counter()
    state = find_processes()
    try:
        pipe, settings = together(lambda: load_pipeline(args, state))
        draw_sample_set(pipe, settings, args.batch_size, args.output_dir, state)
        if state.is_main_process:
            finish(args)
            seconds = time.perf_counter() - start
            print(f"{count_of(args.num_samples, 'sample')} in {args.output_dir}, {show_duration(seconds)}")
    except ERRORS as error:
        exit_with(error, state)
    state.destroy_process_group()


def finish(args: argparse.Namespace) -> None:
    """Checks that the set is complete, and packs it."""
    if args.save_npz:
        write_sample_archive(args.output_dir, args.save_npz)
        print(f"Wrote {args.save_npz}")
    elif missing := missing_samples(args.output_dir):
        raise ValueError(
            f"{args.output_dir} lacks {count_of(len(missing), 'sample')}, the first is number {missing[0]}. Check that"
            " all processes see the same folder, then rerun the command to draw the rest."
        )


if __name__ == "__main__":
    main()
