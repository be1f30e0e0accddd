import pytest
import torch

from benchmarks.equal_budget.contestants import CONTESTANTS, Budget, measure_budget


@pytest.mark.parametrize("num_classes", [10, 288])  # Fashion-MNIST, emoji
def test_contestants_have_equal_parameters(num_classes):
    counts = {name: measure_budget(contestant, num_classes).parameters for name, contestant in CONTESTANTS.items()}
    assert all(abs(count / counts["pisdm"] - 1) < 0.05 for count in counts.values()), counts


def test_steps_spend_the_budget():
    budget = Budget(parameters=1, training_flops=2_000_000_000)
    assert budget.steps(training_tflop=0.64, batch_size=32) == 10
    assert budget.steps(training_tflop=0.703, batch_size=32) == 10  # an eleventh would not be paid for


def test_counting_leaves_the_random_numbers_alone_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    budgets = [measure_budget(CONTESTANTS["pisdm_cascade"], 10, batch_size).training_flops for batch_size in (4, 8)]
    assert torch.equal(torch.get_rng_state(), state)
    # Class embeddings apart, whose gradient is one table a batch, and the pairs of the scale-invariant loss.
    assert budgets[0] == pytest.approx(budgets[1], rel=1e-3)
