import dataclasses
import importlib
import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.training import cost_estimate
from diffusers_pisdm.training.cost_estimate import (
    CostSettings,
    StageCost,
    StageSpeed,
    cost_report,
    estimate_cascade_cost,
    estimate_stage_cost,
    format_cost_report,
    measure_stage_speed,
)


NUM_CLASSES = 10
STAGE = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 6, "hidden_size": 64}
HIGHER_STAGE = STAGE | {"low_res_channels": 4}
SCAN = importlib.import_module("diffusers_pisdm.ops.selective_scan")


def make_model(config, **settings):
    return cost_estimate._make_stage(config, NUM_CLASSES, CostSettings(**settings))


def run_loss(model, batch_size, **settings):
    return cost_estimate._stage_loss(model, batch_size, CostSettings(**settings))


# --- Arithmetic ------------------------------------------------------------------------------------------------------


def flops_by_hand(config, conv_backward):
    """Forward, and forward and backward, of one image; `conv_backward` passes' worth for the causal convolution."""
    width, pixels = config["hidden_size"], 2 * 2
    lines = config["sample_size"] // 2
    tokens = lines**2
    length = 2 + tokens + lines  # prefix, image, one padding token a line
    inner, states, rank, kernel, frequencies = 2 * width, 16, math.ceil(width / 16), 3, 256
    inputs = config["in_channels"] + config.get("low_res_channels", 0)
    embeddings = 2 if "low_res_channels" in config else 1
    skips = config["num_layers"] // 2

    # A gradient for the inputs and one for the weights; the network's own inputs need none.
    first = 2 * tokens * width * inputs * pixels + embeddings * 2 * frequencies * width
    linear = embeddings * 2 * width * width + 2 * width * 5 * width  # embeddings' second layer, two modulations
    linear += 2 * tokens * width * config["in_channels"] * pixels  # output
    linear += 2 * 2 * tokens * width * 9  # local enhancement, depthwise 3 x 3, twice
    linear += skips * 2 * length * 2 * width * width
    linear += config["num_layers"] * 2 * length * inner * (2 * width + rank + 2 * states + rank + width)
    conv = config["num_layers"] * 2 * length * inner * kernel
    scan_steps = config["num_layers"] * length * inner * states
    forward = first + linear + conv + 7 * scan_steps
    return forward, forward + first + 2 * linear + conv_backward * conv + 20 * scan_steps


@pytest.mark.parametrize("config", [STAGE, HIGHER_STAGE], ids=["first", "higher"])
@pytest.mark.parametrize(("device_type", "conv_backward"), [("cpu", 3), ("cuda", 2)])  # recomputed, and not
def test_flops_are_those_counted_by_hand(config, device_type, conv_backward):
    settings = CostSettings(device_type=device_type, fused_scan=device_type == "cpu")
    cost = estimate_stage_cost(config, NUM_CLASSES, 3, settings)
    assert (cost.forward_flops, cost.training_flops) == flops_by_hand(config, conv_backward)


def test_checkpointing_runs_the_layers_forward_once_more():
    plain = estimate_stage_cost(STAGE, NUM_CLASSES, 2, CostSettings())
    checkpointed = estimate_stage_cost(STAGE, NUM_CLASSES, 2, CostSettings(gradient_checkpointing=True))
    assert checkpointed.forward_flops == plain.forward_flops
    # Torch stops when the last saved tensor is there: the last projection of a layer is not repeated.
    assert 0.6 * plain.forward_flops < checkpointed.training_flops - plain.training_flops < plain.forward_flops


def test_torchs_own_counter_agrees_on_a_real_forward_pass():
    with FlopCounterMode(display=False) as counter:
        run_loss(make_model(HIGHER_STAGE), 2)
    cost = estimate_stage_cost(HIGHER_STAGE, NUM_CLASSES, 2, CostSettings())
    assert counter.get_total_flops() == 2 * cost.forward_flops


def test_every_scan_and_convolution_of_the_package_has_a_formula():
    names = [name.removeprefix("diffusers_pisdm::") for name in torch._C._dispatch_get_all_op_names()]
    ours = {name.split(".")[0] for name in names if name.startswith(("selective_scan", "causal_conv"))}
    assert len(ours) >= 6
    assert [name for name in ours if getattr(torch.ops.diffusers_pisdm, name) not in flop_registry] == []


# --- Memory ----------------------------------------------------------------------------------------------------------


