import json

import numpy as np
import pytest
from PIL import Image

from diffusers_pisdm.evaluation.ablation_folder import AblationFolder
from diffusers_pisdm.evaluation.ablation_report import write_ablation_report
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
        "score_names": {"frechet_distance": "Frechet distance (pixels)"},
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
    assert "of 3 samples a run (20 denoising steps in each stage, guidance 1.5) to 307 held-out images" in text
    assert "the scale-invariant loss has nothing to compare" in text

    report = json.loads((tmp_path / "table_1.json").read_text())
    assert [row["mean"] for row in report["summary"]] == [21.0, None, None, 30.0, None, None]
    assert (report["table"], report["conditions"], len(report["runs"])) == (1, CONDITIONS, 3)

    with Image.open(tmp_path / "samples_1.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(255, 255, 0), (0, 0, 255)} <= colours and (255, 0, 0) not in colours  # seed 1, which most rows have
    assert not list(tmp_path.rglob("*.unfinished"))


def test_nothing_is_done_yet(folder, tmp_path):
    text = write_ablation_report(folder, 2)
    assert text.count("| missing |") == 8 and "Frechet distance" in text
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
