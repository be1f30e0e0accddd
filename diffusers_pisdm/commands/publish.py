"""Publishes a trained cascade on the Hugging Face Hub, with a model card made from its run.

    hf auth login
    pisdm publish outputs/emoji64 owner/name --license apache-2.0 --dry_run
    pisdm publish outputs/emoji64 owner/name --license apache-2.0 --variant fp16
    pisdm publish outputs/emoji64 owner/name --model_card model_card.md
    pisdm publish outputs/lora owner/my-lora --base_model owner/name

The folder is loaded first: what would fail for others is not uploaded.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from ..publishing.hub import VARIANTS, prepare_upload, upload
from ..utils.arguments import CommandParser, with_options
from ..utils.messages import count_of
from ..utils.shipped_files import find_model


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=find_model, help="The training script's output folder, or a saved pipeline.")
    parser.add_argument("repo_id", metavar="owner/name", help="The Hub repository; created if needed.")
    parser.add_argument("--license", help="The weights' licence, as the Hub names it, e.g. apache-2.0.")
    parser.add_argument("--dataset", nargs="+", help="Data sets on the Hub that the cascade was trained on.")
    parser.add_argument("--model_card", type=Path, help="A Markdown file to fill in (default: a skeleton).")
    parser.add_argument("--base_model", help="The cascade on the Hub that this one, or this LoRA, was trained from.")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=[], help="Add half-precision weights.")
    parser.add_argument("--max_shard_size", help="Reshard the weights into files of at most this size, e.g. 5GB.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--revision", help="The branch to publish to, created if needed (default: main).")
    parser.add_argument("--commit_message", help="The commit message.")
    parser.add_argument(
        "--i_have_the_right_to_publish",
        action="store_true",
        help="Say that you may publish weights that came without a licence, such as DiM's.",
    )
    parser.add_argument("--dry_run", action="store_true", help="Show the files and the model card; upload nothing.")
    return parser.parse_args(arguments)


def describe_size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with tempfile.TemporaryDirectory() as work_dir:
        try:
            files = prepare_upload(
                Path(args.folder),
                work_dir,
                args.repo_id,
                model_card=args.model_card,
                license=args.license,
                datasets=args.dataset,
                variants=args.variant,
                max_shard_size=args.max_shard_size,
                base_model=args.base_model,
                i_have_the_right_to_publish=args.i_have_the_right_to_publish,
            )
            sizes = {path: file.stat().st_size for path, file in files.items()}
            for path, size in sizes.items():
                print(f"{describe_size(size):>14}  {path}")
            total = f"{count_of(len(files), 'file')}, {describe_size(sum(sizes.values()))}"
            if args.dry_run:
                print(f"\nREADME.md:\n\n{files['README.md'].read_text(encoding='utf-8')}")
                print(f"Nothing was uploaded (--dry_run). {args.repo_id} would get {total}.")
                return
            commit = upload(files, args.repo_id, args.private, args.revision, args.commit_message)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {with_options(error, args)}")
    revision = f', revision="{args.revision}"' if args.revision else ""
    load = "PISDMCascadePipeline.from_pretrained" if "model_index.json" in files else "pipe.load_lora_weights"
    print(f'Published {total} to {commit.repo_url}. Load it with {load}("{args.repo_id}"{revision})')


if __name__ == "__main__":
    main()
