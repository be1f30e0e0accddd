"""Training, and what saves memory: checkpointing, casting, offloading. None may change what the model computes."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_pisdm.models.transformer_pisdm import PISDMBlock
from tests.models.tiny_model import make_inputs, make_model, mean_square_error_gradients


CPU = torch.device("cpu")


@torch.no_grad()
def run(model, dtype=torch.float32, **arguments):
    return model(**make_inputs(model, dtype=dtype, **arguments)).sample


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"long_skips": False, "num_padding_tokens": 0}], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(config):
    expected = mean_square_error_gradients(make_model(**config).train(), height=4)
    model = make_model(**config).train()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda block, args: calls.append(block))
    gradients = mean_square_error_gradients(model, height=4)
    assert len(calls) == 2 * len(model.transformer_blocks)  # each block ran again in the backward pass
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda message, name=name: f"{name}: {message}")

    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_checkpointed_model_samples_without_recomputing():
    model = make_model()
    model.enable_gradient_checkpointing()
    assert torch.equal(run(model), run(make_model()))


def test_training_reaches_every_parameter_and_lowers_the_loss():
    model = make_model().train()
    inputs = make_inputs(model)
    target = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = ((model(**inputs).sample - target) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_training_and_evaluation_mode_agree():
    model = make_model()
    expected = run(model)
    assert torch.equal(run(model.train()), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision(checkpointing):
    exact = mean_square_error_gradients(make_model().train())
    model = make_model().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = mean_square_error_gradients(model)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0) > 0.98, name


def test_half_precision_inputs_under_autocast():
    """Conditions and tokens are in the inputs' precision, as they are with weights of that precision."""
    model, seen = make_model(), {}
    for name in ("time_embedding", "noise_level_embedding", "local_in", "modulation", "transformer_blocks.0"):
        hook = lambda module, args, name=name: seen.update({name: args[0].dtype})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = run(model, dtype=torch.bfloat16)
    assert sample.dtype == torch.bfloat16 and set(seen.values()) == {torch.bfloat16} and len(seen) == 5
    expected = run(make_model())
    assert (sample.float() - expected).norm() < 0.1 * expected.norm()


def test_determinism():
    first, second = make_model().train(), make_model().train()
    assert torch.equal(run(first), run(second))
    gradients, again = mean_square_error_gradients(first), mean_square_error_gradients(second)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_does_not_change_its_inputs():
    model = make_model()
    inputs = make_inputs(model)
    copies = {name: value.clone() for name, value in inputs.items()}
    model(**inputs).sample.sum().backward()
    assert all(torch.equal(inputs[name], copies[name]) for name in inputs)


def test_inference_mode_first_then_training():
    """What is built and cached in inference mode must serve training of the same size afterwards."""
    model = make_model()
    with torch.inference_mode():
        model(**make_inputs(model, height=4, width=14))
    mean_square_error_gradients(model, height=4, width=14)


