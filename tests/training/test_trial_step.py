import pytest
import torch

from tests.training.cost_stages import HIGHER_STAGE, STAGE, make_model, run_loss


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
