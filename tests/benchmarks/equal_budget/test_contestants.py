import pytest
import torch
import torch.nn.functional as F

from benchmarks.equal_budget.contestants import CONTESTANTS, Budget, measure_budget, measure_residual_scales


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("num_classes", [10, 288])  # Fashion-MNIST and CIFAR-10, emoji
def test_contestants_have_equal_parameters(size, num_classes):
    counts = {}
    for name, contestant in CONTESTANTS[size].items():
        with torch.device("meta"):
            objective = contestant.make_objective(num_classes)
        counts[name] = sum(parameter.numel() for parameter in objective.stages.parameters())
    assert all(abs(count / counts["pisdm"] - 1) < 0.05 for count in counts.values()), counts


def test_steps_spend_the_budget():
    budget = Budget(parameters=1, training_flops=2_000_000_000)
    assert budget.steps(training_tflop=0.64, batch_size=32) == 10
    assert budget.steps(training_tflop=0.703, batch_size=32) == 10  # an eleventh would not be paid for


def test_counting_leaves_the_random_numbers_alone_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    budgets = [
        measure_budget(CONTESTANTS["small"]["pisdm_cascade"], 10, batch_size).training_flops for batch_size in (4, 8)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    # Class embeddings apart, whose gradient is one table a batch, and the pairs of the scale-invariant loss.
    assert budgets[0] == pytest.approx(budgets[1], rel=1e-3)


def test_residual_stages_predict_what_their_condition_lacks_at_its_scale():
    contestant = CONTESTANTS["small"]["pisdm_residual"]
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (scale,) = measure_residual_scales(contestant, images)
    pixels = images.float() / 127.5 - 1
    low = F.interpolate(pixels, (16, 16), mode="area")
    residual = pixels - F.interpolate(low, (32, 32), mode="bicubic", antialias=True)
    assert scale == pytest.approx(residual.std().item(), rel=0.01)
    objective = contestant.make_objective(10, [scale])
    assert [stage.config.residual_scale for stage in objective.stages] == [None, scale]
    assert [s.config.prediction_type for s in objective.schedulers] == ["v_prediction", "sample"]
    plain = CONTESTANTS["small"]["pisdm_cascade"].make_objective(10)
    assert {stage.config.residual_scale for stage in plain.stages} == {None}


def test_rows_of_the_tables_lack_what_they_say():
    rows = {name: contestant.make_objective(10) for name, contestant in CONTESTANTS["table_1"].items()}
    assert next(iter(rows)) == "full"
    full = rows.pop("full")
    assert full.scale_invariant_loss is not None and len(full.stages) == 2
    assert rows["without_sil"].scale_invariant_loss is None and len(rows["without_cn"].stages) == 1
    for name, option, value in (
        ("without_pt", "num_padding_tokens", 0),
        ("without_lsem", "local_enhancement", False),
        ("without_csm", "scan_directions", [full.stages[0].config.scan_directions[0]]),
    ):
        assert {str(stage.config[option]) for stage in rows[name].stages} == {str(value)}
        assert str(full.stages[0].config[option]) != str(value)
