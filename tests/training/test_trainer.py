"""The training step against one written out with torch, and what a run counts, validates, saves and resumes."""

import copy
import importlib.util
import json
import math
import os
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.data.batches import TrainingBatches
from diffusers_pisdm.data.rows import TrainingBatch, TrainingRow
from diffusers_pisdm.models.latents import encode_latents
from diffusers_pisdm.training import CascadeObjective, image_pyramid
from diffusers_pisdm.training.checkpoints import CheckpointError, find_checkpoints, read_state
from diffusers_pisdm.training.metrics import read_metrics
from diffusers_pisdm.training.noise import noise_seed
from diffusers_pisdm.training.recipes import TrainerSettings
from diffusers_pisdm.training.trainer import RunState, Trainer
from diffusers_pisdm.utils.machine import DelayedReader


STAGE = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 8, "state_size": 4, "num_classes": 5}
CONFIGS = [{"sample_size": 4, **STAGE}, {"sample_size": 8, "low_res_channels": 3, **STAGE}]
SETTINGS = {
    **{"seed": 3, "max_train_steps": 4, "train_batch_size": 3, "gradient_accumulation_steps": 2},
    **{"learning_rate": 1e-2, "lr_warmup_steps": 2, "lr_cooldown_steps": 2, "adam_beta1": 0.8, "adam_beta2": 0.95},
    **{"adam_weight_decay": 0.3, "adam_epsilon": 1e-5, "max_grad_norm": 0.05, "ema_decay": 0.15},
    **{"logging_steps": 3, "validation_steps": 2, "checkpointing_steps": 2, "checkpoints_total_limit": 3},
}


class Rows:
    """Fourteen images of noise."""

    is_random, is_stream, bad, fingerprints = False, False, {}, {"a": "1", "b": "2"}

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(256, (14, 3, 8, 8), dtype=torch.uint8, generator=generator)

    def __len__(self):
        return len(self.images)

    def fingerprint(self):
        return self.fingerprints

    def read(self, index, epoch, seed):
        return TrainingRow(self.images[index], index % 5, self.bad.get(index, []))


@pytest.fixture
def objective():
    torch.manual_seed(0)
    stages = [PISDMTransformer2DModel(**config) for config in CONFIGS]
    for stage in stages:
        torch.nn.init.normal_(stage.proj_out.weight, std=0.1)  # zero at first: nothing below it would train
    return CascadeObjective(stages, [DDPMScheduler()] * 2, sil_weight=0.1)


@pytest.fixture
def make(objective, tmp_path):
    def make(rows=None, name="run", **options):
        settings = TrainerSettings(**{**SETTINGS, **options.pop("settings", {})})
        AcceleratorState._reset_state(reset_partial_state=True)  # each run is a process of its own, as it were
        cpu = options.pop("device", "cpu") == "cpu"
        accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=settings.gradient_accumulation_steps)
        batches = TrainingBatches(rows or Rows(), settings.train_batch_size, settings.seed)
        return Trainer(accelerator, copy.deepcopy(objective), batches, settings, tmp_path / name, **options)

    return make


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.objective.named_parameters()}


