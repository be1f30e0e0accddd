import json
import re

import numpy as np
import pytest
from PIL import Image

from ablation.folder import AblationFolder
from ablation.report import format_ablation_table, summarize_ablation, write_ablation_report
from ablation.rows import TABLES
from diffusers_pisdm.evaluation.samples.files import sample_path


CONDITIONS = {"train_data_dir": "/data/emoji", "num_inference_steps": 20, "guidance_scale": 1.5}


@pytest.fixture
def folder(tmp_path):
    folder = AblationFolder(tmp_path)
    folder.claim(CONDITIONS)
    return folder


def add_run(folder, variant, seed, distance, colour):
    for index in range(3):
        path = sample_path(folder.run(variant, seed) / "samples", index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path)
    result = {
        "scores": {"frechet_distance": distance},
        "score_names": {"frechet_distance": "Fréchet distance (pixels)"},
        **{"num_samples": 3, "num_reference": 307, "parameters": 10**6, "training_flops": 10**9},
        **{"steps": 1000, "images_per_step": 32},
    }
    folder.write_result(variant, seed, result)


def test_missing_rows_are_marked(folder, tmp_path):
    add_run(folder, "full", 0, 20.0, "red")
    add_run(folder, "full", 1, 22.0, "yellow")
    add_run(folder, "without_pt", 1, 30.0, "blue")
    text = write_ablation_report(folder, 1)
    assert text == (tmp_path / "table_1.md").read_text()
    rows = text.splitlines()[2:8]
    assert ["missing" in row for row in rows] == [False, True, True, False, True, True]
    assert "1,000 steps of 32 images on emoji" in text
    assert re.search(r"3 samples per run .*20 .*guidance 1\.5.* 307 held-out images", text)
    assert "has nothing to compare" in text

    report = json.loads((tmp_path / "table_1.json").read_text())
    assert [row["mean"] for row in report["summary"]] == [21.0, None, None, 30.0, None, None]
    assert (report["table"], report["conditions"], len(report["runs"])) == (1, CONDITIONS, 3)

    with Image.open(tmp_path / "samples_1.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(255, 255, 0), (0, 0, 255)} <= colours and (255, 0, 0) not in colours  # seed 1, which most rows have
    assert not list(tmp_path.rglob("*.unfinished"))


def test_nothing_is_done_yet(folder, tmp_path):
    text = write_ablation_report(folder, 2)
    assert text.count("| missing |") == 8 and "Fréchet distance" in text
    assert not (tmp_path / "samples_2.png").exists()


def test_the_plot_shows_every_run_and_the_paper(folder, tmp_path):
    def colours():
        with Image.open(tmp_path / "table_2.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
        blue, orange = pixels[:, 2] - pixels[:, 0] > 100, pixels[:, 0] - pixels[:, 2] > 100
        return blue.sum(), orange.sum()

    write_ablation_report(folder, 2)
    blue, orange = colours()
    assert blue == 0 and orange > 0
    add_run(folder, "3_directions", 0, 20.0, "red")
    add_run(folder, "full", 0, 20.0, "red")
    write_ablation_report(folder, 2)
    two = colours()[0]
    assert two > 0
    add_run(folder, "full", 1, 30.0, "red")
    add_run(folder, "3_directions", 1, 40.0, "red")
    write_ablation_report(folder, 2)
    assert colours()[0] > two and colours()[1] == orange


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
    lines = format_ablation_table(summarize_ablation(TABLES[1], RESULTS), "Fréchet distance (x)").splitlines()
    assert lines[0].startswith("|  | CSM | CN | PT | LSEM | SIL | Fréchet distance (x) | difference | paper: FID |")
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