class SavedStorages:
    """Bytes of the distinct storages that autograd keeps, parameters left out."""

    def __init__(self, model):
        self.parameters = {id(p.untyped_storage()) for p in model.parameters()}
        self.kept = {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.parameters:
            self.kept[id(storage)] = storage  # held, so that no other storage gets its id
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.kept.values())


def really_saved_bytes(config, batch_size, **settings):
    model = make_model(config, **settings)
    saved = SavedStorages(model)

    def add_inputs(block, inputs):
        for tensor in inputs:
            saved.add(tensor)

    if settings.get("gradient_checkpointing"):  # keeps the layers' inputs, in a place that the hooks do not see
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(add_inputs)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        loss = run_loss(model, batch_size, **settings)
    size = saved.bytes
    loss.backward()
    return size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_saved_memory_is_what_a_real_model_saves(checkpointing, precision):
    settings = {"gradient_checkpointing": checkpointing, "mixed_precision": precision}
    real = really_saved_bytes(HIGHER_STAGE, 8, **settings)
    counted = estimate_stage_cost(HIGHER_STAGE, NUM_CLASSES, 8, CostSettings(**settings)).saved_bytes
    assert real <= counted < 1.06 * real  # outputs are alive, too


def test_checkpointing_saves_memory():
    plain = estimate_stage_cost(HIGHER_STAGE, NUM_CLASSES, 8, CostSettings())
    checkpointed = estimate_stage_cost(HIGHER_STAGE, NUM_CLASSES, 8, CostSettings(gradient_checkpointing=True))
    assert checkpointed.saved_bytes < 0.2 * plain.saved_bytes
    one_layer = plain.saved_bytes / STAGE["num_layers"]
    assert one_layer < checkpointed.working_bytes < 2 * one_layer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_the_allocators(checkpointing):
    """Against what torch's allocator says of a real step, which sees inside of operators, too."""
    model = make_model(HIGHER_STAGE, gradient_checkpointing=checkpointing)
    run_loss(model, 8).backward()  # compiles kernels and allocates the gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_loss(model, 8).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    settings = CostSettings(gradient_checkpointing=checkpointing)
    cost = estimate_stage_cost(HIGHER_STAGE, NUM_CLASSES, 8, settings)
    assert 0.92 * peak < cost.saved_bytes + cost.working_bytes <= 1.01 * peak


def test_state_by_arithmetic():
    def state(**settings):
        cost = estimate_stage_cost(STAGE | {"num_layers": 1}, NUM_CLASSES, 1, CostSettings(**settings))
        return cost.parameters, (cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.ema_bytes)

    model = PISDMTransformer2DModel(num_classes=NUM_CLASSES, **(STAGE | {"num_layers": 1}))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert state() == (count, (4 * count, 4 * count, 8 * count, 4 * count))
    assert state(mixed_precision="bf16") == state()
    assert state(num_processes=2, ema=False) == (count, (4 * count, 8 * count, 8 * count, 0))
    assert state(use_8bit_adam=True)[1][2] == pytest.approx(2 * count, rel=0.02)


def test_a_model_larger_than_this_machine_is_counted():
    huge = STAGE | {"num_layers": 3, "hidden_size": 65536}
    cost = estimate_stage_cost(huge, NUM_CLASSES, 4096, CostSettings())
    assert cost.weight_bytes > 300 * 2**30
    assert cost.saved_bytes > 1000 * 2**30


def test_the_scans_kernel_decides_what_is_saved(monkeypatch):
    def saved(**settings):
        return estimate_stage_cost(STAGE, NUM_CLASSES, 4, CostSettings(**settings)).saved_bytes

    fused, loop = saved(device_type="cuda", fused_scan=True), saved(device_type="cuda", fused_scan=False)
    assert 1.4 * fused < loop
    choose = SCAN._choose_backend
    monkeypatch.setattr(SCAN, "missing_backend", lambda backend: None)
    # A few kB of small tables are freed when Python collects garbage, sooner or later.
    assert saved(device_type="cuda") == pytest.approx(fused, rel=0.01)  # mamba_ssm is there
    monkeypatch.setattr(SCAN, "missing_backend", lambda backend: "not installed")
    assert saved(device_type="cuda") == pytest.approx(loop, rel=0.01)
    assert SCAN._choose_backend is choose


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="`mixed_precision` must be one of no, fp16, bf16, got fp8"):
        CostSettings(mixed_precision="fp8")