def test_steps_are_adamw_on_the_mean_gradient_of_the_micro_batches_clipped_and_averaged(make, objective):
    trainer = make()
    trainer.resume()
    trainer.objective.eval()  # as whoever looked at it may have left it
    trainer.train()

    # The same with torch alone: rates rise over two steps and fall over the last two; only matrices decay.
    batches = TrainingBatches(Rows(), 3, 3)
    named = dict(objective.train().named_parameters())
    undecayed = ("class_embedding", "padding_tokens", "scale_shift_table", "A_log")
    keep = [n for n, p in named.items() if p.ndim < 2 or any(part in undecayed for part in n.split("."))]
    adam = {"betas": (0.8, 0.95), "eps": 1e-5}
    groups = [
        {"params": [p for n, p in named.items() if n not in keep], "weight_decay": 0.3},
        {"params": [named[n] for n in keep], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **adam)
    average = {n: p.detach().clone() for n, p in named.items()}
    for step, factor in enumerate([1 / 2, 1.0, 1.0, 1 / 2]):
        for micro_step in range(2):
            images, labels, _ = next(batches)
            pyramid = image_pyramid(images.float() / 127.5 - 1, [4, 8])
            (objective(pyramid, labels, noise_seed(3, step, micro_step)).total / 2).backward()
        norm = torch.stack([p.grad.norm() for p in named.values() if p.grad is not None]).norm()
        assert norm > 0.05  # or clipping would not show
        for p in named.values():
            if p.grad is not None:
                p.grad *= 0.05 / (norm + 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.15, (1 + step) / (10 + step)) if step > 0 else 0.0  # it rises, as in diffusers
        for n, p in named.items():
            average[n].lerp_(p.detach(), 1 - decay)

    found = weights(trainer)
    for name, expected in named.items():
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-4, atol=1e-6)
    for name, shadow in zip(trainer.names, trainer.average.shadow_params):
        torch.testing.assert_close(shadow, average[f"stages.{name}"], rtol=1e-4, atol=1e-6)


def test_a_step_goes_through_whole_or_not_at_all(make, monkeypatch):
    trainer = make(settings={"max_skipped_steps": 1, "max_train_steps": 9})
    trainer.resume()
    trainer.objective.train()
    bad = [2, 5]
    break_loss(monkeypatch, bad)
    before, shadow = weights(trainer), [p.clone() for p in trainer.average.shadow_params]
    trainer.train_step()  # its second micro-batch is not finite
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer).items())
    assert all(torch.equal(*pair) for pair in zip(trainer.average.shadow_params, shadow))
    assert (trainer.state.step, trainer.state.skipped_steps, trainer.failures) == (1, 1, 1)
    assert all(p.grad is None or not p.grad.any() for p in trainer.objective.parameters())
    trainer.train_step()
    assert not all(torch.equal(p, before[n]) for n, p in weights(trainer).items())
    assert (trainer.state.step, trainer.state.skipped_steps, trainer.failures) == (2, 1, 0)
    trainer.train_step()
    assert (trainer.state.skipped_steps, trainer.failures) == (2, 1)
    bad[:] = range(7, 99)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row, up to step 4\..*--learning_rate"):
        trainer.train_step()


class LateReader(DelayedReader):
    """What a GPU's host sees, on a CPU: each outcome after the next step."""

    def send(self, tensor):
        arrived, self.sent = self.flush(), tensor.tolist()
        return arrived

    def flush(self):
        sent, self.sent = self.sent, None
        return [] if sent is None else [sent]


def break_loss(monkeypatch, steps, value=math.nan):
    """Makes the loss of these steps, counted from 1 (with one micro-batch each), not finite."""
    forward, calls = CascadeObjective.forward, []

    def broken(self, *arguments):
        losses = forward(self, *arguments)
        calls.append(1)
        return losses._replace(total=losses.total * value) if len(calls) in steps else losses

    monkeypatch.setattr(CascadeObjective, "forward", broken)


def test_outcomes_that_arrive_late_are_counted_before_logs_and_checkpoints(make, monkeypatch):
    break_loss(monkeypatch, (2, 3))
    settings = {"gradient_accumulation_steps": 1, "logging_steps": 2, "checkpointing_steps": 1, "validation_steps": 0}
    trainers = [make(settings=settings, name=name) for name in ("now", "late")]
    trainers[1].outcomes = LateReader()
    for trainer in trainers:
        trainer.resume()
        trainer.train()
        break_loss(monkeypatch, (2, 3))
    for step, skipped in {2: 1, 3: 2, 4: 2}.items():  # three checkpoints are kept
        states = [read_state(trainer.output_dir / f"checkpoint-{step}") for trainer in trainers]
        assert [state["skipped_steps"] for state in states] == [skipped] * 2
    rows = [[row["skipped_steps"] for row in read_metrics(trainer.metrics_file)] for trainer in trainers]
    assert rows == [[1, 2]] * 2
    assert all(torch.equal(p, weights(trainers[0])[name]) for name, p in weights(trainers[1]).items())


