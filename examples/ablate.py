#!/usr/bin/env python
"""Runs the paper's ablations on any data set: trains and evaluates the rows of Table 1 (components) or 2 (directions).

    python examples/ablate.py --table 1 --cascade_config examples/recipes/ablation32.json \\
        --train_data_dir data/emoji64 --held_out_split validation --output_dir outputs/ablation --seeds 0 1

Rows differ only in their switch. Arguments after `--` go to train_pisdm.py, as in `... -- --max_train_steps 500`.
If interrupted, rerun the same command to resume. Several processes can share an output folder, with the same command
or with other --table, --rows and --seeds: each picks runs that no other is working on. At the end, or at any time with
--report_only, the script writes the table, next to the paper's numbers, and two pictures to the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from tqdm.auto import tqdm

from ablation.folder import AblationError, AblationFolder, hold_lock
from ablation.report import write_ablation_report
from ablation.rows import PER_STAGE_ARGUMENTS, TABLES, check_complete
from diffusers_pisdm import PISDMCascadePipeline, __version__
from diffusers_pisdm.data.image_data import ImageData, load_image_data
from diffusers_pisdm.data.image_transform import ImageTransform, decode_image
from diffusers_pisdm.evaluation import (
    DatasetImages,
    FeatureExtractor,
    FeatureStatistics,
    FolderImages,
    SampleSettings,
    evaluate_images,
    load_feature_extractor,
    write_sample_set,
)
from diffusers_pisdm.evaluation.metrics.statistics_file import cached_statistics
from diffusers_pisdm.evaluation.samples.files import sample_path
from diffusers_pisdm.training.cost.stage_cost import CostSettings, estimate_cascade_cost
from diffusers_pisdm.training.metrics import read_metrics
from diffusers_pisdm.training.recipes import read_recipe
from diffusers_pisdm.utils.arguments import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE
from diffusers_pisdm.utils.machine import describe_machine


TRAIN_SCRIPT = Path(__file__).with_name("train_pisdm.py")
# Arguments of the training script that may not stand after `--`, and why.
REFUSED = {
    **dict.fromkeys(
        ("cascade_config", "train_data_dir", "image_column", "label_column", "output_dir", "seed")
        + ("dataset_config_name",),
        "it belongs to the ablation: pass it before the --",
    ),
    **dict.fromkeys(("sil_weight", *PER_STAGE_ARGUMENTS), "rows change it: set it in the recipe's `training`"),
    **dict.fromkeys(
        ("pretrained_model_name_or_path", "lora_rank", "train_stages", "resume_from_checkpoint", "dry_run"),
        "every row trains all stages from scratch",
    ),
}
MAX_REFERENCE_FEATURES = 10_000  # of precision and recall, as in ADM's files
POLL_SECONDS = 5.0
LOG_LINES = 30  # that are shown of a training that failed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--table", type=int, choices=TABLES, required=True)
    add("--output_dir", type=Path, required=True)
    add("--rows", nargs="+", help="Only these rows: " + "; ".join(", ".join(names(table)) for table in TABLES))
    add("--seeds", type=COUNT_OR_ZERO, nargs="+", default=[0])
    add("--report_only", action="store_true", help="Only write the table, from the runs so far.")
    add("--cascade_config", help="A recipe with all components of the paper.")
    add("--train_data_dir", help="As for train_pisdm.py, or a data set on the Hub.")
    add("--dataset_config_name", help="The data set's configuration, if it has several.")
    add("--held_out_split", default="validation", help="The split to score against; never trained on.")
    add("--image_column", default="image")
    add("--label_column", default="label")
    add("--num_samples", type=COUNT, default=2000)
    add("--num_inference_steps", type=COUNT, default=20, help="Per stage.")
    add("--guidance_scale", type=NOT_NEGATIVE, default=1.0)
    add("--features", default="efficientnet_lite0", help="The network behind the scores; FID needs inception_v3.")
    add("--features_weights")

    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.training_arguments = argv[end + 1 :]
    for word in args.training_arguments:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name in REFUSED:
            parser.error(f"--{name} cannot go to the training script: {REFUSED[name]}")
    unknown = [name for name in args.rows or [] if name not in names(args.table)]
    if unknown:
        parser.error(f"Table {args.table} has no row {unknown[0]}. Choose from {', '.join(names(args.table))}")
    if not args.report_only and (args.cascade_config is None or args.train_data_dir is None):
        parser.error("pass --cascade_config and --train_data_dir, or --report_only")
    if args.num_samples < 2:
        parser.error(f"--num_samples must be at least 2, got {args.num_samples}")
    return args


def names(table: int) -> list[str]:
    return [row.name for row in TABLES[table]]


def read_conditions(args: argparse.Namespace) -> dict:
    """All that decides the outcome, besides row and seed."""
    try:
        recipe = asdict(read_recipe(args.cascade_config))
        check_complete(recipe)
    except (OSError, ValueError) as error:
        raise AblationError(f"--cascade_config {args.cascade_config}: {error}") from error
    data = Path(args.train_data_dir)
    conditions = {
        "recipe": recipe,
        "training_arguments": args.training_arguments,
        "train_data_dir": str(data.resolve()) if data.exists() else args.train_data_dir,
        **{name: getattr(args, name) for name in ("held_out_split", "image_column", "label_column")},
        **{name: getattr(args, name) for name in ("num_samples", "num_inference_steps", "guidance_scale")},
        **{name: getattr(args, name) for name in ("features", "features_weights")},
    }
    if args.dataset_config_name is not None:
        conditions["dataset_config_name"] = args.dataset_config_name
    return json.loads(json.dumps(conditions))  # as it is read again


def train(folder: Path, seed: int, conditions: dict, title: str, lock: TextIO) -> None:
    """Runs, or continues, the training of `folder / "recipe.json"`; what it says goes to `folder / "training.log"`."""
    command = [
        *(sys.executable, str(TRAIN_SCRIPT), "--cascade_config", str(folder / "recipe.json")),
        *("--output_dir", str(folder / "model"), "--seed", str(seed)),
        *("--train_data_dir", conditions["train_data_dir"]),
        *("--image_column", conditions["image_column"], "--label_column", conditions["label_column"]),
        *(["--dataset_config_name", config_name] if (config_name := conditions.get("dataset_config_name")) else []),
        *conditions["training_arguments"],
    ]
    log = folder / "training.log"
    environment = {**os.environ, "TQDM_MININTERVAL": "10"}  # its own progress bar is there for those who open the log
    with (
        open(log, "ab") as output,
        tqdm(desc=title, unit="step") as progress,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
        ) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                show_progress(folder / "model", progress)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise AblationError(
            f"{title}: training failed with exit code {process.returncode}. Last lines of {log}:\n"
            + "\n".join(lines[-LOG_LINES:])
        )


def show_progress(model: Path, progress: tqdm) -> None:
    rows = read_metrics(model / "metrics.jsonl")
    if rows:
        progress.total = read_training_config(model)["arguments"]["max_train_steps"]
        progress.n = rows[-1]["step"]
        progress.refresh()


def read_training_config(model: Path) -> dict:
    return json.loads((model / "training_config.json").read_text())


def sample_and_score(
    folder: Path, seed: int, conditions: dict, held_out: ImageData, extractor: FeatureExtractor, reference_file: Path
) -> dict:
    """What came out of a trained row, for `result.json`."""
    pipe = PISDMCascadePipeline.from_pretrained(folder / "model").to(extractor.device)
    settings = SampleSettings(
        num_samples=conditions["num_samples"],
        seed=seed,
        num_inference_steps=conditions["num_inference_steps"],
        guidance_scale=conditions["guidance_scale"],
    )
    samples = folder / "samples"
    write_sample_set(pipe, samples, settings)
    with Image.open(sample_path(samples, 0)) as image:
        size = image.width
    reference = reference_statistics(reference_file, conditions, held_out, extractor, size)
    result = evaluate_images(FolderImages(samples, decode_image), reference, extractor)
    return {
        "scores": {name: score.value for name, score in result.scores.items()},
        "score_names": {name: score.name for name, score in result.scores.items()},
        "num_samples": result.num_samples,
        "num_reference": result.num_reference,
        **count_cost(pipe, read_training_config(folder / "model")),
        "machine": describe_machine(pipe.device),
        "versions": {"diffusers_pisdm": __version__, **{name: version(name) for name in ("diffusers", "torch")}},
    }


def reference_statistics(
    file: Path, conditions: dict, held_out: ImageData, extractor: FeatureExtractor, size: int
) -> FeatureStatistics:
    """Of the held-out images, cropped as the training's are; collected by the first process that needs them."""

    def open_images() -> DatasetImages:
        name = f"{conditions['train_data_dir']}, {conditions['held_out_split']}"
        return DatasetImages(name, held_out, decode_image, partial(ImageTransform(size), random=None))

    with hold_lock(file.with_suffix(".lock"), wait=True):
        return cached_statistics(file, open_images, extractor, MAX_REFERENCE_FEATURES)


