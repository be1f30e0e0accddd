#!/usr/bin/env python
"""
Image quality at equal budget: PIS-DM as a single stage and as a cascade against diffusers' DiT and DiM, with equal
parameters, data, training FLOPs, optimizer and sampler; the Fréchet distance to held-out images, over several seeds.

    python examples/datasets/fashion_mnist.py --output_dir data/fashion-mnist32
    python -m benchmarks.quality --data_dir data/fashion-mnist32 --held_out_split test --output outputs/quality/fashion
    python examples/datasets/emoji.py --output_dir data/emoji64
    python -m benchmarks.quality --data_dir data/emoji64 --held_out_split validation --output outputs/quality/emoji

Every run (a contestant and a seed) leaves its checkpoint, samples and `result.json` in its own folder. If interrupted,
rerun the same command to resume; several commands with different `--seeds` may share an output folder. Also prints a
table and writes `quality.json`, `quality.png` and `samples.png`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler

from benchmarks.equal_budget.contestants import CONTESTANTS, Budget, Contestant, measure_budget
from benchmarks.equal_budget.reference_images import reference_statistics
from benchmarks.equal_budget.report import format_table, plot_quality, plot_samples, summarize
from benchmarks.equal_budget.training import TrainingSettings, train_contestant
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
from diffusers_pisdm.utils.files import write_whole
from diffusers_pisdm.utils.machine import describe_machine


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", required=True, help="A folder that `datasets` reads, or a data set on the Hub.")
    add("--train_split", default="train")
    add("--held_out_split", default="validation", help="The reference of all scores; never trained on.")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--training_tflop", type=float, default=20.0, help="10^12 floating point operations per training run.")
    add("--num_samples", type=int, default=1000)
    add("--num_inference_steps", type=int, default=20)
    add("--guidance_scale", type=float, default=1.0)
    add("--features", default="efficientnet_lite0", help="See `pisdm evaluate`.")
    add("--features_weights")
    add("--output", type=Path, required=True)
    return parser.parse_args(argv)


def load_images(data_dir: str, split: str, size: int) -> LabelledImages:
    """All images of a split, in memory."""
    return load_labelled_images(ImageRows(load_image_data(data_dir, split), ImageTransform(size)))


def run(
    contestant: Contestant,
    seed: int,
    budget: Budget,
    data: LabelledImages,
    reference: FeatureStatistics,
    extractor: FeatureExtractor,
    settings: TrainingSettings,
    args: argparse.Namespace,
    folder: Path,
) -> dict:
    """Trains, samples and evaluates, skipping what is already done."""
    steps = budget.steps(args.training_tflop, settings.batch_size)
    objective = train_contestant(contestant, data, steps, seed, folder, settings)
    sampling = SampleSettings(
        num_samples=args.num_samples,
        seed=seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )
    sampler = DPMSolverMultistepScheduler.from_config(objective.schedulers[0].config)
    id2label = dict(enumerate(data.class_names))
    pipe = PISDMCascadePipeline.from_stages(objective.stages, sampler, id2label=id2label)
    write_sample_set(pipe, folder / "samples", sampling)
    result = evaluate_images(FolderImages(folder / "samples", decode_image), reference, extractor)
    return {
        "contestant": contestant.label,
        "seed": seed,
        "steps": steps,
        **asdict(budget),
        "scores": {name: score.value for name, score in result.scores.items()},
        "score_names": {name: score.name for name, score in result.scores.items()},
        "num_samples": result.num_samples,
        "num_reference": result.num_reference,
    }


def main(argv: list[str] | None = None) -> None:
    args, settings = parse_args(argv), TrainingSettings()
    contestants = {name: CONTESTANTS[name] for name in args.contestants}
    sizes = {contestant.stages[-1]["sample_size"] for contestant in contestants.values()}
    data = load_images(args.data_dir, args.train_split, *sizes)
    extractor = load_feature_extractor(args.features, args.features_weights)
    reference = reference_statistics(args.data_dir, args.held_out_split, *sizes, extractor, args.output)

    budgets = {name: measure_budget(contestant, len(data.class_names)) for name, contestant in contestants.items()}
    for name, budget in budgets.items():
        print(
            f"{contestants[name].label}: {budget.parameters / 1e6:.3f}M parameters,"
            f" {budget.training_flops / 1e9:.2f} GFLOP per image and training step,"
            f" {budget.steps(args.training_tflop, settings.batch_size)} steps of {settings.batch_size} images"
        )
    conditions = {
        "data": args.data_dir,
        "held_out": args.held_out_split,
        "training_tflop": args.training_tflop,
        "num_samples": args.num_samples,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "features": args.features,
        **asdict(settings),
    }
    conditions = json.loads(json.dumps(conditions))  # as they are read back
    for seed in args.seeds:
        for name, contestant in contestants.items():
            folder = args.output / name / f"seed-{seed}"
            if (folder / "result.json").exists():
                if json.loads((folder / "result.json").read_text())["conditions"] != conditions:
                    raise SystemExit(f"error: {folder} was made under other conditions. Choose another --output.")
                continue
            result = run(contestant, seed, budgets[name], data, reference, extractor, settings, args, folder)
            result |= {
                "conditions": conditions,
                "machine": describe_machine(torch.device("cpu")),
                "versions": {package: version(package) for package in ("diffusers", "torch")},
            }
            with write_whole(folder / "result.json") as file:
                file.write_text(json.dumps(result, indent=2) + "\n")

    results = [json.loads(file.read_text()) for file in sorted(args.output.glob("*/seed-*/result.json"))]
    summary = summarize(results, baseline=CONTESTANTS["dit"].label)
    with write_whole(args.output / "quality.json") as file:
        file.write_text(json.dumps({"summary": summary, "runs": results}, indent=2) + "\n")
    plot_quality(results, args.output / "quality.png")
    plot_samples(args.output, {name: contestant.label for name, contestant in CONTESTANTS.items()})
    print(format_table(summary))
    print(f"Wrote {args.output}/quality.json, quality.png and samples.png")


if __name__ == "__main__":
    main()
