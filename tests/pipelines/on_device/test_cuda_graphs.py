"""CUDA graphs of a pipeline's models: what is recorded, when it is recorded anew, and that images stay the same."""

import copy
import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch

from diffusers_pisdm.models.transformer_pisdm import sincos_position_embedding
from diffusers_pisdm.ops.common.backends import force_backends
from diffusers_pisdm.pipelines.cuda_graphs import CudaGraphs
from diffusers_pisdm.training.fine_tuning import add_lora
from tests.pipelines.tiny_cascade import generators, make_cascade


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2


class Rerun:
    """Stands in for a CUDA graph on the CPU: computes anew from the recorded inputs, into the recorded output."""

    device_type = "cpu"

    def __init__(self):
        self.recorded = 0

    def __call__(self, run, device):
        assert device == torch.device("cpu")
        self.recorded += 1
        output = run()
        return lambda: output.copy_(run()), output


def record(pipe, max_graphs=8):
    """Enables graphs with a recorder for this machine, and returns it."""
    recorder = None if torch.cuda.is_available() else Rerun()
    pipe.enable_cuda_graphs(max_graphs)
    pipe._cuda_graphs = CudaGraphs(max_graphs, recorder)
    return recorder


def draw(pipe, labels=(1, 2), **arguments):
    arguments = {"num_inference_steps": 4, "output_type": "latent", "generator": generators(0, 1)} | arguments
    return pipe(list(labels), **arguments).images


def make_adapted():
    pipe = make_cascade(2)
    for transformer in pipe.stages:
        add_lora(transformer, rank=2, alpha=4.0)
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return pipe


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        ({}, 2),
        ({"guidance_scale": 1.0}, 2),
        ({"guidance_start": [0.5, 0.0], "guidance_stop": 1.0}, 3),  # a stage that is guided for half of its steps
        ({"labels": [{1: 0.5, 3: 0.5}, 2]}, 2),
    ],
    ids=["guided", "not guided", "both", "mixed classes"],
)
def test_images_are_the_same_and_passes_recorded_once(arguments, recorded):
    wanted = draw(make_cascade(2), **arguments)
    pipe = make_cascade(2)
    recorder = record(pipe)
    for _ in range(2):
        assert torch.equal(draw(pipe, **arguments), wanted)
    assert recorder.recorded == recorded
    assert not torch.equal(draw(pipe, **arguments, generator=generators(2, 3)), wanted)
    assert recorder.recorded == recorded


def test_a_pass_is_replayed_from_its_second_time_on(monkeypatch):
    pipe, passes = make_cascade(1), []
    recorder = record(pipe)
    forward = type(pipe.transformer).forward
    monkeypatch.setattr(
        type(pipe.transformer),
        "forward",
        lambda *args, **kwargs: passes.append(recorder.recorded) or forward(*args, **kwargs),
    )
    draw(pipe, num_inference_steps=3)
    assert passes == [0, 1, 1, 1]  # as ever; recorded, and replayed at once; replayed


def test_outputs_are_kept_apart():
    """Some schedulers hold on to the model's outputs of earlier steps."""
    model = make_cascade(1).transformer
    graphs = CudaGraphs(8, Rerun())
    graphs.check([model])
    inputs = [
        {"hidden_states": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([t]), "class_labels": torch.tensor([t])}
        for t in range(4)
    ]
    with torch.no_grad():
        outputs = [graphs(model, one) for one in inputs]
        for one, output in zip(inputs, outputs):
            assert torch.equal(output, model(**one).sample)
    assert graphs(model, inputs[0]).requires_grad  # nothing is recorded where a gradient is wanted


@contextmanager
def autocast(dtype):
    """`torch.autocast("cuda")`, which does nothing without a GPU."""
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True), torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled), torch.set_autocast_dtype("cuda", before)