def count_cost(pipe: PISDMCascadePipeline, training_config: dict) -> dict:
    arguments = training_config["arguments"]
    batch_size = arguments["train_batch_size"]
    stages = [
        {name: value for name, value in stage.config.items() if name != "num_classes" and not name.startswith("_")}
        for stage in pipe.stages
    ]
    settings = CostSettings(gradient_checkpointing=arguments["gradient_checkpointing"])
    costs = estimate_cascade_cost(stages, len(pipe.config.id2label), batch_size, settings, arguments["batch_shares"])
    return {
        "parameters": sum(cost.parameters for cost in costs),
        # Of an image of the batch, of which a stage may see a share.
        "training_flops": sum(cost.batch_size * cost.training_flops for cost in costs) // batch_size,
        "steps": arguments["max_train_steps"],
        "images_per_step": batch_size * arguments["gradient_accumulation_steps"] * training_config["num_processes"],
    }


def complete_runs(args: argparse.Namespace, output: AblationFolder) -> None:
    """Does what is not done yet, seed after seed."""
    rows = [row for row in TABLES[args.table] if args.rows is None or row.name in args.rows]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:  # all that can be wrong should be so before anything is trained
        conditions = read_conditions(args)
        recipes = {row.variant: row.recipe(conditions["recipe"]) for row in rows}
        held_out = load_image_data(
            conditions["train_data_dir"],
            args.held_out_split,
            image_column=args.image_column,
            label_column=args.label_column,
            config_name=args.dataset_config_name,
        )
        extractor = load_feature_extractor(args.features, args.features_weights, device)
    except (ImportError, OSError, ValueError) as error:
        raise AblationError(str(error)) from error
    output.claim(conditions)

    runs = [(row, seed) for seed in args.seeds for row in rows]
    for number, (row, seed) in enumerate(runs, start=1):
        folder = output.run(row.variant, seed)
        title = f"[{number}/{len(runs)}] {row.name}, seed {seed}"
        with hold_lock(folder / "lock", wait=False) as lock:
            if output.is_done(row.variant, seed):
                print(f"{title}: already done")
            elif lock is None:
                print(f"{title}: another process is running it")
            else:
                output.write_json(folder.relative_to(output.path) / "recipe.json", recipes[row.variant])
                train(folder, seed, conditions, title, lock)
                reference_file = output.path / "reference.npz"
                result = sample_and_score(folder, seed, conditions, held_out, extractor, reference_file)
                output.write_result(row.variant, seed, result)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output = AblationFolder(args.output_dir)
    try:
        if not args.report_only:
            complete_runs(args, output)
        print("\n" + write_ablation_report(output, args.table))
    except AblationError as error:
        sys.exit(f"error: {error}")
    print(f"Wrote table_{args.table}.md, .json and .png and samples_{args.table}.png to {output.path}")


if __name__ == "__main__":
    # As an exception, so that the training that is under way is ended, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    main()
