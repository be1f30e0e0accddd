#!/usr/bin/env python
"""
Image quality at equal budget: PIS-DM as a single stage, as a cascade and as a cascade of residuals against diffusers'
DiT, U-ViT and DiM, with equal parameters, data, optimizer and sampler; or the rows of the paper's tables of ablations
(`--comparison table_1`). Scores are Fréchet distances to held-out images, over the training's FLOPs and over its time.

    python examples/datasets/fashion_mnist.py --output_dir data/fashion-mnist32
    python -m benchmarks.quality --data_dir data/fashion-mnist32 --held_out_split test --output outputs/quality/fashion
    python examples/datasets/emoji.py --output_dir data/emoji64
    python -m benchmarks.quality --data_dir data/emoji64 --held_out_split validation --output outputs/quality/emoji
    python -m benchmarks.quality --data_dir data/cifar10 --held_out_split test --output outputs/quality/cifar \
        --comparison large --training_minutes 0.9 --mixed_precision bf16 --batch_size 256 --learning_rate 2e-3

Every contestant gets the same number of FLOPs (`--training_tflop`) or the same time (`--training_minutes`), at the
speed found by timing all in turns at the start (`step_seconds.json`; delete it to time them again). Samples are drawn
at several points of each run (`--points`), so each run is a curve, and both comparisons can be read from it at the
largest budget that all have reached. At the end, each contestant is compared with the first by a bootstrap over seeds
and images: *better* or *worse* if the 95% interval of the difference is on one side of zero, with two seeds or more
and from half a percent on.

Every run (a contestant and a seed) leaves its checkpoint, samples and `result.json` in its own folder. If interrupted,
rerun the same command to resume; several commands with different `--seeds` or `--contestants` may share an output
folder, but all else must be equal. Also prints a table and writes `quality.json`, `quality.png` and `samples.png`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.equal_budget.contestants import CONTESTANTS, Contestant, measure_budget
from benchmarks.equal_budget.reference_images import reference_statistics
from benchmarks.equal_budget.report import format_table, plot_quality, plot_samples, summarize
from benchmarks.equal_budget.training import CurveTrainer, TrainingSettings, make_trainer, measure_step_seconds
from benchmarks.equal_budget.verdicts import Difference, compare_distances, resampled_distances, run_features
from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.data.device_images import LabelledImages, load_labelled_images
from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.image_rows import ImageRows
from diffusers_pisdm.data.image_transform import ImageTransform, decode_image
from diffusers_pisdm.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    FolderImages,
    SampleSettings,
    evaluate_images,
    load_feature_extractor,
    write_sample_set,
)
from diffusers_pisdm.schedulers import sampling_schedulers
from diffusers_pisdm.training.optimization import OPTIMIZERS
from diffusers_pisdm.utils.arguments import COUNT, NOT_NEGATIVE, SEED, Bounds, CommandParser, bounded
from diffusers_pisdm.utils.files import write_whole
from diffusers_pisdm.utils.machine import describe_machine
from examples.ablation.folder import check_conditions, claim


SAMPLE_BATCH = {"cpu": 50, "cuda": 500}
POSITIVE = bounded(float, Bounds(above=0))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, settings = parser.add_argument, TrainingSettings()
    add("--data_dir", required=True, help="A folder that `datasets` reads, or a data set on the Hub.")
    add("--train_split", default="train")
    add("--held_out_split", default="validation", help="The reference of all scores; never trained on.")
    add("--comparison", choices=CONTESTANTS, default="small", help="Peers of 0.8 or 8 million parameters, or a table.")
    add("--contestants", nargs="+", help="Only these, by name.")
    add("--seeds", type=SEED, nargs="+", default=[0, 1, 2])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--training_tflop", type=POSITIVE, default=20.0, help="10^12 operations per training run.")
    budget.add_argument("--training_minutes", type=POSITIVE, help="Per training run, instead of --training_tflop.")
    add("--points", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="Shares of a run after which to draw.")
    add("--batch_size", type=COUNT, default=settings.batch_size)
    add("--learning_rate", type=POSITIVE, default=settings.learning_rate)
    add("--optimizer", choices=OPTIMIZERS, default=settings.optimizer)
    add("--adam_beta1", type=bounded(float, Bounds(minimum=0, below=1)), default=settings.adam_beta1)
    add("--mixed_precision", choices=["no", "bf16"], default=settings.mixed_precision, help="Of training.")
    add("--num_samples", type=bounded(int, Bounds(minimum=2)), default=1000)
    add("--num_inference_steps", type=COUNT, default=20)
    add("--guidance_scale", type=NOT_NEGATIVE, default=1.0)
    add("--features", default="efficientnet_lite0", help="See `pisdm evaluate`.")
    add("--features_weights")
    add("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.points != sorted(set(args.points)) or not 0 < args.points[0] <= args.points[-1] == 1:
        parser.error("--points takes rising shares of a run, the last of which is 1")
    known = list(CONTESTANTS[args.comparison])
    args.contestants = args.contestants or known
    if not set(args.contestants) <= set(known):
        parser.error(f"--contestants of {args.comparison} are {', '.join(known)}; got {', '.join(args.contestants)}")
    return args


def prepare(args: argparse.Namespace, conditions: dict) -> dict:
    """
    Finds what can be wrong before anything is computed, and exits with what it is; returns the conditions of the
    output folder's runs, as JSON has them.
    """
    data = Path(args.data_dir)
    conditions = {"data": str(data.resolve()) if data.exists() else args.data_dir, **conditions}
    conditions = json.loads(json.dumps(conditions))
    try:
        for split in (args.train_split, args.held_out_split):
            load_image_data(args.data_dir, split)
        for file in args.output.glob("*/seed-*/result.json"):
            check_conditions(json.loads(file.read_text())["conditions"], conditions, file.parent)
        claim(args.output / "conditions.json", conditions)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.train_split == args.held_out_split:
        print("Warning: the reference of the scores is what the models are trained on (--held_out_split).", flush=True)
    return conditions


def load_images(data_dir: str, split: str, size: int) -> LabelledImages:
    """All images of a split, in memory."""
    return load_labelled_images(ImageRows(load_image_data(data_dir, split), ImageTransform(size)))


def draw_and_evaluate(
    trainer: CurveTrainer,
    places: dict[int, Path],
    reference: FeatureStatistics,
    extractor: FeatureExtractor,
    class_names: list[str],
    sampling: SampleSettings,
) -> None:
    """Samples of the averaged weights, and their scores; a run that is resumed may come by again."""
    folder = places[trainer.state.step]
    file = folder / "scores.json"
    if file.exists():
        return
    objective = trainer.objective
    pipe = PISDMCascadePipeline.from_stages(
        list(objective.stages), sampling_schedulers(objective.schedulers), id2label=dict(enumerate(class_names))
    )
    if trainer.on_gpu:
        pipe.enable_cuda_graphs()
    write_sample_set(pipe, folder / "samples", sampling, batch_size=SAMPLE_BATCH[trainer.accelerator.device.type])
    result = evaluate_images(FolderImages(folder / "samples", decode_image), reference, extractor)
    scores = {
        "scores": {name: score.value for name, score in result.scores.items()},
        "score_names": {name: score.name for name, score in result.scores.items()},
        "num_samples": result.num_samples,
        "num_reference": result.num_reference,
    }
    with write_whole(file) as whole:
        whole.write_text(json.dumps(scores, indent=2) + "\n")


def step_seconds(
    contestants: dict[str, Contestant], data: LabelledImages, settings: TrainingSettings, args: argparse.Namespace
) -> dict[str, float]:
    """The seconds of a step of each contestant, measured once for an output folder, all in turns."""
    file = args.output / "step_seconds.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if not set(contestants) <= set(found):
        print("Timing the training steps ...", flush=True)
        known = CONTESTANTS[args.comparison]
        timed = {name: known[name] for name in known if name in contestants or name in found}
        measured = dict(zip(timed, measure_step_seconds(list(timed.values()), data, args.output, settings)))
        found = measured | (found if args.training_minutes else {})  # these have decided the steps of runs
        with write_whole(file) as whole:
            whole.write_text(json.dumps(found, indent=2) + "\n")
    return found


def compare_with_baseline(
    args: argparse.Namespace, reference: FeatureStatistics, extractor: FeatureExtractor
) -> dict[str, Difference]:
    """How the others' distances differ from the first contestant's at the runs' ends, over the seeds they share."""
    baseline, *others = CONTESTANTS[args.comparison]

    def seeds(name: str) -> set[str]:
        return {file.parent.name for file in args.output.glob(f"{name}/seed-*/result.json")}

    @cache
    def distances(name: str, seed: str) -> np.ndarray:
        folder = args.output / name / seed
        features = run_features(folder, folder / f"share-{args.points[-1]:g}" / "samples", extractor)
        return resampled_distances(features, reference.pooled, int(seed.removeprefix("seed-")))

    differences = {}
    for name in others:
        shared = sorted(seeds(name) & seeds(baseline))
        if shared:
            runs = ([distances(which, seed) for seed in shared] for which in (name, baseline))
            differences[CONTESTANTS[args.comparison][name].label] = compare_distances(*runs)
    return differences


