"""
What one GPU does in less than nine minutes: sampling with and without CUDA graphs, the selective scan, and training.

    python -m benchmarks.gpu_report --minutes 8.5
    python -m benchmarks.gpu_report --rehearse

- `kernels`: kernels that a pass launches, in all and per layer, now and before.
- `sampling`: milliseconds per step of a pipeline with one stage of size H: launched one by one, with
  `enable_cuda_graphs()`, and as graphs of the kernels of before; the largest difference of the latents.
- `scan`: `benchmarks.scan` in bfloat16, forward and backward, against mamba_ssm if it can be imported: our kernels as
  they are, and in other settings, among them those of before.
- `training`: images per second, memory and the share of the matrix-product peak that this GPU reaches, of sizes S and
  L and of DiT with as many parameters as each, as recorded steps and launched one by one.
- `trainer`: images per second of the ordinary training loop on the emoji recipe's four stages, as it is, and as it was
  when it waited for the device several times in each step.
- `compiled`: as `sampling`, with the repeated blocks compiled by `torch.compile`.

Parts run in this order, or in that of `--parts`, and each writes `gpu_report.json` when it is done. A measurement that
would begin after `--minutes` is left out and named in the report, as is one that fails, with its error. `--rehearse`
runs everything in miniature, on the CPU too, where nothing is recorded.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel

from benchmarks import scan
from benchmarks.measuring.report import describe_conditions, print_conditions, write_report
from benchmarks.measuring.timing import now
from benchmarks.peers import PEERS, equal_parameters
from benchmarks.speed.candidates import VAE_FACTOR, cast_model
from diffusers_pisdm import PISDM_SIZES, PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.data.device_images import DeviceBatches, LabelledImages
from diffusers_pisdm.ops.common.backends import force_backends
from diffusers_pisdm.ops.scan import triton_operator
from diffusers_pisdm.training import CascadeObjective
from diffusers_pisdm.training.cost.flops import StepTrace
from diffusers_pisdm.training.device_trainer import WARM_UP_STEPS, DeviceStep
from diffusers_pisdm.training.optimization import make_optimizer, parameter_groups
from diffusers_pisdm.training.recipes import TrainerSettings, read_recipe
from diffusers_pisdm.training.trainer import Trainer


NUM_CLASSES = 1000
TOY = {"num_layers": 4, "hidden_size": 64, "state_size": 4}  # for rehearsals
SCAN_SHAPES = [(2, 3072, 1024), (1, 3072, 16384), (2, 3072, 256), (2, 3072, 4096), (16, 3072, 1024), (2, 3072, 74)]
STEPS = 20  # of a sampling call
REPEATS = 5


class Report:
    """The measurements so far, in a file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.end = time.monotonic() + 60 * args.minutes
        self.content: dict[str, Any] = {
            "conditions": describe_conditions(args.device.type, "bfloat16"),
            "rehearsal": args.rehearse,
            "left_out": {},
        }

    def measure(self, part: str, name: str, call: Callable[[], dict]) -> None:
        """Adds a row, or why there is none."""
        start = time.monotonic()
        if start > self.end:
            self.content["left_out"][f"{part}: {name}"] = "no time left"
            return write_report(self.args.output_dir, "gpu_report", self.content)
        try:
            row = {"name": name, **call(), "took_seconds": round(time.monotonic() - start, 1)}
        except Exception as error:  # the other measurements are worth having
            self.content["left_out"][f"{part}: {name}"] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{part}: {name} failed: {error}", flush=True)
        else:
            self.content.setdefault(part, []).append(row)
            print(f"{part}: {row}", flush=True)
        write_report(self.args.output_dir, "gpu_report", self.content)
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()


# Sampling


