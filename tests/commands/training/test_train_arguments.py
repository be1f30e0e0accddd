"""Every argument of the training script that can change the result changes it; those that must not, do not."""

import pytest
import torch
from safetensors.torch import load_file


STEPS = 3

CHANGES = {
    "seed": ["--seed", "1"],
    "loss_weighting": ["--loss_weighting", "vlb"],
    "sigmoid_bias": ["--loss_weighting", "sigmoid", "--sigmoid_bias", "-1"],
    "snr_gamma": ["--loss_weighting", "min_snr", "--snr_gamma", "1"],
    "label_dropout": ["--label_dropout", "0.9"],
    "max_noise_level": ["--max_noise_level", "0.1"],
    "sil_weight": ["--sil_weight", "0"],
    "sil_temperature": ["--sil_temperature", "1"],
    "sil_mask_same_class": ["--sil_mask_same_class"],
    "train_stages": ["--train_stages", "2"],
    "batch_shares": ["--batch_shares", "1", "0.5"],
    "stage_loss_weights": ["--stage_loss_weights", "1", "3"],
    "noise_shifts": ["--noise_shifts", "1", "2"],
    "prediction_types": ["--prediction_types", "v_prediction", "sample"],
    "loss_weighting per stage": ["--loss_weighting", "uniform", "min_snr"],
    "factor_dropout": ["--class_name_factors", "*", "--factor_dropout", "0.9"],
    "random_crop": ["--random_crop"],
    "random_flip": ["--random_flip"],
    "train_batch_size": ["--train_batch_size", "4"],
    "gradient_accumulation_steps": ["--gradient_accumulation_steps", "2"],
    "learning_rate": ["--learning_rate", "1e-3"],
    "lr_warmup_steps": ["--lr_warmup_steps", "5"],
    "lr_cooldown_steps": ["--lr_cooldown_steps", "2"],
    "optimizer": ["--optimizer", "muon"],
    "adam_beta1": ["--adam_beta1", "0.5"],
    "adam_beta2": ["--adam_beta2", "0.5"],
    "adam_weight_decay": ["--adam_weight_decay", "0.9"],
    "adam_epsilon": ["--adam_epsilon", "1e-2"],
    "max_grad_norm": ["--max_grad_norm", "1e-6"],
    "ema_decay": ["--ema_decay", "0"],
    "mixed_precision": ["--mixed_precision", "bf16"],
}

NO_CHANGES = {
    "dataloader_num_workers": ["--dataloader_num_workers", "2"],
    "logging_steps": ["--logging_steps", "1"],
    "validation_steps": ["--validation_steps", "1", "--validation_split", "train"],
    "checkpointing_steps": ["--checkpointing_steps", "1"],
    "on_bad_image": ["--on_bad_image", "skip"],
    "class_name_factors": ["--class_name_factors", "*"],  # names of one part: a factor that is the class
}


def result(folder):
    weights = load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")
    average = load_file(folder / f"checkpoint-{STEPS}" / "ema.safetensors")
    return {k: v for k, v in weights.items() if k.startswith("stages.")}, average


@pytest.fixture(scope="module")
def plain_result():
    return {}


@pytest.fixture
def plain(train, plain_result):
    """The run without further arguments, made once."""
    if not plain_result:
        plain_result["weights"], plain_result["average"] = result(train("plain", STEPS))
    return plain_result


@pytest.mark.parametrize("arguments", CHANGES.values(), ids=CHANGES)
def test_an_argument_changes_the_result(train, plain, arguments):
    weights, average = result(train("other", STEPS, *arguments))
    assert average.keys() != plain["average"].keys() or any(
        not torch.equal(average[name], plain["average"][name]) for name in average
    )
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("arguments", NO_CHANGES.values(), ids=NO_CHANGES)
def test_an_argument_does_not_change_the_result(train, plain, arguments):
    weights, average = result(train("other", STEPS, *arguments))
    assert [name for name in weights if not torch.equal(weights[name], plain["weights"][name])] == []
    assert [name for name in average if not torch.equal(average[name], plain["average"][name])] == []


def test_gradient_checkpointing_gives_the_same_up_to_rounding(train, plain):
    weights, _ = result(train("other", STEPS, "--gradient_checkpointing"))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, plain["weights"][name], rtol=1e-3, atol=1e-5)
