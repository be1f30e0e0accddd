import pytest
import torch

from benchmarks.speed import block_training
from benchmarks.speed.block_training import (
    CHECKPOINTED,
    OURS,
    SLOW,
    check_training,
    describe_training,
    make_block,
    measure_training,
    slow_copy,
)


def test_both_ways_agree_with_float64():
    assert 0 < check_training() < 1e-5


def test_a_wrong_block_is_not_timed(monkeypatch):
    def wrong(block):
        copy = slow_copy(block)
        with torch.no_grad():
            copy.mixer.mixer.D += 0.1
        return copy

    monkeypatch.setattr(block_training, "slow_copy", wrong)
    with pytest.raises(RuntimeError, match="differs from float64"):
        check_training()


def test_measurement():
    rows = measure_training(width=32, tokens=40, batch_size=2, repeats=2, slow_repeats=1)
    ours, checkpointed, slow = rows
    assert [row["way"] for row in rows] == [OURS, CHECKPOINTED, SLOW]
    assert [len(row["seconds"]) for row in rows] == [2, 2, 1]
    assert ours["times_ours"] == 1 and slow["times_ours"] == slow["median_seconds"] / ours["median_seconds"]
    # Checkpointed: the output alone; the slow path: decays, inputs and states of all steps.
    assert checkpointed["saved_bytes"] < ours["saved_bytes"] < slow["saved_bytes"] / 3
    text = describe_training(rows)
    assert all(row["way"] in text for row in rows)


def test_checkpointing_runs_one_forward_again_and_no_more():
    ours, checkpointed, _ = measure_training(width=32, tokens=40, batch_size=2, repeats=1, slow_repeats=1)
    block = make_block(32)
    with block_training.StepTrace() as trace, torch.no_grad():
        block(*block_training.make_tensors(32, 40, 2)[:2])
    assert ours["flops"] < checkpointed["flops"] <= ours["flops"] + trace.flops