def make_pipeline(size: int, args: argparse.Namespace) -> PISDMCascadePipeline:
    """One stage of size H with random weights, for latents of `size` x `size`, in bfloat16."""
    config = TOY if args.rehearse else PISDM_SIZES["H"]
    with args.device:
        torch.manual_seed(0)
        model = PISDMTransformer2DModel(sample_size=size, in_channels=4, num_classes=NUM_CLASSES, **config)
        for layer in (model.modulation, model.modulation_out):  # they start at zero
            torch.nn.init.normal_(layer.weight, std=0.02)
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    pipe = PISDMCascadePipeline(cast_model(model.eval(), torch.bfloat16), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: PISDMCascadePipeline, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {"guidance_scale": 1.0, "num_inference_steps": steps, "output_type": "latent"}
    return pipe([207], generator=generator, **arguments).images


def time_sampling(pixels: int, compiled: bool, args: argparse.Namespace) -> dict:
    """Milliseconds per step of a whole call, by how the model runs."""
    pipe, steps = make_pipeline(pixels // VAE_FACTOR, args), 4 if args.rehearse else STEPS
    wanted, row = draw(pipe, steps), {"pixels": pixels}
    scale = wanted.abs().max().item()

    def time_way(name: str) -> None:
        start = now(args.device)
        difference = (draw(pipe, steps) - wanted).abs().max().item() / scale
        row[f"{name}_first_call_seconds"] = now(args.device) - start  # compiles or records
        seconds = []
        for _ in range(1 if args.rehearse else REPEATS):
            start = now(args.device)
            draw(pipe, steps)
            seconds.append(now(args.device) - start)
        row[f"{name}_ms_per_step"] = 1e3 * statistics.median(seconds) / steps
        row[f"{name}_difference"] = difference

    time_way("eager")
    if compiled:
        pipe.transformer.compile_repeated_blocks()
        time_way("compiled")
        return row | {"times_as_fast_as_eager": row["eager_ms_per_step"] / row["compiled_ms_per_step"]}
    pipe.enable_cuda_graphs()
    time_way("graphs")
    with kernels_of_before():
        time_way("graphs_before")
    row["times_as_fast_as_eager"] = row["eager_ms_per_step"] / row["graphs_ms_per_step"]
    row["times_as_fast_as_before"] = row["graphs_before_ms_per_step"] / row["graphs_ms_per_step"]
    return row


@contextmanager
def kernels_of_before() -> Iterator[None]:
    """Inside this context, a layer's norm, modulation and gate are plain operators, and the scan is as it was."""
    with force_backends(modulation="torch"), ExitStack() as settings:
        for name, value in scan.TRITON_SETTINGS["triton, before"].items():
            settings.enter_context(patch.object(triton_operator, name, value))
        yield


def count_kernels(pixels: int, before: bool, args: argparse.Namespace) -> dict:
    """Kernels of one pass: of the CUDA profiler's events, or in a rehearsal, torch's operators."""
    with kernels_of_before() if before else nullcontext():
        return {"before": before, **_count_kernels(pixels, args)}


def _count_kernels(pixels: int, args: argparse.Namespace) -> dict:
    pipe = make_pipeline(pixels // VAE_FACTOR, args)
    draw(pipe, 1)  # compiles kernels, builds tables
    is_cuda = args.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU
    side = pixels // VAE_FACTOR
    latents = torch.randn(1, 4, side, side, device=args.device, dtype=torch.bfloat16)
    inputs = (latents, torch.tensor([500], device=args.device), torch.tensor([207], device=args.device))
    with torch.no_grad(), torch.profiler.profile(activities=[activity]) as profile:
        pipe.transformer(*inputs)
        now(args.device)
    wanted = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() if event.device_type == wanted]
    kernels: dict[str, list[float]] = {}
    for event in events:
        kernels.setdefault(event.name[:80], []).append(event.device_time if is_cuda else event.cpu_time)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:25]
    return {
        "pixels": pixels,
        "kernels": len(events),
        "kernels_per_layer": len(events) / len(pipe.transformer.transformer_blocks),
        "microseconds": {name: [len(times), round(sum(times))] for name, times in longest},
    }


# Scan


def time_scan(shape: tuple[int, int, int], args: argparse.Namespace) -> dict:
    dtype = "bfloat16" if args.device.type == "cuda" else "float32"  # the CPU's peers take nothing else
    name = "x".join(map(str, shape))
    arguments = ["--device", args.device.type, "--dtype", dtype, "--output-dir", str(args.output_dir / f"scan_{name}")]
    arguments += ["--shapes", name, "--repeats", "1" if args.rehearse else "10"]
    arguments += ["--triton-settings"] if args.device.type == "cuda" else []
    return {"shape": list(shape), "rows": scan.main(arguments)}


# Training


def matrix_product_peak(args: argparse.Namespace) -> dict:
    """Operations per second of a large bfloat16 matrix product, the best of a few."""
    side = 128 if args.rehearse else 8192
    a, b = (torch.randn(side, side, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(3 if args.rehearse else 30):
        start = now(args.device)
        a @ b
        seconds.append(now(args.device) - start)
    return {"side": side, "tflops": 2e-12 * side**3 / min(seconds)}


def make_stage(model: str, size: str, args: argparse.Namespace) -> torch.nn.Module:
    """PIS-DM or a peer with as many parameters, on 32 x 32 pixels: 256 tokens, as of 256-pixel images in latents."""
    config = TOY if args.rehearse else PISDM_SIZES[size]
    config = {"sample_size": 32, "patch_size": 2, "in_channels": 3, "num_classes": NUM_CLASSES, **config}
    if model == "PIS-DM":
        return PISDMTransformer2DModel(**config)
    return PEERS[model](**equal_parameters(config, model).config)


def noise_images(size: int, args: argparse.Namespace) -> LabelledImages:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (256, 3, size, size), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, NUM_CLASSES, 256))
    return LabelledImages(images, labels, [str(i) for i in range(NUM_CLASSES)]).to(args.device)


def time_training(model: str, size: str, batch_size: int, record: bool, peak: float, args: argparse.Namespace) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=args.device.type == "cpu")
    with args.device:
        torch.manual_seed(0)
        stage = make_stage(model, size, args).train()
    objective = CascadeObjective([stage], [DDPMScheduler()]).to(args.device)
    with StepTrace() as trace:  # one image of each step costs the same
        images = torch.zeros(2, 3, 32, 32, device=args.device)
        objective([images], torch.zeros(2, dtype=torch.int64, device=args.device), seed=0).total.backward()
    flops = trace.flops / 2
    groups = parameter_groups(objective, 0.03)
    optimizer = make_optimizer(groups, 1e-4, (0.9, 0.999), 1e-8, capturable=args.device.type == "cuda")
    objective, optimizer = accelerator.prepare(objective, optimizer)
    average = EMAModel([p for p in objective.parameters() if p.requires_grad])
    rng, data = np.random.default_rng(0), noise_images(32, args)
    step = DeviceStep(accelerator, objective, optimizer, average, data, batch_size, max_grad_norm=1.0, record=record)

    def train(steps: int) -> float:
        start = now(args.device)
        for number in range(steps):
            step(rng.integers(0, 256, batch_size), number, 1e-4)
        return (now(args.device) - start) / steps

    train(WARM_UP_STEPS + 2)
    timed = 2 if args.rehearse else 20
    seconds = min(train(timed) for _ in range(1 if args.rehearse else 3))
    row = {
        "model": model,
        "size": size,
        "batch_size": batch_size,
        "recorded": record,
        "parameters": sum(p.numel() for p in stage.parameters()),
        "images_per_second": batch_size / seconds,
        "gflop_per_image": flops / 1e9,
        "share_of_peak": flops * batch_size / seconds / 1e12 / peak,
        "skipped_steps": step.skipped_steps.item(),
    }
    if args.device.type == "cuda":
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def time_trainer(args: argparse.Namespace) -> dict:
    """The loop of examples/train_pisdm.py, in turns with one that waits as it did before."""
    recipe, batch_size = read_recipe("emoji64"), 4 if args.rehearse else 64
    stages = [stage | (TOY if args.rehearse else {}) for stage in recipe.stages]
    settings = TrainerSettings(
        max_train_steps=10**6, train_batch_size=batch_size, logging_steps=0, validation_steps=0, checkpointing_steps=0
    )

    def make(waits: bool) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision="bf16", cpu=args.device.type == "cpu")
        with args.device:
            torch.manual_seed(0)
            transformers = [PISDMTransformer2DModel(num_classes=NUM_CLASSES, **stage) for stage in stages]
        schedulers = [DDPMScheduler(**recipe.scheduler) for _ in stages]
        objective = CascadeObjective(transformers, schedulers, batch_shares=recipe.training["batch_shares"])
        batches = DeviceBatches(noise_images(stages[-1]["sample_size"], args), batch_size, seed=0)
        trainer = Trainer(accelerator, objective.train(), batches, settings, args.output_dir)
        if waits:
            send, trainer.skips_on_device, trainer.average.foreach = trainer.outcomes.send, False, False
            trainer.outcomes.send = lambda outcome: send(outcome) + trainer.outcomes.flush()
        return trainer

    def train(trainer: Trainer, steps: int) -> float:
        start = now(args.device)
        for _ in range(steps):
            trainer.train_step()
        return steps * batch_size / (now(args.device) - start)

    trainers = {name: make(name == "waiting") for name in ("waiting", "as_it_is")}
    for trainer in trainers.values():
        train(trainer, WARM_UP_STEPS)
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(1 if args.rehearse else 3):
        for name, trainer in trainers.items():
            speeds[name].append(train(trainer, 1 if args.rehearse else 10))
    row = {f"{name}_images_per_second": statistics.median(found) for name, found in speeds.items()}
    row["times_as_fast"] = row["as_it_is_images_per_second"] / row["waiting_images_per_second"]
    return {"recipe": "emoji64", "batch_size": batch_size, **row}


