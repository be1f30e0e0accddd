import pytest
import torch

from benchmarks.speed.cascade_sampling import describe_cascade, measure_cascade, plot_cascade, split_steps
from diffusers_pisdm.training.recipes import Recipe


STAGE = {"num_layers": 2, "hidden_size": 16, "in_channels": 3}
RECIPE = Recipe({}, [{"sample_size": 4, **STAGE}, {"sample_size": 8, "low_res_channels": 3, **STAGE}])


@pytest.mark.parametrize(
    ("steps", "num_stages", "wanted"), [(50, 4, [13, 13, 12, 12]), (6, 2, [3, 3]), (3, 3, [1] * 3)]
)
def test_steps_are_split(steps, num_stages, wanted):
    assert split_steps(steps, num_stages) == wanted


def test_too_few_steps_to_split():
    with pytest.raises(ValueError, match="pass --steps 4 or more"):
        split_steps(3, 4)


def test_a_cascade_is_compared_with_its_last_stage(tmp_path):
    report = measure_cascade(RECIPE, 3, 2, 2, torch.device("cpu"), torch.float32)
    assert [stage["sample_size"] for stage in report["stages"]] == [4, 8]
    single, each, in_all = report["rows"]
    assert (single["steps"], each["steps"], in_all["steps"]) == ([3], [3, 3], [2, 1])
    for row in report["rows"]:
        assert len(row["seconds"]) == 2 and len(row["stage_seconds"]) == len(row["steps"])
        assert min(row["stage_seconds"]) > 0
        assert row["times_one_stage"] == row["median_seconds"] / single["median_seconds"]

    report["machine"] = {"device": "some CPU"}
    table = describe_cascade(report)
    assert "Stages of 4 > 8 latent pixels" in table and "cascade, 3 steps in all" in table
    plot_cascade(report, tmp_path / "cascade.png")
    assert (tmp_path / "cascade.png").read_bytes().startswith(b"\x89PNG")
