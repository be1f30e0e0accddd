import json
import os

import pytest

from benchmarks import training_cost


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        training_cost,
        "PISDM_SIZES",
        {"XS": {"num_layers": 3, "hidden_size": 32}, "XXS": {"num_layers": 2, "hidden_size": 16}},
    )

    def run(*arguments):
        training_cost.main(["--num-classes", "10", "--output-dir", str(tmp_path / "out"), *arguments])
        return json.loads((tmp_path / "out" / "training_cost.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_every_size_is_measured_at_every_resolution(run):
    report, said = run("--pixels", "32", "64", "--batch-size", "4", "--seconds", "20")
    rows = report["rows"]
    assert [(row["size"], row["pixels"]) for row in rows] == [("XS", 32), ("XS", 64), ("XXS", 32), ("XXS", 64)]
    for row in rows:
        assert row["stages"][0]["sample_size"] == row["pixels"] // 8
        assert row["total"]["images_per_second"] > 0 and row["total"]["total_bytes"] > 0
    assert rows[1]["stages"][0]["training_flops"] > 2 * rows[0]["stages"][0]["training_flops"]
    assert "3 of 3 layers, 4 images" in said and "images/s" in said


def test_counting_alone_needs_no_device(run):
    report, said = run("--sizes", "XS", "--pixels", "64", "--device", "cuda", "--fused-scan", "--count-only")
    assert "machine" not in report
    assert report["rows"][0]["total"]["images_per_second"] is None
    assert report["rows"][0]["stages"][0]["batch_size"] == 16
    assert "not measured" in said


def test_a_recipe_is_counted_as_it_would_be_trained(run, tmp_path):
    stage = {"in_channels": 3, "num_layers": 2, "hidden_size": 16}
    recipe = {
        "scheduler": {},
        "stages": [{"sample_size": 4, **stage}, {"sample_size": 8, "low_res_channels": 3, **stage}],
        "training": {
            "train_batch_size": 8,
            "batch_shares": [1, 0.5],
            "max_train_steps": 30,
            "gradient_checkpointing": True,
            "mixed_precision": "bf16",
        },
    }
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(recipe))
    report, said = run("--recipe", str(file), "--num-processes", "2", "--count-only")
    assert report["recipe"] == "tiny.json"
    assert [stage["batch_size"] for stage in report["stages"]] == [8, 4]
    assert report["settings"]["gradient_checkpointing"] and report["settings"]["mixed_precision"] == "bf16"
    assert (report["total"]["images_per_step"], report["total"]["max_train_steps"]) == (16, 30)
    assert "TFLOP per process and step" in said
    report, _ = run("--recipe", str(file), "--batch-size", "4", "--count-only")
    assert [stage["batch_size"] for stage in report["stages"]] == [4, 2]


@pytest.mark.parametrize(("load", "is_loaded"), [(0.0, False), (100.0, True)])
def test_the_title_says_when_the_machine_is_loaded(run, monkeypatch, load, is_loaded):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    report, said = run("--sizes", "XXS", "--pixels", "32", "--batch-size", "1", "--seconds", "0")
    assert ("loaded machine" in said) == is_loaded
    assert report["machine"] in said