def report_kernels(report: Report, args: argparse.Namespace) -> None:
    for pixels in (64,) if args.rehearse else (256, 1024):
        for before in (False, True):
            name = f"{pixels} px{', before' * before}"
            report.measure("kernels", name, partial(count_kernels, pixels, before, args))


def report_sampling(report: Report, args: argparse.Namespace) -> None:
    for pixels in (64,) if args.rehearse else (256, 1024, 512, 2048):
        report.measure("sampling", f"{pixels} px", partial(time_sampling, pixels, False, args))


def report_compiled(report: Report, args: argparse.Namespace) -> None:
    for pixels in (64,) if args.rehearse else (256, 1024):
        report.measure("compiled", f"{pixels} px", partial(time_sampling, pixels, True, args))


def report_training(report: Report, args: argparse.Namespace) -> None:
    report.measure("peak", "matrix product", lambda: matrix_product_peak(args))
    peak = report.content.get("peak", [{"tflops": float("nan")}])[0]["tflops"]
    is_cuda = args.device.type == "cuda"
    for size, batch_size in (("S", 4),) if args.rehearse else (("L", 64), ("S", 256)):
        for model, record in (("PIS-DM", is_cuda), ("DiT", is_cuda), ("PIS-DM", False)):
            name = f"{model}, {size}, {'recorded' if record else 'launched'}"
            report.measure("training", name, partial(time_training, model, size, batch_size, record, peak, args))


def report_trainer(report: Report, args: argparse.Namespace) -> None:
    report.measure("trainer", "emoji64", lambda: time_trainer(args))


def report_scan(report: Report, args: argparse.Namespace) -> None:
    for shape in [(1, 64, 32)] if args.rehearse else SCAN_SHAPES:
        report.measure("scan", "x".join(map(str, shape)), partial(time_scan, shape, args))


PARTS = {
    "kernels": report_kernels,
    "sampling": report_sampling,
    "training": report_training,
    "trainer": report_trainer,
    "scan": report_scan,
    "compiled": report_compiled,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="no measurement begins later than this")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these, in this order")
    parser.add_argument("--rehearse", action="store_true", help="in miniature, also without a GPU")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(arguments)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.type == "cpu" and not args.rehearse:
        parser.error("PyTorch finds no GPU here: --rehearse tries the script in miniature")

    report = Report(args)
    print_conditions(report.content["conditions"])
    for part in args.parts:
        PARTS[part](report, args)
    print(f"Wrote {args.output_dir / 'gpu_report.json'}; left out: {report.content['left_out'] or 'nothing'}")


if __name__ == "__main__":
    main()