@contextmanager
def setting(get, change, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


def test_each_setting_has_a_recording_of_its_own():
    model, recorder = make_cascade(1).transformer, Rerun()
    graphs = CudaGraphs(99, recorder)
    graphs.check([model])
    inputs = {"hidden_states": torch.randn(1, 3, 8, 8), "timestep": torch.tensor(5), "class_labels": torch.tensor([1])}
    wanted = model(**inputs).sample
    tf32 = torch.backends.cudnn
    settings = [
        nullcontext(),
        torch.inference_mode(),
        autocast(torch.bfloat16),
        autocast(torch.float16),
        setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
        setting(lambda: tf32.allow_tf32, lambda value: setattr(tf32, "allow_tf32", value), not tf32.allow_tf32),
        setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
        force_backends(selective_scan="torch"),
        force_backends(causal_conv="torch"),
        force_backends(modulation="torch"),
    ]
    for number, context in enumerate(settings, start=1):
        with torch.no_grad(), context:
            for _ in range(3):
                torch.testing.assert_close(graphs(model, inputs), wanted, atol=1e-4, rtol=1e-4)
        assert recorder.recorded == number
    with torch.no_grad():
        graphs(model, inputs)
    assert recorder.recorded == len(settings)  # back to the first
    between = {**inputs, "timestep": torch.tensor(5.5)}
    with torch.no_grad():
        assert torch.equal(graphs(model, between), model(**between).sample)


def test_sizes_batches_and_precisions_are_recorded_apart_and_the_oldest_dropped():
    pipe = make_cascade(1)
    recorder = record(pipe, max_graphs=2)
    wanted = draw(make_cascade(1), labels=[1], generator=generators(0))
    for recorded, arguments in (
        (1, {}),
        (2, {"labels": [1], "generator": generators(0)}),
        (2, {}),
        (3, {"height": 16, "width": 8}),
        (3, {}),
        (4, {"labels": [1], "generator": generators(0)}),  # dropped as the least recently used
    ):
        latents = draw(pipe, **arguments)
        assert recorder.recorded == recorded
    assert torch.equal(latents, wanted)
    pipe.transformer.to(torch.bfloat16)
    draw(pipe)
    assert recorder.recorded == 5


def test_tables_outlive_their_cache():
    pipe = make_cascade(1)
    record(pipe)
    draw(pipe)
    (recording,) = pipe._cuda_graphs.recordings.values()
    positions = sincos_position_embedding(4, 4, 16, 4, device=torch.device("cpu"))
    assert any(table is positions for table in recording.tables) and len(recording.tables) > 1


def change_weights(pipe):
    pipe.transformer_2.proj_out.weight = torch.nn.Parameter(pipe.transformer_2.proj_out.weight.data * 2)


def weaken(pipe):
    pipe.set_adapters("default", 0.25)


@pytest.mark.parametrize(
    "change",
    [
        change_weights,
        weaken,
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ],
    ids=["weights", "strength", "disabled", "fused", "unloaded"],
)
def test_what_changes_a_model_is_seen(change):
    pipe, eager = make_adapted(), make_adapted()
    recorder = record(pipe)
    before = draw(pipe)
    recorded = recorder.recorded
    change(pipe), change(eager)
    after = draw(pipe)
    assert torch.equal(after, draw(eager)) and recorder.recorded > recorded
    fused = pipe.num_fused_loras > 0
    assert fused or not torch.equal(after, before)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_strength_for_one_call_is_seen(scale):
    pipe, eager = make_adapted(), make_adapted()
    record(pipe)
    usual = draw(pipe)
    arguments = {"attention_kwargs": {"scale": scale}}
    assert torch.equal(draw(pipe, **arguments), draw(eager, **arguments))
    assert torch.equal(draw(pipe), usual)


def test_a_callback_may_change_adapters_between_steps():
    def weaken_halfway(pipe, step, timestep, callback_kwargs):
        pipe.set_adapters("default", 1.0 if step < 2 else 0.1)
        return {}

    pipe, eager = make_adapted(), make_adapted()
    record(pipe)
    arguments = {"num_inference_steps": 6, "callback_on_step_end": weaken_halfway}
    assert torch.equal(draw(pipe, **arguments), draw(eager, **arguments))


def hook(pipe):
    pipe.transformer.register_forward_hook(lambda module, inputs, outputs: None)


def compile_a_block(pipe):
    blocks = pipe.transformer.transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")


def cast(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def offload(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, execution_device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        hook,
        lambda pipe: pipe.transformer.norm_out.register_forward_pre_hook(lambda module, inputs: None),
        compile_a_block,
        cast,
        offload,
        lambda pipe: pipe.transformer.train(),
        lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
        lambda pipe: pipe.transformer.compile(backend="eager"),
    ],
    ids=[
        "hook",
        "hook before",
        "a compiled block",
        "casting",
        "offloading",
        "training",
        "compiled blocks",
        "compiled",
    ],
)
def test_what_cannot_be_recorded_runs_as_ever(change):
    pipe, eager = make_cascade(1), make_cascade(1)
    recorder = record(pipe)
    draw(pipe)
    change(pipe), change(eager)
    assert torch.equal(draw(pipe), draw(eager)) and recorder.recorded == 1
    assert not pipe._cuda_graphs.recordings  # their memory is free


def test_a_pass_that_cannot_be_recorded_is_told_once(caplog):
    def fail(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    fail.device_type = "cpu"
    pipe = make_cascade(1)
    pipe._cuda_graphs = CudaGraphs(8, fail)
    with caplog.at_level(logging.WARNING, logger=CudaGraphs.__module__):
        latents = draw(pipe)
    assert torch.equal(latents, draw(make_cascade(1)))
    (warning,) = caplog.messages
    assert caplog.records[0].name == CudaGraphs.__module__
    assert "PISDMTransformer2DModel" in warning and "not permitted" in warning


def test_recordings_end_with_their_pipeline_device_or_model():
    pipe = make_cascade(2)
    record(pipe)
    draw(pipe)
    assert len(pipe._cuda_graphs.recordings) == 2
    assert not copy.deepcopy(pipe._cuda_graphs).recordings
    other = type(pipe).from_pipe(pipe)
    assert other._cuda_graphs.max_graphs == 8 and not other._cuda_graphs.recordings
    pipe.transformer_2 = make_cascade(2).transformer_2
    draw(pipe)
    assert len(pipe._cuda_graphs.recordings) == 2  # the old model's is gone
    pipe.to("cpu")
    assert not pipe._cuda_graphs.recordings
    pipe.disable_cuda_graphs()
    assert pipe._cuda_graphs is None


def test_without_a_gpu_models_run_as_ever():
    pipe = make_cascade(1)
    pipe.enable_cuda_graphs()
    assert torch.equal(draw(pipe), draw(make_cascade(1)))
    assert not pipe._cuda_graphs.recordings


@pytest.mark.parametrize("number", [0, True, 1.5, None])
def test_a_number_of_graphs_is_a_positive_integer(number):
    with pytest.raises(ValueError, match=r"`max_graphs` .* positive integer"):
        make_cascade(1).enable_cuda_graphs(number)
