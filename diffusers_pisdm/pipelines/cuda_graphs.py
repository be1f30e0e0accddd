"""Runs a pipeline's models as CUDA graphs: a pass's kernels are launched all at once, not one by one by the host."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops.cached_table import collect_tables
from ..ops.common.backends import forced_backend


logger = logging.getLogger(__name__)

Inputs = dict[str, torch.Tensor]
Run = Callable[[], torch.Tensor]


class CudaRecorder:
    """Records what a function launches. All recordings of a device share a pool of memory."""

    device_type = "cuda"

    def __init__(self):
        self.pools: dict[torch.device, Any] = {}

    def __call__(self, run: Run, device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
        """Returns what replays `run` and the tensor that each replay writes; `run` itself computes nothing here."""
        pool = self.pools.setdefault(device, torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output


@dataclass
class Recording:
    """A pass at fixed addresses: it reads `inputs` and `tables`, and writes `output`."""

    inputs: Inputs
    replay: Callable[[], None] | None = None  # None until the second pass, or if it failed
    output: torch.Tensor | None = None
    tables: list | None = None  # scan orders and positions, which their cache may drop
    failed: bool = False


class CudaGraphs:
    """
    The recorded passes of a pipeline's models.

    A recording is for one model, input shapes and dtypes, and the settings of torch and our operators. The first such
    pass runs as ever, which compiles kernels and builds tables; the second is recorded; from then on it is replayed.
    Models that cannot be recorded (with hooks, compiled, in training, on another device) always run as ever.

    Args:
        max_graphs (`int`): How many recordings are kept, the most recently used ones.
        recorder (`Callable`, *optional*): What records a pass; a [`CudaRecorder`] by default.
    """

    def __init__(self, max_graphs: int, recorder: CudaRecorder | None = None):
        self.max_graphs = max_graphs
        self.recorder = CudaRecorder() if recorder is None else recorder
        self.recordings: OrderedDict[tuple, Recording] = OrderedDict()
        self.states: dict[weakref.ref[nn.Module], tuple] = {}

    def __reduce__(self) -> tuple:
        return CudaGraphs, (self.max_graphs,)  # copies and pickles record anew

    def check(self, models: list[nn.Module]) -> None:
        """Drops the recordings of other models, and those of models whose weights, adapters, hooks or mode changed."""
        before, self.states = self.states, {weakref.ref(model): self.state_of(model) for model in models}
        for key in list(self.recordings):
            model = key[0]
            if model not in self.states or self.states[model] != before.get(model):
                del self.recordings[key]

    def state_of(self, model: nn.Module) -> tuple:
        return is_recordable(model, self.recorder.device_type), weight_addresses(model), adapter_strengths(model)

    def __call__(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Returns the sample of [`run_model`], in memory of its own."""
        recordable, *_ = self.states[weakref.ref(model)]
        if not recordable or torch.is_grad_enabled():
            return run_model(model, inputs)
        key = (weakref.ref(model), *describe_inputs(inputs), *describe_settings())
        recording = self.recordings.get(key)
        if recording is None:
            recording = Recording({name: tensor.clone() for name, tensor in inputs.items()})
            self.recordings[key] = recording
            while len(self.recordings) > self.max_graphs:
                self.recordings.popitem(last=False)
            return run_model(model, recording.inputs)
        self.recordings.move_to_end(key)
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor)
        if recording.replay is None and not recording.failed:
            self.record(model, recording)
        if recording.failed:
            return run_model(model, recording.inputs)
        recording.replay()
        return recording.output.clone()

    def record(self, model: nn.Module, recording: Recording) -> None:
        device = next(iter(recording.inputs.values())).device
        try:
            with collect_tables() as tables:
                replay, output = self.recorder(lambda: run_model(model, recording.inputs), device)
        except RuntimeError as error:
            logger.warning(f"A {type(model).__name__} runs without a CUDA graph, as recording failed: {error}")
            recording.failed = True
        else:
            recording.replay, recording.output, recording.tables = replay, output, tables


def run_model(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Returns a model's sample. As everywhere in diffusers, the latents are its positional argument."""
    rest = {name: tensor for name, tensor in inputs.items() if name != "hidden_states"}
    return model(inputs["hidden_states"], **rest, return_dict=False)[0]


def is_recordable(model: nn.Module, device_type: str) -> bool:
    """Whether all of a model runs on the device, as its classes say: hooks (offloading, casting) replace `forward`."""
    if model.training or any(p.device.type != device_type for p in model.parameters()):
        return False
    return not any(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._compiled_call_impl is not None
        or isinstance(module, torch._dynamo.OptimizedModule)
        for module in model.modules()
    )


def weight_addresses(model: nn.Module) -> tuple[tuple, ...]:
    tensors = (*model.parameters(), *model.buffers())
    return tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors)


def adapter_strengths(model: nn.Module) -> tuple[tuple, ...]:
    """What PEFT's layers read from Python in a pass: which adapters are active, how strong, and which are fused."""
    strengths = []
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            active = tuple((name, layer.scaling[name]) for name in layer.active_adapters if name in layer.scaling)
            strengths.append((layer.disable_adapters, tuple(layer.merged_adapters), active))
    return tuple(strengths)


def describe_inputs(inputs: Inputs) -> tuple[tuple, ...]:
    return tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in inputs.items())


def describe_settings() -> tuple:
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        forced_backend("selective_scan"),
        forced_backend("causal_conv"),
        forced_backend("modulation"),
    )
