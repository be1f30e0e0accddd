import pytest
import torch

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.training.optimization import parameter_groups, warmup_cooldown_schedule


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


def rates(warmup, cooldown, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_cooldown_schedule(optimizer, warmup, cooldown, total)
    values = []
    for _ in range(total):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


def test_rate_rises_stays_and_falls():
    values = rates(warmup=4, cooldown=5, total=20)
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[4:16] == [1.0] * 12
    assert values[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_without_cooldown_the_rate_stays():
    assert rates(warmup=0, cooldown=0, total=6) == [1.0] * 6