def report(
    args: argparse.Namespace, seconds: dict[str, float], differences: dict[str, Difference] | None = None
) -> str:
    """Writes the results so far; returns a table."""
    results = [json.loads(file.read_text()) for file in sorted(args.output.glob("*/seed-*/result.json"))]
    names = {contestant.label: name for name, contestant in CONTESTANTS[args.comparison].items()}
    for result in results:  # not in their files: steps may be timed again
        result["step_seconds"] = seconds[names[result["contestant"]]]
        for point in result["points"]:
            point["seconds"] = point["steps"] * result["step_seconds"]
    summary = summarize(results, baseline=next(iter(names)))
    for row in summary:
        if row["contestant"] in (differences or {}):
            row["difference"] = asdict(differences[row["contestant"]])
    with write_whole(args.output / "quality.json") as file:
        file.write_text(json.dumps({"summary": summary, "runs": results}, indent=2) + "\n")
    plot_quality(results, args.output / "quality.png")
    plot_samples(args.output, {name: label for label, name in names.items()})
    return format_table(summary, differences)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = TrainingSettings(
        **{
            name: getattr(args, name)
            for name in ("batch_size", "learning_rate", "optimizer", "adam_beta1", "mixed_precision")
        }
    )
    names = ("comparison", "train_split", "held_out_split", "training_tflop", "training_minutes", "points")
    names += ("num_samples", "num_inference_steps", "guidance_scale", "features", "features_weights")
    conditions = {name: getattr(args, name) for name in names} | asdict(settings)
    if args.training_minutes is not None:
        conditions["training_tflop"] = None
    conditions = prepare(args, conditions)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    contestants = {name: CONTESTANTS[args.comparison][name] for name in args.contestants}
    (size,) = {contestant.stages[-1]["sample_size"] for contestant in contestants.values()}
    data = load_images(args.data_dir, args.train_split, size).to(device)
    extractor = load_feature_extractor(args.features, args.features_weights, device)
    reference = reference_statistics(args.data_dir, args.held_out_split, size, extractor, args.output)

    budgets = {name: measure_budget(contestant, len(data.class_names)) for name, contestant in contestants.items()}
    seconds, steps = step_seconds(contestants, data, settings, args), {}
    for name, budget in budgets.items():
        if args.training_minutes is None:
            steps[name] = budget.steps(args.training_tflop, settings.batch_size)
        else:
            steps[name] = int(60 * args.training_minutes / seconds[name])
        print(
            f"{contestants[name].label}: {budget.parameters / 1e6:.3f}M parameters,"
            f" {budget.training_flops / 1e9:.2f} GFLOP per image and training step, {1e3 * seconds[name]:.3g} ms per"
            f" step, {steps[name]} steps of {settings.batch_size} images",
            flush=True,
        )
    for seed in args.seeds:
        sampling = SampleSettings(
            num_samples=args.num_samples,
            seed=seed,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
        )
        for name, contestant in contestants.items():
            folder = args.output / name / f"seed-{seed}"
            if (folder / "result.json").exists():
                continue
            places = {max(1, round(share * steps[name])): folder / f"share-{share:g}" for share in args.points}
            draw = partial(
                draw_and_evaluate,
                places=places,
                reference=reference,
                extractor=extractor,
                class_names=data.class_names,
                sampling=sampling,
            )
            trainer = make_trainer(contestant, data, list(places), seed, folder, settings, draw)
            trainer.resume()
            trainer.train()
            if not trainer.is_done:
                raise SystemExit(128 + (trainer.stopped_by or 0))
            per_step = budgets[name].training_flops * settings.batch_size / 1e12
            result = {
                "contestant": contestant.label,
                "seed": seed,
                "steps": steps[name],
                **asdict(budgets[name]),
                "points": [
                    {
                        "steps": step,
                        "tflop": step * per_step,
                        **json.loads((place / "scores.json").read_text()),
                    }
                    for step, place in places.items()
                ],
                "conditions": conditions,
                "machine": describe_machine(device),
                "versions": {package: version(package) for package in ("diffusers", "torch")},
            }
            with write_whole(folder / "result.json") as file:
                file.write_text(json.dumps(result, indent=2) + "\n")
            report(args, seconds)
    print(report(args, seconds, compare_with_baseline(args, reference, extractor)))
    print(f"Wrote {args.output}/quality.json, quality.png and samples.png")


if __name__ == "__main__":
    main()