def test_a_divergence_or_signal_seen_late_stops_one_step_later(make, monkeypatch):
    break_loss(monkeypatch, range(2, 99))
    trainer = make(settings={"gradient_accumulation_steps": 1, "max_skipped_steps": 1, "logging_steps": 0})
    trainer.outcomes = LateReader()
    trainer.resume()
    for _ in range(3):
        trainer.train_step()
    assert trainer.failures == 1
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        trainer.train_step()

    trainer = make(settings={"logging_steps": 0, "checkpointing_steps": 0, "max_train_steps": 9}, name="signal")
    trainer.outcomes = LateReader()
    trainer.resume()
    monkeypatch.setattr(trainer.signals, "received", signal.SIGTERM)
    trainer.train_step()
    assert not trainer.stop_wanted
    trainer.train_step()
    assert trainer.stop_wanted


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too(make, monkeypatch):
    forward = CascadeObjective.forward
    monkeypatch.setattr(
        CascadeObjective, "forward", lambda *a: (losses := forward(*a))._replace(total=losses.total + math.inf)
    )
    trainer = make(settings={"max_skipped_steps": 9})
    trainer.resume()
    before = weights(trainer)
    trainer.train_step()
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())
    assert trainer.state.skipped_steps == 1 and trainer.meter.means("train") == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_waits_for_nothing_and_trains_as_one_that_waits(make, monkeypatch):
    settings = {"max_train_steps": 6, "logging_steps": 0, "checkpointing_steps": 0, "validation_steps": 0}
    late, waiting = (make(settings=settings, name=name, device="cuda") for name in ("late", "waiting"))
    waiting.skips_on_device = False
    for trainer in (late, waiting):
        trainer.resume()
        trainer.objective.train()
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if trainer is late and step > 1 else "default")
            try:
                trainer.train_step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for name, p in weights(late).items():
        torch.testing.assert_close(p, weights(waiting)[name], rtol=1e-3, atol=1e-5)
    for shadow, other in zip(late.average.shadow_params, waiting.average.shadow_params, strict=True):
        torch.testing.assert_close(shadow, other, rtol=1e-3, atol=1e-5)
    with monkeypatch.context() as patch:
        break_loss(patch, (2,))  # the second micro-batch
        before = weights(late)
        late.train_step()
        assert all(torch.equal(p, before[name]) for name, p in weights(late).items())
    assert late.state.skipped_steps == 0  # not known yet
    late.count_last_outcome()
    assert late.state.skipped_steps == 1


def test_a_gradient_that_is_not_finite_changes_nothing(make, monkeypatch):
    trainer = make()
    trainer.resume()
    trainer.objective.train()
    parameter = trainer.parameters[0]
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer)
    trainer.train_step()
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer).items())
    assert trainer.state.skipped_steps == 1


