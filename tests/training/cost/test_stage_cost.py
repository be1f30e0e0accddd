import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.ops.common.backends import forced_backend
from diffusers_pisdm.ops.scan import dispatch
from diffusers_pisdm.training.cost.stage_cost import CostSettings, estimate_cascade_cost, estimate_stage_cost
from tests.training.cost.cost_stages import HIGHER_STAGE, NUM_CLASSES, STAGE, make_model, run_loss


def test_checkpointing_runs_the_layers_forward_once_more():
    plain = estimate_stage_cost(STAGE, NUM_CLASSES, 2, CostSettings())
    checkpointed = estimate_stage_cost(STAGE, NUM_CLASSES, 2, CostSettings(gradient_checkpointing=True))
    assert checkpointed.forward_flops == plain.forward_flops
    # Torch stops when the last saved tensor is there: the last projection of a layer is not repeated.
    assert 0.6 * plain.forward_flops < checkpointed.training_flops - plain.training_flops < plain.forward_flops


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
    block = model.transformer_blocks[0].mixer
    matrices = [getattr(block, name).weight.numel() for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    assert state(optimizer="muon")[1][2] == 8 * count - 4 * sum(matrices)


def test_a_model_larger_than_this_machine_is_counted():
    huge = STAGE | {"num_layers": 25, "hidden_size": 8192}
    cost = estimate_stage_cost(huge, NUM_CLASSES, 4096, CostSettings())
    assert cost.weight_bytes > 40 * 2**30
    assert cost.saved_bytes > 1000 * 2**30


def test_the_scans_kernel_decides_what_is_saved(monkeypatch):
    def saved(**settings):
        return estimate_stage_cost(STAGE, NUM_CLASSES, 4, CostSettings(**settings)).saved_bytes

    fused, loop = saved(device_type="cuda", fused_scan=True), saved(device_type="cuda", fused_scan=False)
    assert 1.4 * fused < loop
    monkeypatch.setattr(dispatch, "missing_backend", lambda backend: None)
    # A few kB of small tables are freed when Python collects garbage, sooner or later.
    assert saved(device_type="cuda") == pytest.approx(fused, rel=0.01)  # mamba_ssm is there
    assert forced_backend("selective_scan") is None  # after the estimate, auto is free again
    monkeypatch.setattr(dispatch, "missing_backend", lambda backend: "not installed")
    assert saved(device_type="cuda") == pytest.approx(loop, rel=0.01)


def test_stages_get_their_share_of_the_batch():
    tiny = STAGE | {"num_layers": 1}
    costs = estimate_cascade_cost([tiny, tiny], NUM_CLASSES, 8, CostSettings(), [1.0, 0.25])
    assert [cost.batch_size for cost in costs] == [8, 2]
    assert [cost.batch_size for cost in estimate_cascade_cost([tiny], NUM_CLASSES, 8, CostSettings())] == [8]


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="`mixed_precision` must be one of no, fp16, bf16, got fp8"):
        CostSettings(mixed_precision="fp8")


@pytest.mark.parametrize("config", [STAGE, HIGHER_STAGE], ids=["first", "higher"])
def test_the_loss_reaches_every_parameter(config):
    model = make_model(config | {"num_layers": 2})
    run_loss(model, 2).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_stage_is_set_up_for_training(checkpointing):
    model = make_model(STAGE | {"num_layers": 2}, gradient_checkpointing=checkpointing)
    assert model.training and model.is_gradient_checkpointing == checkpointing


def test_the_precision_is_that_of_the_settings():
    model = make_model(STAGE | {"num_layers": 2})
    dtypes = []
    model.transformer_blocks[0].mixer.in_proj.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    assert run_loss(model, 1).dtype == run_loss(model, 1, mixed_precision="bf16").dtype == torch.float32
    assert dtypes == [torch.float32, torch.bfloat16]
