import pytest

from diffusers_pisdm.evaluation.ablation_rows import TABLES
from diffusers_pisdm.evaluation.ablation_table import format_ablation_table, summarize_ablation


def result(variant, seed, distance):
    scores = {"frechet_distance": distance, "precision": 0.5}
    return {"variant": variant, "seed": seed, "parameters": 1_234_567, "training_flops": 580_000_000, "scores": scores}


RESULTS = [
    result("without_cn", 0, 30.0),
    result("full", 1, 26.0),
    result("full", 0, 24.0),
    result("3_directions", 0, 99.0),
]


def test_means_spreads_and_differences():
    full, without_csm, without_cn = summarize_ablation(TABLES[1], RESULTS)[:3]
    assert (full["seeds"], full["distances"]) == ([0, 1], [24.0, 26.0])
    assert (full["mean"], full["spread"]) == (25.0, pytest.approx(2**0.5))
    assert (full["difference"], full["paper_difference"]) == (0.0, 0.0)
    # Seed 0 alone, which both have.
    assert (without_cn["mean"], without_cn["spread"], without_cn["difference"]) == (30.0, None, 6.0)
    assert without_cn["relative_difference"] == pytest.approx(0.25) and without_cn["difference_spread"] is None
    assert without_cn["paper_difference"] == pytest.approx(2.26 - 1.67)
    assert (without_csm["seeds"], without_csm["mean"], without_csm["parameters"]) == ([], None, None)
    assert without_csm["paper_difference"] == pytest.approx(0.31)


def test_differences_are_those_of_each_seed():
    runs = [*RESULTS, result("without_cn", 1, 34.0), result("without_cn", 7, 500.0)]
    without_cn = summarize_ablation(TABLES[1], runs)[2]
    assert (without_cn["differences"], without_cn["difference"]) == ([6.0, 8.0], 7.0)
    assert without_cn["difference_spread"] == pytest.approx(2**0.5)
    assert without_cn["relative_difference"] == pytest.approx((0.25 + 8 / 26) / 2)
    lines = format_ablation_table(summarize_ablation(TABLES[1], runs), "x").splitlines()
    assert "| +7 ± 1.4 (+28%) | 2.26 | +0.59 (+35%) |" in lines[4]


def test_without_the_complete_model_there_are_no_differences():
    rows = summarize_ablation(TABLES[1], RESULTS[:1])
    assert [row["difference"] for row in rows] == [None] * 6
    assert rows[2]["paper_difference"] == pytest.approx(0.59)


def test_table_1():
    lines = format_ablation_table(summarize_ablation(TABLES[1], RESULTS), "Frechet distance (x)").splitlines()
    assert lines[0].startswith("|  | CSM | CN | PT | LSEM | SIL | Frechet distance (x) | difference | paper: FID |")
    assert (
        lines[2] == "| all components | yes | yes | yes | yes | yes | 25 ± 1.4 |  | 1.67 |  | 1.235M | 0.58 | 0, 1 |"
    )
    assert lines[3].split("|")[2:10] == [" no ", *[" yes "] * 4, " missing ", "  ", " 1.98 "]
    assert "| no | yes | yes | yes | 30 | +6 (+25%) | 2.26 | +0.59 (+35%) | 1.235M | 0.58 | 0 |" in lines[4]
    assert len(lines) == 8 and len({line.count("|") for line in lines}) == 1


def test_table_2_shares_runs_with_table_1():
    lines = format_ablation_table(summarize_ablation(TABLES[2], RESULTS), "FID").splitlines()
    assert len(lines) == 10
    assert lines[4].startswith("| 3 directions | 3 | 99 | +75 (+312%) | 1.90 | +0.23 (+14%) |")
    assert lines[9].startswith("| 8 directions | 8 | 25 ± 1.4 |")