def test_it_logs_validates_and_saves_when_it_is_due_and_at_the_end(make):
    validated = []
    rows = Rows()
    trainer = make(
        name="runs/first",
        settings={"max_train_steps": 5},
        held_out_rows=rows,
        on_validation=lambda t: validated.append((t.state.step, weights(t), t.objective.training)),
    )
    trainer.resume()
    trainer.train()
    logged = read_metrics(trainer.output_dir / "metrics.jsonl")
    assert [row["step"] for row in logged if "train/denoising_1" in row] == [3, 5]
    assert [row["step"] for row in logged if "validation/denoising_2" in row] == [2, 4, 5]
    assert [step for step, _, _ in validated] == [2, 4, 5]
    assert sorted(path.name for path in trainer.output_dir.glob("checkpoint-*")) == [
        *("checkpoint-2", "checkpoint-4", "checkpoint-5")
    ]
    assert (trainer.output_dir / "checkpoint-4" / "validated").exists()  # as in the folders of earlier runs
    assert trainer.objective.training and not any(training for _, _, training in validated)
    shown, kept = validated[-1][1], weights(trainer)
    for name, shadow in zip(trainer.names, trainer.average.shadow_params):
        assert torch.equal(shown[f"stages.{name}"], shadow)
    assert any(not torch.equal(shown[name], kept[name]) for name in shown)  # the weights themselves are back

    losses = [row for row in logged if "validation/denoising_2" in row][-1]
    objective = copy.deepcopy(trainer.objective).eval()
    for name, shadow in zip(trainer.names, trainer.average.shadow_params):
        objective.stages.get_parameter(name).data.copy_(shadow)
    errors = []
    for place, first in enumerate(range(0, 14, 3)):
        pixels = rows.images[first : first + 3].float() / 127.5 - 1
        labels = torch.arange(first, min(first + 3, 14)) % 5
        with torch.no_grad():
            errors.append(objective(image_pyramid(pixels, [4, 8]), labels, noise_seed(3, place)).denoising)
    for stage in (0, 1):
        expected = torch.cat([batch[stage] for batch in errors]).mean().item()
        assert losses[f"validation/denoising_{stage + 1}"] == pytest.approx(expected, rel=1e-5)


def test_speed_and_counts_are_those_since_the_last_time(make, monkeypatch):
    rows = Rows()
    rows.bad = {4: ["four.png: torn"], 9: ["nine.png: empty"]}
    now = [100.0]
    monkeypatch.setattr("diffusers_pisdm.training.trainer.time.monotonic", lambda: now[0])
    trainer = make(rows, settings={"max_train_steps": 7, "logging_steps": 2, "validation_steps": 0})
    trainer.resume()
    step = Trainer.train_step

    def slow_step(self):
        step(self)
        now[0] += 4.0

    tracked = []
    monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: tracked.append({"step": step, **values}))
    monkeypatch.setattr(Trainer, "train_step", slow_step)
    trainer.train()
    logged = read_metrics(trainer.metrics_file)
    assert tracked == [{**row, "step": step} for step, row in zip((2, 4, 6, 7), logged, strict=True)]
    assert [row["images_per_second"] for row in logged] == [2 * 6 / 8, 2 * 6 / 8, 2 * 6 / 8, 6 / 4]
    assert [row["learning_rate"] for row in logged] == [1e-2, 1e-2, 1e-2, 5e-3]
    others = {"step", "images_per_second", "learning_rate", "peak_memory_gib", "skipped_steps", "bad_images"}
    assert {name for name in logged[0] if "/" not in name} == others and logged[0]["peak_memory_gib"] > 0
    told = (trainer.output_dir / "bad_images.txt").read_text().splitlines()
    assert sorted(told) == ["four.png: torn", "nine.png: empty"]  # once each, though they come again
    assert logged[-1]["bad_images"] == trainer.state.bad_images > 2
    with torch.device("meta"):  # nothing can be counted on the default device
        assert trainer.counts()["bad_images"] == trainer.state.bad_images
    assert read_state(trainer.output_dir / "checkpoint-7")["elapsed_seconds"] == 28.0


