"""The folder of a finished training run, as `examples/train_pisdm.py` leaves it, with a cascade of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from tests.pipelines.tiny_cascade import make_cascade


ARGUMENTS = {
    "output_dir": "/home/someone/outputs/tiny",
    "learning_rate": 0.0002,
    "dataset_name": None,
    "scan": "row|column",
    "hub_token": "a-secret",
    "push_to_hub": True,
}
CONFIG = {
    "arguments": ARGUMENTS,
    "images": 6014,
    "num_processes": 2,
    "hardware": "one abacus",
    "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
}
METRICS = [
    {"step": 500, "train/denoising_1": 0.25, "images_per_second": 10.0},
    {"step": 500, "validation/denoising_1": 0.2},
    {"step": 1000, "train/denoising_1": 0.125, "images_per_second": 12.0, "learning_rate": 0.0},
    {"step": 1000, "validation/denoising_1": 0.166},
]
EVALUATION = {"fid": 12.5, "num_samples": 50000, "features": "inception"}


def write_run_files(folder: Path) -> None:
    """Everything beside the pipeline that the card is made from."""
    (folder / "samples").mkdir(parents=True)
    for name in ("samples/step-0000500.png", "samples/step-0001000.png", "loss_curves.png"):
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)
    (folder / "training_config.json").write_text(json.dumps(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))


def make_finished_run(folder: Path) -> Path:
    """A whole run: pipeline, run files, and what is never published."""
    make_cascade(2, id2label=list("abcdefghij")).save_pretrained(folder)
    write_run_files(folder)
    for name in (".lock", "transformer/.hidden.json", "transformer/notes.json", "scheduler/deep/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("checkpoint-4/optimizer.bin", "checkpoint-4/random_states_0.pkl", "partial-checkpoint-5/a", "logs/b"):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({}, folder / name)
    return folder
