import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import demo_profile
from tests.pipelines.tiny_cascade import generators, make_cascade


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_cascade(2).save_pretrained(folder)
    return folder


def call_arguments():
    return {"class_labels": [1, 2, 3], "num_inference_steps": [4, 2], "generator": generators(0, 1, 2)}


def test_the_report(model_dir, tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--model", str(model_dir), "--steps", "3", "2", "--repeats", "2", "--output-dir", str(tmp_path)]
    demo_profile.main(arguments)
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "demo_profile.json").read_text())
    assert (report["images"], report["steps"], report["sizes"]) == (32, [3, 2], [8, 16])  # 4 of each of 8 classes
    assert [row["way"] for row in report["rows"]] == ["one forward", "two forwards"]
    assert [[stage["num_forwards"] for stage in row["stages"]] for row in report["rows"]] == [[3, 2], [6, 4]]
    for row in report["rows"]:
        assert len(row["all_seconds"]) == len(row["all_forward_shares"]) == 2
        assert row["seconds"] == min(row["all_seconds"])  # the lower median of two
        parts = [stage[part] for stage in row["stages"] for part in demo_profile.PARTS]
        assert min(parts) > 0 and row["outside"] > 0
        assert sum(parts) + row["outside"] == pytest.approx(row["seconds"])
        forwards = sum(stage["forwards"] for stage in row["stages"])
        assert row["forward_share"] == pytest.approx(forwards / row["seconds"])
    printed = capsys.readouterr().out
    assert "| 16 px |" in printed and "| two forwards |" in printed
    with Image.open(tmp_path / "demo_profile.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10


def test_it_is_the_demo(model_dir):
    """`make demo` passes this model, whose steps are taken unless told otherwise; the classes are the script's own."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^DEMO_ARGS = (.*)$", makefile, re.MULTILINE)[1]
    assert "--model checkpoints/pisdm-emoji128 $(if $(STEPS),--num_inference_steps $(STEPS))" in recipe
    assert re.search(r"^STEPS \?=$", makefile, re.MULTILINE)
    pipe, arguments = demo_profile.demo_call(["--model", str(model_dir)])
    assert pipe.num_stages == 2
    assert arguments["class_labels"] == [label for label in (0, 1, 2, 3, 5, 6, 7, 9) for _ in range(4)]
    assert "num_inference_steps" not in arguments
    assert [generator.initial_seed() for generator in arguments["generator"]] == list(range(32))


def test_watching_changes_nothing():
    pipe = make_cascade(2)
    expected = pipe(**call_arguments(), output_type="latent").images
    before = [set(vars(owner)) for owner in (pipe, pipe.scheduler, *pipe.stages)]
    with demo_profile.watch_stages(pipe) as stages:
        assert torch.equal(pipe(**call_arguments(), output_type="latent").images, expected)
        assert len(stages) == 2
    assert before == [set(vars(owner)) for owner in (pipe, pipe.scheduler, *pipe.stages)]
    assert torch.equal(pipe(**call_arguments(), output_type="latent").images, expected)


def test_calls_are_repeated_with_generators_as_they_were():
    pipe, arguments, images = make_cascade(2), {**call_arguments(), "output_type": "latent"}, []
    call = type(pipe).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "__call__", lambda *args, **kwargs: images.append(call(*args, **kwargs).images))
        for _ in range(2):
            demo_profile.repeat_call(pipe, arguments)
    assert torch.equal(*images)


def test_time_goes_where_it_is_spent(monkeypatch):
    """On a clock that only the parts move, every part gets its seconds."""
    pipe = make_cascade(2)
    clock = 0.0

    def takes(function, seconds):
        def call(*args, **kwargs):
            nonlocal clock
            clock += seconds
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(demo_profile.time, "perf_counter", lambda: clock)
    scheduler = type(pipe.scheduler)
    monkeypatch.setattr(scheduler, "scale_model_input", takes(scheduler.scale_model_input, 1.0))
    monkeypatch.setattr(pipe, "predict", takes(pipe.predict, 20.0))
    monkeypatch.setattr(pipe, "_postprocess", takes(pipe._postprocess, 300.0))
    for transformer in pipe.stages:
        monkeypatch.setattr(transformer, "forward", takes(transformer.forward, 4000.0))
    profile = demo_profile.profile_call(pipe, call_arguments())
    assert profile["seconds"] == 6 * 4021 + 300
    assert profile["outside"] == 300
    parts = {part: [stage[part] for stage in profile["stages"]] for part in demo_profile.PARTS}
    assert parts == {"forwards": [16000, 8000], "scheduler": [4, 2], "rest": [80, 40]}
    assert profile["forward_share"] == 24000 / (6 * 4021 + 300)