def test_the_time_a_run_will_take_is_told_after_five_steps(make, monkeypatch, capsys):
    """The first step may compile kernels and does not count; a resumed run counts its own steps."""
    now, shown = [50.0], []
    seconds = dict(enumerate([900.0, 2.0, 4.0, 6.0, 8.0], start=1))  # 5 a step
    monkeypatch.setattr("diffusers_pisdm.training.trainer.time.monotonic", lambda: now[0])
    step = Trainer.train_step

    def timed_step(self):
        step(self)
        now[0] += seconds.get(self.state.step - begun, 1.0)

    monkeypatch.setattr(Trainer, "train_step", timed_step)
    for begun, total, told in ((0, 7, "5 s a step, about 10 s to go"), (7, 12, None), (12, 20, "about 15 s to go")):
        trainer = make(
            settings={"max_train_steps": total, "logging_steps": 1, "validation_steps": 0, "checkpointing_steps": 0},
            on_validation=lambda trainer: shown.append(trainer.progress),
            title="Two stages",
        )
        trainer.resume()
        capsys.readouterr()
        trainer.train()
        said = capsys.readouterr()
        assert said.out.count("a step") == (told is not None) and (told or "") in said.out
        progress = shown.pop()
        assert (progress.desc, progress.initial, progress.n, progress.total) == ("Two stages", begun, total, total)
        losses = read_metrics(trainer.metrics_file)[-1]
        assert f"denoising_2={losses['train/denoising_2']:.3g}" in progress.postfix.replace(" ", "")
        assert "_t" not in progress.postfix and "learning_rate=" in progress.postfix
        assert "Two stages" in said.err
    assert [row["step"] for row in read_metrics(trainer.metrics_file)] == [*range(1, 21)]
    trainer.total_steps = None  # as for a benchmark
    trainer.tell_time(5.0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(Accelerator, "is_local_main_process", False)  # only one process of a machine tells
    trainer = make(name="other", settings={"max_train_steps": 6, "validation_steps": 0, "checkpointing_steps": 0})
    trainer.resume()
    trainer.train()
    said = capsys.readouterr()
    assert "a step" not in said.out and "6/6" not in said.err


@pytest.fixture
def second_of_two(monkeypatch):
    """Makes this process the second of two; returns what the first holds in place of the next values reduced."""
    first = []

    def reduce(self, tensor, reduction):
        total = tensor + (torch.as_tensor(first.pop(0)) if first else tensor)
        return {"sum": total, "mean": total / 2}[reduction]

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "process_index", 1)
    monkeypatch.setattr(Accelerator, "reduce", reduce)
    return first


def test_processes_count_and_stop_together(make, second_of_two):
    trainer = make(settings={"max_train_steps": 9})
    trainer.resume()
    trainer.objective.train()
    for step, (finite, stop, skipped) in enumerate([(1.0, 0.0, 0), (0.0, 0.0, 1), (1.0, 1.0, 1)], start=1):
        second_of_two.append([finite, stop])
        trainer.train_step()
        assert (trainer.state.step, trainer.state.skipped_steps) == (step, skipped)
        assert trainer.stop_wanted == (stop == 1) and trainer.failures == (finite < 1)
    second_of_two.append(0.0)  # the first's weights are not finite
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        trainer.check_weights()


def test_a_process_that_joins_on_resuming_reads_the_same_data_and_has_counted_nothing(make, second_of_two):
    first = make(settings={"max_train_steps": 3})
    first.resume()
    first.report_bad_images(["four.png: torn"])
    first.train()
    for known, bad_images in ((1, 0), (2, 7)):
        trainer = make()
        state_file = first.checkpoint / "trainer_state.json"
        state = read_state(first.checkpoint)
        state["processes"] = [state["processes"][0], {**state["processes"][0], "bad_images": 7}][:known]
        state_file.write_text(json.dumps({k: v for k, v in state.items() if k not in ("digest", "digests")}))
        trainer.resume()
        assert trainer.state.bad_images == bad_images and trainer.state.step == 3
        assert trainer.batches.state_dict() == first.batches.state_dict()


