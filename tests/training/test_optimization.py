import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from diffusers_pisdm import DiMTransformer2DModel, PISDMTransformer2DModel
from diffusers_pisdm.training import optimization
from diffusers_pisdm.training.optimization import (
    learning_rate_factor,
    make_optimizer,
    orthogonalize,
    parameter_groups,
)


def test_vectors_embeddings_pads_and_scan_parameters_do_not_decay():
    model = PISDMTransformer2DModel(8, 2, 3, num_layers=3, hidden_size=16, num_classes=4, low_res_channels=3)
    groups = parameter_groups(model, weight_decay=0.03)
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]
    decayed, undecayed = ({id(p) for p in group["params"]} for group in groups)
    assert decayed.isdisjoint(undecayed)
    assert len(decayed | undecayed) == len(list(model.parameters()))

    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[i] for i in undecayed}
    for name in ("A_log", "D", "dt_bias", "conv1d.bias"):
        assert f"transformer_blocks.0.mixer.{name}" in kept
    assert {"padding_tokens", "class_embedding.weight", "transformer_blocks.1.scale_shift_table"} <= kept
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"):
        assert f"transformer_blocks.0.mixer.{name}.weight" not in kept


def test_frozen_parameters_are_in_no_group():
    model = torch.nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [0, 1]


def test_the_layers_matrices_are_muons():
    model = PISDMTransformer2DModel(8, 2, 3, num_layers=3, hidden_size=16, num_classes=4, low_res_channels=3)
    plain, groups = parameter_groups(model, 0.03), parameter_groups(model, 0.03, "muon")
    names = {id(p): name for name, p in model.named_parameters()}
    found = [{names[id(p)] for p in group["params"]} for group in groups]
    mixer = [f"{i}.mixer.{name}" for i in range(3) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    assert found[2] == {f"transformer_blocks.{name}.weight" for name in (*mixer, "2.skip_proj")}
    assert found[0] | found[2] == {names[id(p)] for p in plain[0]["params"]} and found[0].isdisjoint(found[2])
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0, 0.03]
    dim = DiMTransformer2DModel(8, 2, 3, num_layers=4, hidden_size=16, num_classes=4)
    matrices = {id(p) for p in parameter_groups(dim, 0.03, "muon")[2]["params"]}
    assert id(dim.skip_projections[0].weight) in matrices and id(dim.modulation.weight) not in matrices


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_muons_steps_are_pytorchs(monkeypatch):
    monkeypatch.setattr(optimization, "multiplies_fast", lambda dtype, device: True)  # PyTorch's does not ask
    torch.manual_seed(0)
    model = PISDMTransformer2DModel(8, 2, 3, num_layers=3, hidden_size=16, num_classes=4)
    other = copy.deepcopy(model)
    optimizer = make_optimizer(parameter_groups(model, 0.3, "muon"), 1.0, (0.8, 0.9), 1e-6)
    *groups, matrices = parameter_groups(other, 0.3, "muon")
    adam = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    muon = torch.optim.Muon(matrices["params"], weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for rate in (1e-2, 3e-2, 2e-2):
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        for group in (*optimizer.param_groups, *adam.param_groups, *muon.param_groups):
            group["lr"] = rate
        for each in (optimizer, adam, muon):
            each.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_orthogonal_directions_have_like_lengths():
    torch.manual_seed(0)
    matrices = torch.randn(2, 24, 6) * torch.logspace(0, -2, 6)  # condition numbers of about 100
    for found in (orthogonalize(matrices), orthogonalize(matrices.mT).mT):
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        lengths = torch.diagonal(left.mT @ found.float() @ right.mT, dim1=1, dim2=2)
        assert ((lengths > 0.6) & (lengths < 1.3)).all()


@pytest.mark.parametrize("is_fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_matrices_become_orthogonal_in_bfloat16_where_that_is_fast(monkeypatch, is_fast, dtype):
    asked = []
    monkeypatch.setattr(optimization, "multiplies_fast", lambda *which: asked.append(which) or is_fast)
    matrices = torch.randn(1, 3, 2)
    assert orthogonalize(matrices).dtype == dtype and asked == [(torch.bfloat16, matrices.device)]


def rates(warmup, cooldown, total):
    return [learning_rate_factor(step, warmup, cooldown, total) for step in range(total)]


def test_rate_rises_stays_and_falls():
    values = rates(warmup=4, cooldown=5, total=20)
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[4:16] == [1.0] * 12
    assert values[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_without_cooldown_the_rate_stays():
    assert rates(warmup=0, cooldown=0, total=6) == [1.0] * 6
    assert learning_rate_factor(6, 0, 0, 6) == 1.0  # a scheduler asks once more after the last step


def test_the_rate_ends_at_zero_and_the_lower_of_rise_and_fall_holds():
    assert [learning_rate_factor(step, 0, 5, 20) for step in (20, 21)] == [0.0, 0.0]
    assert rates(warmup=6, cooldown=6, total=8) == pytest.approx([i / 6 for i in (1, 2, 3, 4, 4, 3, 2, 1)])


def make_groups():
    return parameter_groups(torch.nn.Linear(3, 3, bias=False), 0.25)  # nothing that does not decay


def assert_as_asked(optimizer):
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.9), 1e-6)


def test_the_optimizer_is_fused_adamw_as_asked():
    optimizer = make_optimizer(make_groups(), 1e-2, (0.8, 0.9), 1e-6)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert_as_asked(optimizer)
    assert (optimizer.defaults["fused"], optimizer.defaults["capturable"]) == (True, False)


def test_a_recorded_step_reads_its_rate_from_the_parameters_device():
    groups = make_groups()
    with torch.device("meta"):
        optimizer = make_optimizer(groups, 0.5, (0.8, 0.9), 1e-6, capturable=True)
    rate = optimizer.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor) and rate.device.type == "cpu" and rate == 0.5
    assert optimizer.defaults["capturable"]


def test_8_bit_adam_needs_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        make_optimizer([], 1e-2, (0.8, 0.9), 1e-6, use_8bit=True)
    with pytest.raises(ValueError, match=r"8-bit.*Muon"):
        groups = parameter_groups(torch.nn.Linear(3, 3), 0.1, "muon")
        make_optimizer(groups, 1e-2, (0.8, 0.9), 1e-6, use_8bit=True)


def test_8_bit_adam_is_bitsandbytes(monkeypatch):
    """AdamW under the name, as bitsandbytes is for machines with a GPU."""

    class AdamW8bit(torch.optim.AdamW):
        pass

    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
    optimizer = make_optimizer(make_groups(), 1e-2, (0.8, 0.9), 1e-6, use_8bit=True)
    assert isinstance(optimizer, AdamW8bit)
    assert_as_asked(optimizer)