def test_stages_get_their_share_of_the_batch():
    tiny = STAGE | {"num_layers": 1}
    costs = estimate_cascade_cost([tiny, tiny], NUM_CLASSES, 8, CostSettings(), [1.0, 0.25])
    assert [cost.batch_size for cost in costs] == [8, 2]
    assert [cost.batch_size for cost in estimate_cascade_cost([tiny], NUM_CLASSES, 8, CostSettings())] == [8]


# --- Time ------------------------------------------------------------------------------------------------------------


def test_a_small_stage_is_run_whole():
    settings = CostSettings(gradient_checkpointing=True, mixed_precision="bf16")
    speed = measure_stage_speed(HIGHER_STAGE, NUM_CLASSES, 6, settings, "cpu", seconds=60)
    assert (speed.num_layers, speed.batch_size) == (6, 6)
    assert speed.flops_per_second > 0 and speed.updates_per_second > 0 and speed.seconds > 0


def test_without_time_two_layers_of_one_image_are_run():
    speed = measure_stage_speed(STAGE, NUM_CLASSES, 6, CostSettings(ema=False), "cpu", seconds=0)
    assert (speed.num_layers, speed.batch_size) == (2, 1)


def test_a_stage_that_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(cost_estimate, "free_memory", lambda device: 1000)
    assert measure_stage_speed(STAGE, NUM_CLASSES, 6, CostSettings(), "cpu") is None


def test_memory_limits_the_images_and_the_layers_that_are_run(monkeypatch):
    limit = estimate_stage_cost(STAGE | {"num_layers": 2}, NUM_CLASSES, 4, CostSettings()).total_bytes / 0.79
    monkeypatch.setattr(cost_estimate, "free_memory", lambda device: limit)
    speed = measure_stage_speed(STAGE, NUM_CLASSES, 64, CostSettings(), "cpu", seconds=60)
    assert (speed.num_layers, speed.batch_size) == (2, 4)


# --- Report ----------------------------------------------------------------------------------------------------------

COST = StageCost(
    sample_size=32,
    num_layers=49,
    batch_size=16,
    parameters=1000,
    forward_flops=100,
    training_flops=300,
    weight_bytes=4 * 2**30,
    gradient_bytes=4 * 2**30,
    optimizer_bytes=8 * 2**30,
    ema_bytes=4 * 2**30,
    saved_bytes=10 * 2**30,
    working_bytes=2 * 2**30,
)
SPEED = StageSpeed(num_layers=2, batch_size=4, flops_per_second=1200.0, updates_per_second=500.0, seconds=3.0)


def test_report_adds_up():
    higher = dataclasses.replace(COST, batch_size=8, parameters=2000)
    settings = CostSettings(num_processes=2, gradient_accumulation_steps=3)
    report = json.loads(json.dumps(cost_report([COST, higher], settings, 16, 864, [SPEED, SPEED])))
    assert report["stages"][0]["seconds_per_step"] == 3 * 16 * 300 / 1200 + 1000 / 500
    assert report["stages"][1]["seconds_per_step"] == 3 * 8 * 300 / 1200 + 2000 / 500
    total = report["total"]
    assert total["parameters"] == 3000
    assert total["flops_per_step"] == 3 * (16 + 8) * 300
    assert total["total_bytes"] == 2 * (20 + 10 + 2) * 2**30
    assert total["images_per_step"] == 16 * 3 * 2
    assert total["seconds_per_step"] == 24
    assert total["images_per_second"] == 4
    assert total["days"] == pytest.approx(864 * 24 / 86400)


def test_the_table_says_what_is_measured():
    text = format_cost_report(cost_report([COST], CostSettings(), 16, 500_000, [SPEED]))
    line = next(line for line in text.splitlines() if line.lstrip().startswith("1 "))
    assert "2 layers, 4 im." in line
    assert "Memory: 32 GiB a process (mixed precision no, no gradient checkpointing)" in text
    assert "extrapolated" in text and "images/s" in text and "500,000 steps" in text
    whole = dataclasses.replace(SPEED, num_layers=49)
    assert "all layers, 4 im." in format_cost_report(cost_report([COST], CostSettings(), 16, 1, [whole]))


def test_the_table_says_why_there_is_no_time():
    text = format_cost_report(cost_report([COST, COST], CostSettings(), 16, 1, [SPEED, None]))
    assert "does not fit" in text and "Time: unknown" in text
    text = format_cost_report(cost_report([COST], CostSettings(), 16, 1))
    assert "does not fit" not in text and "Time: not measured." in text
