"""LoRA adapters on the model: diffusers' PeftAdapterMixin with the projections of the mixer as targets."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from diffusers_pisdm import PISDMTransformer2DModel
from tests.models.tiny_model import CONFIG, make_inputs, make_model, mean_square_error_gradients


# Two adapters on one model are meant here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

TARGETS = ["in_proj", "x_proj", "dt_proj", "out_proj", "skip_proj"]


@torch.no_grad()
def run(model):
    return model(**make_inputs(model)).sample


def lora_config(rank=4, seed=0, targets=("in_proj", "out_proj"), **config):
    torch.manual_seed(seed)
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False, **config)


def has_adapter(model):
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize("targets", [("in_proj", "out_proj"), TARGETS], ids=["in and out", "all"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_save_and_load(tmp_path, targets, use_dora):
    model = make_model()
    before = run(model)
    model.add_adapter(lora_config(targets=targets, use_dora=use_dora))
    adapted = run(model)
    assert (adapted - before).abs().max() > 1e-2

    model.save_lora_adapter(tmp_path)
    names = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    blocks = {name.split(".")[1] for name in names}
    assert blocks == {"0", "1", "2", "3"}
    assert {name.split(".lora")[0].split(".")[-1] for name in names} == set(targets)

    model.unload_lora()
    assert not has_adapter(model)
    assert torch.equal(run(model), before)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert has_adapter(model)
    torch.testing.assert_close(run(model), adapted)


def test_disable_and_delete():
    model = make_model()
    before = run(model)
    model.add_adapter(lora_config(), adapter_name="first")
    first = run(model)
    model.add_adapter(lora_config(seed=1), adapter_name="second")
    second = run(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("first")
    torch.testing.assert_close(run(model), first)
    model.set_adapters(["first", "second"], [0.5, 0.0])
    assert not torch.allclose(run(model), first, atol=1e-3)
    model.disable_lora()
    torch.testing.assert_close(run(model), before)
    model.enable_lora()
    model.delete_adapters("second")
    model.set_adapters(["first"], [1.0])
    torch.testing.assert_close(run(model), first)


def test_fuse_and_unfuse():
    model = make_model()
    before = run(model)
    model.add_adapter(lora_config(targets=TARGETS))
    adapted = run(model)
    model.fuse_lora()
    assert any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
    torch.testing.assert_close(run(model), adapted, atol=1e-4, rtol=1e-4)
    model.unfuse_lora()
    torch.testing.assert_close(run(model), adapted, atol=1e-4, rtol=1e-4)
    model.disable_lora()
    torch.testing.assert_close(run(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_trains(checkpointing):
    model = make_model()
    model.requires_grad_(False)
    model.add_adapter(lora_config(targets=TARGETS))
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    gradients = mean_square_error_gradients(model)
    assert gradients and all(".lora_" in name for name in gradients)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(("rank", "new_rank"), [(4, 4), (4, 8)])
def test_hotswap(tmp_path, rank, new_rank):
    outputs = []
    for seed, r in enumerate((rank, new_rank)):
        model = make_model()
        model.add_adapter(lora_config(rank=r, seed=seed))
        outputs.append(run(model))
        model.save_lora_adapter(tmp_path / str(seed))
    assert not torch.allclose(*outputs, atol=5e-3, rtol=5e-3)

    model = make_model()
    if rank != new_rank:
        model.enable_lora_hotswap(target_rank=max(rank, new_rank))
    file = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(str(tmp_path / "0" / file), adapter_name="adapter", prefix=None)
    torch.testing.assert_close(run(model), outputs[0], atol=1e-4, rtol=1e-4)
    model.load_lora_adapter(str(tmp_path / "1" / file), adapter_name="adapter", prefix=None, hotswap=True)
    torch.testing.assert_close(run(model), outputs[1], atol=1e-4, rtol=1e-4)


def test_unknown_adapter_is_named(tmp_path):
    model = make_model()
    model.add_adapter(lora_config())
    with pytest.raises(ValueError, match=r"^Adapter name foo not found in the model\.$"):
        model.save_lora_adapter(tmp_path, adapter_name="foo")


def test_adapter_has_an_effect_on_a_new_model():
    """As diffusers' tests of adapters do it: on a model as its constructor leaves it."""
    torch.manual_seed(0)
    model = PISDMTransformer2DModel(**CONFIG).eval()
    before = run(model)
    assert not (before == 0).all()
    model.add_adapter(lora_config())
    first = run(model)
    assert not torch.allclose(first, before, atol=1e-4, rtol=1e-4)
    model.add_adapter(lora_config(rank=8, seed=1), adapter_name="second")
    assert not torch.allclose(run(model), first, atol=5e-3, rtol=5e-3)