def test_numbers_logged_are_of_all_processes(make, second_of_two, monkeypatch, capsys):
    rows = Rows()
    now = [100.0]
    monkeypatch.setattr("diffusers_pisdm.training.trainer.time.monotonic", lambda: now[0])
    trainer = make(rows, held_out_rows=rows)
    trainer.resume()
    trainer.objective.train()
    trainer.report_bad_images(["four.png: torn", "nine.png: empty"])
    assert capsys.readouterr().out.splitlines()[-2:] == ["Skipped: four.png: torn", "Skipped: nine.png: empty"]
    trainer.train_step()
    now[0] += 4.0
    means, totals = trainer.meter.means("train"), trainer.meter.totals
    second_of_two += [torch.zeros_like(totals), 5.0]  # the first has no losses, and five bad images
    trainer.log_losses()
    (logged,) = read_metrics(trainer.metrics_file)
    assert logged["images_per_second"] == 2 * 2 * 3 / 4.0 and logged["bad_images"] == 7
    assert logged["train/denoising_1"] == pytest.approx(means["train/denoising_1"])

    # Every second row is this process's, but all rows where processes run each batch together.
    labels = [batch.labels.tolist() for _, batch in trainer.held_out_batches()]
    assert labels == [[1, 3, 0], [2, 4, 1], [3]]
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    assert torch.cat([batch.labels for _, batch in trainer.held_out_batches()]).tolist() == [i % 5 for i in range(14)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_with_the_same_bits_counts_and_time(make, optimizer):
    rows = Rows()
    rows.bad = {4: ["four.png: torn"]}
    options = {"max_train_steps": 6, "lr_cooldown_steps": 0, "optimizer": optimizer}
    whole = make(rows, settings=options)
    whole.resume()
    whole.train()
    first = make(rows, "again", settings=options)
    first.resume()
    first.total_steps = 5
    first.train()
    (first.output_dir / "checkpoint-5").rename(first.output_dir / "lost")  # as if killed after the step before
    state_file = first.output_dir / "checkpoint-4" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["digest"], state["digests"]  # they would give the change away; early checkpoints have neither
    state_file.write_text(json.dumps({**state, "elapsed_seconds": 1000.0, "skipped_steps": 2}))

    sheets = [first.output_dir / "samples" / f"step-{step:07d}.png" for step in (4, 5)]
    sheets[0].parent.mkdir()
    for sheet in sheets:
        sheet.touch()

    second = make(rows, "again", settings=options)
    second.resume()
    assert [sheet.exists() for sheet in sheets] == [True, False]
    assert (second.state.step, second.state.elapsed_seconds, second.state.skipped_steps) == (4, 1000.0, 2)
    assert second.state.bad_images == state["processes"][0]["bad_images"] > 0
    assert [row["step"] for row in read_metrics(second.metrics_file)] == [3]
    second.train()
    assert second.state.bad_images == whole.state.bad_images
    assert 1000.0 < second.state.elapsed_seconds < 1200.0
    for (name, expected), found in zip(weights(whole).items(), weights(second).values()):
        assert torch.equal(found, expected), name
    for expected, found in zip(whole.average.shadow_params, second.average.shadow_params):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("process_index", "num_processes", "places"), [(0, 1, (0, 1)), (1, 3, (1, 4))])
def test_images_become_the_latents_of_every_stage(make, monkeypatch, process_index, num_processes, places):
    """An image's noise is that of its place in the batch of all processes."""
    monkeypatch.setattr(Accelerator, "process_index", process_index)
    monkeypatch.setattr(Accelerator, "num_processes", num_processes)
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
    ).eval()
    trainer = make(vae=vae)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    found = trainer.make_pyramid(TrainingBatch(images, torch.zeros(2), []), seed=11)
    pixels = image_pyramid(images.float() / 127.5 - 1, [8, 16])
    generators = [torch.Generator().manual_seed(noise_seed(11, place)) for place in places]
    for latents, stage in zip(found, pixels, strict=True):
        with torch.no_grad():
            assert torch.equal(latents, encode_latents(vae, stage, generators))
    assert not any(latents.requires_grad for latents in found)
    cached = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
    assert all(map(torch.equal, trainer.make_pyramid(TrainingBatch(cached, torch.zeros(2), []), 0), cached))


def test_8_bit_adam_is_passed_on(make):
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed, and wants a GPU")
    with pytest.raises(ImportError, match="bitsandbytes"):
        make(settings={"use_8bit_adam": True})


