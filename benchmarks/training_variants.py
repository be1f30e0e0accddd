#!/usr/bin/env python
"""
What an option of the training objective is worth: variants of one small cascade, equal but for that option, over
several seeds, with a verdict each.

    python examples/datasets/emoji.py --output_dir data/emoji64
    python -m benchmarks.training_variants --data_dir data/emoji64 --output outputs/variants

All variants of a seed start from the same weights and see the same batches and noise, as far as the option allows. Two
scores: the held-out denoising loss of each stage, on the same images, timesteps and noise for all; and the Fréchet
distance of samples to held-out images. A verdict compares held-out losses with the baseline's: *better* or *worse* if
the 95% interval of the mean paired difference, a bootstrap over seeds and images, is on one side of zero, with two
seeds or more and from half a percent on.

Every run (a variant and a seed) leaves its losses and `result.json` in its own folder. If interrupted, rerun the same
command to resume; commands with different `--seeds` or `--variants` may share an output folder. Also writes
`variants.json`, `variants.md` and `variants.png`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from benchmarks.equal_budget.contestants import Contestant
from benchmarks.equal_budget.reference_images import reference_statistics
from benchmarks.equal_budget.training import TrainingSettings, make_trainer
from benchmarks.equal_budget.verdicts import Difference
from benchmarks.quality import load_images, prepare
from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.data.device_images import LabelledImages
from diffusers_pisdm.data.image_transform import decode_image
from diffusers_pisdm.evaluation import (
    FolderImages,
    SampleSettings,
    evaluate_images,
    load_feature_extractor,
    write_sample_set,
)
from diffusers_pisdm.training import CascadeObjective, image_pyramid
from diffusers_pisdm.training.noise import noise_seed
from diffusers_pisdm.utils.arguments import COUNT, COUNT_OR_ZERO, SEED, Bounds, CommandParser, bounded
from diffusers_pisdm.utils.files import write_whole
from diffusers_pisdm.utils.machine import describe_machine


@dataclass(frozen=True)
class Variant:
    """An option to measure."""

    label: str
    objective: dict = field(default_factory=dict)  # arguments of `CascadeObjective`
    decay_share: float | None = None  # of the steps, over which the scale-invariant loss fades
    training: dict = field(default_factory=dict)  # of `TrainingSettings`, in place of the command's


BASELINE = "without"
AS_MEAN = {"sil_per_value": False}  # the weight applies to losses that are means over values
REMEDIES = {"independent_conditions": True, "sil_max_timestep": 300, "sil_subtract_condition": True}
VARIANTS = {
    "without": Variant("no scale-invariant loss", {"sil_weight": 0.0}),
    "weight_1": Variant("SIL, weight 1", {"sil_weight": 1.0, **AS_MEAN}),
    "weight_0.1": Variant("SIL, weight 0.1", {"sil_weight": 0.1, **AS_MEAN}),
    "weight_0.01": Variant("SIL, weight 0.01", {"sil_weight": 0.01, **AS_MEAN}),
    "per_value": Variant("SIL, weight 1, as eq. 17 reads literally", {"sil_weight": 1.0}),
    "independent": Variant("SIL 0.1, own t per stage", {"sil_weight": 0.1, **AS_MEAN, "independent_conditions": True}),
    "low_noise": Variant("SIL 0.1, positives below t = 300", {"sil_weight": 0.1, **AS_MEAN, "sil_max_timestep": 300}),
    "subtract": Variant("SIL 0.1, minus t and class", {"sil_weight": 0.1, **AS_MEAN, "sil_subtract_condition": True}),
    "remedies": Variant("SIL 0.1, all three of these", {"sil_weight": 0.1, **AS_MEAN, **REMEDIES}),
    "decay": Variant("SIL 0.1, falling to 0 by half time", {"sil_weight": 0.1, **AS_MEAN}, decay_share=0.5),
    "stop_gradient": Variant(
        "SIL 0.1, lower stage untouched", {"sil_weight": 0.1, **AS_MEAN, "sil_stop_gradient": True}
    ),
    "dispersive": Variant(
        "dispersive loss, weight 0.5", {"sil_weight": 0.5, **AS_MEAN, "sil_form": "dispersive", "sil_temperature": 0.5}
    ),
    "independent_without": Variant("no SIL, own t per stage", {"sil_weight": 0.0, "independent_conditions": True}),
    "min_snr": Variant("no SIL, min-SNR weights", {"sil_weight": 0.0, "loss_weighting": "min_snr"}),
    "sigmoid": Variant("no SIL, sigmoid weights", {"sil_weight": 0.0, "loss_weighting": "sigmoid"}),
    "beta": Variant("no SIL, first beta 0.9", {"sil_weight": 0.0}, training={"adam_beta1": 0.9}),
    "beta_muon": Variant(
        "no SIL, first beta 0.9, Muon",
        {"sil_weight": 0.0},
        training={"adam_beta1": 0.9, "optimizer": "muon", "learning_rate": 1e-2},
    ),
    "beta_sigmoid": Variant(
        "no SIL, first beta 0.9, sigmoid weights",
        {"sil_weight": 0.0, "loss_weighting": "sigmoid"},
        training={"adam_beta1": 0.9},
    ),
}
_SHAPE = {"patch_size": 2, "in_channels": 3, "num_layers": 5, "hidden_size": 64}
STAGES = [{"sample_size": 8, **_SHAPE}, {"sample_size": 16, "low_res_channels": 3, **_SHAPE}]
HELD_OUT_REPEATS = 4  # draws of timestep and noise for each image
HELD_OUT_BATCH = 64
RESAMPLES = 2000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", required=True, help="A folder that `datasets` reads, or a data set on the Hub.")
    add("--train_split", default="train")
    add("--held_out_split", default="validation", help="Never trained on.")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--seeds", type=SEED, nargs="+", default=[0, 1, 2])
    add("--steps", type=COUNT_OR_ZERO, default=500, help="Of 32 images.")
    add("--num_samples", type=bounded(int, Bounds(minimum=2)), default=1000)
    add("--num_inference_steps", type=COUNT, default=10, help="Per stage.")
    add("--features", default="efficientnet_lite0", help="See `pisdm evaluate`.")
    add("--output", type=Path, required=True)
    return parser.parse_args(argv)


@torch.no_grad()
def held_out_losses(objective: CascadeObjective, data: LabelledImages) -> np.ndarray:
    """The unweighted losses of every stage (S, R, N), of R draws of timestep and noise for each of N images."""
    sizes = [stage.config.sample_size for stage in objective.stages]
    losses = np.zeros((len(sizes), HELD_OUT_REPEATS, len(data.images)))
    for repeat in range(HELD_OUT_REPEATS):
        for first in range(0, len(data.images), HELD_OUT_BATCH):
            rows = slice(first, first + HELD_OUT_BATCH)
            pyramid = image_pyramid(data.images[rows].float() / 127.5 - 1, sizes)
            found = objective(pyramid, data.labels[rows], noise_seed(repeat, first))
            losses[:, repeat, rows] = torch.stack(found.denoising)
    return losses


def run(
    variant: Variant, seed: int, images: dict[str, LabelledImages], settings: TrainingSettings, folder: Path, args
) -> dict:
    """Trains, measures and samples, skipping what is already done."""
    options = dict(variant.objective)
    if variant.decay_share is not None:
        options["sil_decay_steps"] = max(1, round(variant.decay_share * args.steps))
    contestant = Contestant(variant.label, STAGES, objective=options)
    settings = replace(settings, **variant.training)
    trainer = make_trainer(contestant, images["train"], [args.steps], seed, folder, settings)
    trainer.resume()
    trainer.train()
    if not trainer.is_done:
        raise SystemExit(128 + (trainer.stopped_by or 0))
    trainer.average.copy_to(trainer.parameters)
    objective = trainer.objective.eval()
    for index in range(len(STAGES)):
        objective.get_buffer(f"loss_weights_{index}").fill_(1)  # variants may weigh their losses
    losses = held_out_losses(objective, images["held_out"])
    np.save(folder / "held_out_losses.npy", losses.mean(axis=1))  # (S, N)

    sampler = DPMSolverMultistepScheduler.from_config(objective.schedulers[0].config)
    pipe = PISDMCascadePipeline.from_stages(
        objective.stages, sampler, id2label=dict(enumerate(images["train"].class_names))
    )
    sampling = SampleSettings(
        num_samples=args.num_samples, seed=seed, num_inference_steps=args.num_inference_steps, guidance_scale=1.0
    )
    write_sample_set(pipe, folder / "samples", sampling, batch_size=100)
    extractor = load_feature_extractor(args.features)
    reference = reference_statistics(
        args.data_dir, args.held_out_split, STAGES[-1]["sample_size"], extractor, args.output
    )
    scores = evaluate_images(FolderImages(folder / "samples", decode_image), reference, extractor).scores
    shutil.rmtree(folder / f"checkpoint-{args.steps}", ignore_errors=True)  # what is left is small
    return {"held_out": losses.mean(axis=(1, 2)).tolist(), "scores": {name: s.value for name, s in scores.items()}}


def interval(differences: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean over seeds and images, (seeds, N): both are drawn with replacement."""
    seeds, images = differences.shape
    drawn = [
        differences[random.integers(seeds, size=seeds)][:, random.integers(images, size=images)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def summarize(output: Path) -> list[dict]:
    """A row per variant, with its differences to the baseline in percent of the baseline's held-out loss."""
    runs = {}
    for file in output.glob("*/seed-*/result.json"):
        runs.setdefault(file.parts[-3], {})[int(file.parts[-2].removeprefix("seed-"))] = file.parent
    rows, random = [], np.random.default_rng(0)
    for name in [name for name in VARIANTS if name in runs]:
        results = [json.loads((folder / "result.json").read_text()) for folder in runs[name].values()]
        row = {"variant": name, "label": VARIANTS[name].label, "seeds": sorted(runs[name])}
        row["held_out"] = np.mean([result["held_out"] for result in results], axis=0).tolist()
        row["frechet_distances"] = [result["scores"]["frechet_distance"] for result in results]
        shared = sorted(runs[name].keys() & runs.get(BASELINE, {}).keys())
        if name != BASELINE and shared:
            row["differences"], losses = [], {}
            for which in (name, BASELINE):
                files = [runs[which][seed] / "held_out_losses.npy" for seed in shared]
                losses[which] = np.stack([np.load(file) for file in files])  # (seeds, S, N)
            for stage in range(len(STAGES)):
                ours, theirs = losses[name][:, stage], losses[BASELINE][:, stage]
                relative = 100 * (ours - theirs) / theirs.mean()
                row["differences"].append(Difference(float(relative.mean()), *interval(relative, random), len(shared)))
        rows.append(row)
    return rows


def format_table(rows: list[dict]) -> str:
    header = ["", *(f"stage {i + 1}, difference to none" for i in range(len(STAGES))), "Fréchet distance", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        found = row.get("differences") or [None] * len(STAGES)
        cells = [
            f"{loss:.4f}" + ("" if difference is None else f", {difference}")
            for loss, difference in zip(row["held_out"], found, strict=True)
        ]
        distances = row["frechet_distances"]
        spread = f" ± {np.std(distances, ddof=1):.1f}" if len(distances) > 1 else ""
        cells += [f"{mean(distances):.1f}{spread}", str(len(row["seeds"]))]
        lines.append("| " + " | ".join([row["label"], *cells]) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], picture: Path) -> None:
    """Each stage's differences with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "differences" in row]
    figure, axes = plt.subplots(
        1, len(STAGES), figsize=(10, 1.2 + 0.3 * len(rows)), sharey=True, constrained_layout=True
    )
    for stage, axis in enumerate(axes):
        for position, row in enumerate(rows):
            found = row["differences"][stage]
            colour = {"better": "C2", "worse": "C3"}.get(found.verdict, "grey")
            axis.plot([found.low, found.high], [position] * 2, color=colour)
            axis.plot(found.percent, position, "o", color=colour)
        axis.axvline(0, color="black", linewidth=0.8)
        size = STAGES[stage]["sample_size"]
        axis.set(title=f"stage {stage + 1}, {size} px", xlabel="% more held-out loss, 95% interval")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes[0].invert_yaxis()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = TrainingSettings(learning_rate=3e-3, lr_warmup_steps=args.steps // 10, lr_cooldown=0.2, adam_beta1=0.99)
    size = STAGES[-1]["sample_size"]
    conditions = {name: getattr(args, name) for name in ("train_split", "held_out_split", "steps", "num_samples")}
    conditions |= {name: getattr(args, name) for name in ("num_inference_steps", "features")}
    conditions |= {"stages": STAGES, **asdict(settings)}
    conditions = prepare(args, conditions)
    images = {
        "train": load_images(args.data_dir, args.train_split, size),
        "held_out": load_images(args.data_dir, args.held_out_split, size),
    }
    for seed in args.seeds:
        for name in args.variants:
            folder = args.output / name / f"seed-{seed}"
            file = folder / "result.json"
            if file.exists():
                continue
            result = run(VARIANTS[name], seed, images, settings, folder, args)
            machine = describe_machine(torch.device("cpu"))
            with write_whole(file) as unfinished:
                unfinished.write_text(
                    json.dumps({**result, "conditions": conditions, "machine": machine}, indent=2) + "\n"
                )

    rows = summarize(args.output)
    table = format_table(rows)
    with write_whole(args.output / "variants.json") as file:
        file.write_text(json.dumps({"conditions": conditions, "variants": rows}, indent=2, default=asdict) + "\n")
    with write_whole(args.output / "variants.md") as file:
        file.write_text(table + "\n")
    if any("differences" in row for row in rows):
        plot(rows, args.output / "variants.png")
    print(table)


if __name__ == "__main__":
    main()