# --- Layerwise casting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "compute", "tolerance"),
    [
        (torch.float8_e4m3fn, torch.float32, 0.2),
        (torch.float8_e5m2, torch.float32, 0.3),
        (torch.float8_e4m3fn, torch.bfloat16, 0.2),
        (torch.float16, torch.float32, 1e-2),
    ],
    ids=str,
)
def test_layerwise_casting(storage, compute, tolerance):
    expected = run(make_model(pixel_head_channels=6))
    model = make_model(pixel_head_channels=6).to(compute)
    full_size = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    out = run(model, compute)
    assert out.dtype == compute
    assert (out.float() - expected).norm() / expected.norm() < tolerance

    # Cast are the large layers inside, and neither the model's ends nor what steers it or the scan.
    layers = {"in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "skip_proj", "linear_1", "linear_2"}
    for name, parameter in model.named_parameters():
        is_cast = not layers.isdisjoint(name.split(".")) or name.startswith("local_")
        assert parameter.dtype == (storage if is_cast else compute), name
    assert model.get_memory_footprint() < 0.8 * full_size


def test_what_is_not_cast_stays_so_beside_a_users_own_choice():
    """Which replaces diffusers' defaults, but not the model's."""
    model = make_model(pixel_head_channels=6)
    model.enable_layerwise_casting(torch.float16, torch.float32, skip_modules_pattern=("time_embedding",))
    kept = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    ends = {"patch_embed", "class_embedding", "proj_out", "pixel_head"}
    steering = {
        "padding_tokens",
        "modulation",
        "modulation_out",
        "transformer_blocks",
    }  # of the blocks, the scan's own
    assert kept == ends | steering | {"time_embedding"}


def test_layerwise_casting_trains():
    model = make_model().train()
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    sample = model(**make_inputs(model)).sample
    sample.pow(2).mean().backward()


# --- Offloading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "block_level", "num_blocks_per_group": 2, "non_blocking": True},
        {"offload_type": "leaf_level"},
    ],
    ids=str,
)
def test_group_offloading(arguments):
    model = make_model()
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **arguments)
    hooked = [module for module in model.modules() if hasattr(module, "_diffusers_hook")]
    assert len(hooked) > len(model.transformer_blocks) / 2
    assert torch.equal(run(model), run(make_model()))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_brings_every_parameter_in_time(offload_type):
    """With parameters that lie on the meta device outside their turn, a use too early or too late would show."""
    model = make_model()
    kwargs = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=offload_type, **kwargs)
    groups = {
        hook.group
        for module in model.modules()
        if hasattr(module, "_diffusers_hook")
        for hook in [module._diffusers_hook.get_hook("group_offloading")]
        if hook is not None
    }

    def tensors(group):
        for module in group.modules:
            yield from module.parameters()
        yield from group.parameters

    covered = {id(parameter) for group in groups for parameter in tensors(group)}
    assert {id(parameter) for parameter in model.parameters()} <= covered
    stored = {id(parameter): parameter.data for parameter in model.parameters()}
    for group in groups:

        def offload(group=group):
            for parameter in tensors(group):
                parameter.data = torch.full_like(stored[id(parameter)], float("nan"))

        def onload(group=group):
            for parameter in tensors(group):
                parameter.data = stored[id(parameter)]

        offload()
        group.onload_, group.offload_ = onload, offload
    out = run(model)
    assert out.isfinite().all()
    assert torch.equal(out, run(make_model()))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_to_disk(tmp_path, offload_type):
    model = make_model()
    kwargs = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(CPU, offload_type=offload_type, offload_to_disk_path=str(tmp_path), **kwargs)
    assert list(tmp_path.glob("*.safetensors"))
    with torch.inference_mode():
        assert torch.equal(run(model), run(make_model()))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_with_layerwise_casting(offload_type):
    model = make_model()
    kwargs = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=offload_type, **kwargs)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    expected = run(make_model())
    assert (run(model) - expected).norm() / expected.norm() < 1e-2


def meta_parameters(model):
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


def test_cpu_offload():
    model = cpu_offload(make_model(), execution_device=CPU)
    assert meta_parameters(model) == {name for name, _ in model.named_parameters()}
    assert torch.equal(run(model), run(make_model()))
    assert meta_parameters(model)  # and away again


def test_disk_offload(tmp_path):
    model = disk_offload(make_model(), tmp_path, execution_device=CPU)
    assert meta_parameters(model) == {name for name, _ in model.named_parameters()}
    assert torch.equal(run(model), run(make_model()))


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
@pytest.mark.parametrize("offloaded", [[0, 3], [0, 1, 2, 3]])
def test_blocks_offloaded_to_disk(tmp_path, offloaded):
    """A device map as `device_map="auto"` makes it for `_no_split_modules`: whole blocks, the rest in place."""
    model = make_model()
    names = [name for name, _ in model.named_children() if name != "transformer_blocks"]
    device_map = dict.fromkeys([*names, "padding_tokens"], "cpu")
    device_map |= {f"transformer_blocks.{i}": "disk" if i in offloaded else "cpu" for i in range(4)}
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert {name.split(".")[1] for name in meta_parameters(model)} == {str(i) for i in offloaded}
    assert torch.equal(run(model), run(make_model()))


def test_blocks_are_not_split_and_are_what_repeats():
    blocks = {type(module).__name__ for module in make_model().modules() if isinstance(module, PISDMBlock)}
    assert blocks == set(make_model()._no_split_modules) == set(make_model()._repeated_blocks)


# --- Memory ----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return out


def test_memory_grows_linearly_with_the_number_of_tokens():
    """No tensor of tokens x tokens, and none of tokens x channels x states."""
    model = make_model(num_layers=2)
    largest = []
    for size in (16, 32):
        with LargestTensor() as mode:
            run(model, height=size, width=size)
        largest.append(mode.elements)
    assert largest[1] < 4.5 * largest[0]
    assert largest[1] <= 2 * (2 + 256 + 16) * 4 * 32 + 1000  # batch x tokens x (2 x inner size)
