import argparse
import json
import os

import pytest
import torch

from benchmarks import throughput
from benchmarks.peers import PEERS
from benchmarks.speed.candidates import PISDM


NAMES = [PISDM, *PEERS]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "PISDM_SIZES", {"S": {"num_layers": 24, "hidden_size": 64}})
    threads = torch.get_num_threads()

    def run(*arguments):
        output = tmp_path / "out"
        throughput.main([*arguments, "--threads", str(threads), "--output-dir", str(output), "--device", "cpu"])
        return output, capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_table_of_whole_models(run):
    output, said = run("--image-sizes", "128", "64", "--repeats", "2", "--batch-size", "2", "--steps", "10")
    report = json.loads((output / "throughput.json").read_text())
    assert [(row["image_size"], row["model"]) for row in report["rows"]] == [(s, n) for s in (64, 128) for n in NAMES]
    medians = {(row["image_size"], row["model"]): row["median_seconds"] for row in report["rows"]}
    for row in report["rows"]:
        own = medians[row["image_size"], PISDM]
        assert row["tokens"] == {64: 16, 128: 64}[row["image_size"]]
        assert len(row["seconds"]) == 2 and row["timed_layers"] == row["num_layers"]
        assert row["times_as_fast"] == pytest.approx(row["median_seconds"] / own)
        assert row["images_per_second"] == pytest.approx(2 / (10 * row["median_seconds"]))
        assert row["memory_bytes"] is None or row["memory_bytes"] >= 0
    assert report["crossovers"].keys() == PEERS.keys()
    assert max(report["errors"].values()) < 1e-5
    assert report["machine"]["dtype"] == "float32" and report["machine"]["load_average"] >= 0
    assert (output / "throughput.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == ["throughput.json", "throughput.png"]
    assert "timed whole" in said and "extrapolated" not in said
    assert said.index("How many times as fast") < said.index("Seconds per") < said.index("Images per second at 10")


@pytest.mark.slow
def test_a_table_from_stacks_of_few_layers(run):
    output, said = run("--image-sizes", "64", "--repeats", "1", "--layers", "4")
    rows = json.loads((output / "throughput.json").read_text())["rows"]
    assert [row["timed_layers"] for row in rows] == [4] * len(NAMES) and rows[0]["num_layers"] == 24
    assert said.count("extrapolated in depth from 4 layers") == len(NAMES)


def test_values_that_are_not_finite_stop_it(run, monkeypatch):
    original = throughput.make_candidates

    def make_candidates(config):
        candidates = original(config)
        model_class = candidates[1].model_class

        class Broken(model_class):
            def forward(self, hidden_states, *arguments, **options):
                sample, features = super().forward(hidden_states, *arguments, **options)
                return sample / (hidden_states.shape[2] != 8), features  # fine where it is checked, not where timed

        object.__setattr__(candidates[1], "model_class", Broken)
        return candidates

    monkeypatch.setattr(throughput, "make_candidates", make_candidates)
    monkeypatch.setattr(throughput, "check_candidates", lambda candidates, device: {})
    with pytest.raises(RuntimeError, match=r"U-ViT .* not finite at 64 px"):
        run("--image-sizes", "64", "--repeats", "1")


@pytest.mark.slow
def test_what_was_measured_survives_a_later_failure(run, monkeypatch, tmp_path):
    original = throughput.measure_image_size

    def measure(candidates, image_size, args):
        if image_size == 128:
            raise MemoryError
        return original(candidates, image_size, args)

    monkeypatch.setattr(throughput, "measure_image_size", measure)
    with pytest.raises(MemoryError):
        run("--image-sizes", "64", "128", "--repeats", "1")
    report = json.loads((tmp_path / "out" / "throughput.json").read_text())
    assert [row["image_size"] for row in report["rows"]] == [64] * len(NAMES)


def test_a_cascade(run, tmp_path):
    stage = {"num_layers": 2, "hidden_size": 16}
    recipe = tmp_path / "tiny.json"
    stages = [{"sample_size": 2, **stage}, {"sample_size": 4, "low_res_channels": 4, **stage}]
    recipe.write_text(json.dumps({"scheduler": {}, "stages": stages}))
    output, said = run("--cascade", str(recipe), "--steps", "2", "--repeats", "1")
    report = json.loads((output / "cascade_throughput.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [[2], [2, 2], [1, 1]]
    assert report["recipe"] == str(recipe) and report["machine"]["device"]
    assert "x one stage" in said
    assert (output / "cascade_throughput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("load", "is_loaded"), [(0.0, False), (100.0, True)])
def test_a_loaded_machine_is_reported(run, monkeypatch, tmp_path, load, is_loaded):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(throughput, "run_table", lambda args, conditions: None)
    _, said = run()
    assert ("This machine is loaded" in said) == is_loaded


def test_the_papers_ratios():
    assert throughput.paper_ratio(2048) == pytest.approx(3.0)
    assert throughput.paper_ratio(1280) == 1.0
    assert throughput.paper_ratio(768) is None


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (throughput.parse_image_size, "250"),
        (throughput.parse_image_size, "0"),
        (throughput.parse_image_size, "-16"),
        (throughput.parse_layers, "5"),
        (throughput.parse_layers, "2"),
        (throughput.parse_positive, "0"),
        (throughput.parse_positive, "1.5"),
    ],
)
def test_wrong_arguments(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        parse(text)