def test_muon_needs_whole_matrices(make, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    with pytest.raises(ValueError, match=r"FSDP.*--optimizer adamw"):
        make(settings={"optimizer": "muon"})


def test_what_a_run_has_reached_is_kept_whole():
    state = RunState(step=1, elapsed_seconds=2.5, skipped_steps=3, bad_images=4)
    other = RunState()
    other.load_state_dict({**state.state_dict(), "files": {}})
    assert other == state


def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_resumes_to_the_same_bits(make, monkeypatch, capsys):
    options = {"max_train_steps": 6, "checkpointing_steps": 0, "validation_steps": 0}
    whole = make(settings=options)
    whole.resume()
    whole.train()
    step, before = Trainer.train_step, signal.getsignal(signal.SIGTERM)

    def interrupted(self):
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    validated = []
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    first = make(name="again", settings=options, on_validation=lambda trainer: validated.append(1))
    first.resume()
    first.train()
    assert first.stopped_by == signal.SIGTERM and not validated
    assert "Stopped after step 3. Rerun" in capsys.readouterr().out
    assert [path.name for path in find_checkpoints(first.output_dir)[0]] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(Trainer, "train_step", step)
    second = make(name="again", settings=options)
    second.resume()
    second.train()
    assert second.stopped_by is None
    for (name, expected), found in zip(weights(whole).items(), weights(second).values()):
        assert torch.equal(found, expected), name


def test_a_checkpoint_comes_before_validation_which_is_made_up_for(make):
    validated = []

    def fail(trainer):
        raise MemoryError("the system's")

    first = make(on_validation=fail)
    first.resume()
    with pytest.raises(MemoryError):
        first.train()
    assert [path.name for path in find_checkpoints(first.output_dir)[0]] == ["checkpoint-2"]
    for expected in ([2, 4], []):
        validated.clear()
        trainer = make(on_validation=lambda trainer: validated.append(trainer.state.step))
        trainer.resume()
        trainer.train()
        assert validated == expected


def test_what_a_run_can_do_without_is_told_once_and_costs_no_step(make, monkeypatch, capsys):
    def validate(trainer):
        trainer.attempt("drawing", lambda: 1 / 0)
        shutil.rmtree(trainer.checkpoint)

    trainer = make(on_validation=validate)
    monkeypatch.setattr(trainer.accelerator, "log", lambda *args, **kwargs: {}["no such run"])
    (trainer.output_dir / "samples" / "strips").mkdir(parents=True)
    (trainer.output_dir / "samples" / "strips" / "step-best.png").touch()
    (trainer.output_dir / "samples" / "step-0000009.png").mkdir()  # cannot be removed as a file
    trainer.resume()
    trainer.train()
    said = capsys.readouterr().out
    assert trainer.is_done and said.count("Warning") == 4
    assert said.count("drawing failed") == 1 and "ZeroDivisionError" in said
    assert said.count("logging to the tracker failed") == 1 and "no such run" in said
    for what in ("removing old samples", "marking a checkpoint as validated"):
        assert said.count(f"{what} failed") == 1


def test_a_full_disk_between_checkpoints_says_how_to_go_on(make, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    trainer = make()
    trainer.resume()
    monkeypatch.setattr("diffusers_pisdm.training.trainer.append_metrics", full)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl .*No space left.* free up space.* resume"):
        trainer.train()
    trainer = make(on_validation=full)
    with pytest.raises(CheckpointError, match=r"run could not be written .*No space left"):
        trainer.validate()


@pytest.mark.parametrize("when", ["save", "validate"])
def test_weights_that_are_not_finite_are_neither_resumed_nor_published(make, when):
    published = []
    trainer = make(on_validation=lambda trainer: published.append(1))
    with torch.no_grad():
        trainer.parameters[3].view(-1)[-1] = math.nan
    trainer.average.shadow_params[3].copy_(trainer.parameters[3].detach())
    with pytest.raises(FloatingPointError, match=r"not finite after step 0.*last checkpoint"):
        getattr(trainer, when)()
    assert not published and find_checkpoints(trainer.output_dir) == ([], {})


def test_changed_settings_are_applied_told_and_kept(make, capsys):
    first = make(settings={"max_train_steps": 2})
    first.resume()
    first.train()
    adam = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_weight_decay": 0.7, "adam_epsilon": 1e-3}
    second = make(settings={**adam, "ema_decay": 0.9})
    second.resume()
    decayed, undecayed = second.optimizer.param_groups
    assert (decayed["betas"], decayed["eps"], decayed["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.7)
    assert undecayed["weight_decay"] == 0.0
    said = capsys.readouterr().out
    for name in (*adam, "ema_decay", "max_train_steps"):
        assert said.count(f"--{name} was") == 1
    assert "--adam_weight_decay was 0.3, is 0.7 from step 2 on" in said and "--seed" not in said
    second.train()
    (changes,) = read_state(second.output_dir / "checkpoint-4")["changes"]
    assert changes["step"] == 2 and changes["adam_weight_decay"] == [0.3, 0.7]


def test_changed_data_are_told_by_class(make, capsys):
    first = make(settings={"max_train_steps": 2})
    first.resume()
    first.train()
    rows = Rows()
    for rows.fingerprints, told in (({"a": "1", "b": "2"}, None), ({"a": "1", "b": "3", "c": "4"}, "b, c")):
        make(rows).resume()
        said = capsys.readouterr().out
        assert ("data have changed" in said) == (told is not None) and (told or "") in said


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda objective: objective.schedulers.__setitem__(1, DDPMScheduler(prediction_type="sample")),
            "stage 2.*pred",
        ),
        (
            lambda objective: objective.schedulers.__setitem__(0, DDPMScheduler(beta_end=0.1)),
            "stage 1: noise schedule's beta_end was 0.02",
        ),
        (lambda objective: objective.stages[1].register_to_config(snake=True), "stage 2: snake was False, is True"),
        (lambda objective: objective.stages[0].requires_grad_(False), r"trained weights was \d+, is \d+"),
    ],
)
def test_another_runs_checkpoint_is_refused(make, objective, change, told):
    first = make(settings={"max_train_steps": 1}, class_names=["a", "b"])
    first.resume()
    first.train()
    with pytest.raises(CheckpointError, match="class 0 was 'a', is 'b'; class 1 was 'b', is 'a'"):
        make(class_names=["b", "a"]).resume()
    trainer = make(class_names=["a", "b"])
    trainer.settings.use_8bit_adam = True
    with pytest.raises(CheckpointError, match="use_8bit_adam was False, is True"):
        trainer.resume()
    with pytest.raises(CheckpointError, match="optimizer was None, is 'muon'"):
        make(class_names=["a", "b"], settings={"optimizer": "muon"}).resume()
    change(objective)
    with pytest.raises(CheckpointError, match=told):
        make(class_names=["a", "b"]).resume()


def test_a_run_started_anew_keeps_its_checkpoints_and_is_the_one_resumed(make):
    def run(steps, **settings):
        trainer = make(settings={"max_train_steps": steps, "checkpoints_total_limit": 2, **settings})
        trainer.resume()
        begun = trainer.state.step
        trainer.train()
        return begun, [path.name for path in find_checkpoints(trainer.output_dir)[0]]

    assert run(6) == (0, ["checkpoint-4", "checkpoint-6"])
    assert run(2, resume_from_checkpoint="none") == (0, ["checkpoint-6", "checkpoint-2"])
    assert run(4) == (2, ["checkpoint-2", "checkpoint-4"])
    assert run(3, resume_from_checkpoint="checkpoint-2") == (2, ["checkpoint-4", "checkpoint-3"])
    assert run(5) == (3, ["checkpoint-4", "checkpoint-5"])
