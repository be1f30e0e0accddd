import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.commands import drawing, generate


NAMES = ["fluent3d/animal-mammal", "noto/flag", "tench, Tinca tinca", "golden retriever"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A saved two-stage cascade of 4 and 8 pixels with random weights that do depend on noise and class."""
    size = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "num_classes": len(NAMES)}
    torch.manual_seed(0)
    stages = [
        PISDMTransformer2DModel(sample_size=4, **size),
        PISDMTransformer2DModel(sample_size=8, low_res_channels=3, **size),
    ]
    for stage in stages:
        torch.nn.init.normal_(stage.proj_out.weight, std=0.2)
        torch.nn.init.normal_(stage.modulation.weight, std=0.5)
        torch.nn.init.normal_(stage.class_embedding.weight)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    folder = tmp_path_factory.mktemp("model")
    PISDMCascadePipeline(stages[0], scheduler, transformer_2=stages[1], id2label=NAMES).save_pretrained(folder)
    return folder


def run(model_dir, tmp_path, *arguments):
    """Runs the script in this process and returns the grid's path."""
    output = tmp_path / "grid.png"
    generate.main(
        [
            "--model",
            str(model_dir),
            "--output",
            str(output),
            "--num_inference_steps",
            "2",
            "--device",
            "cpu",
            *arguments,
        ]
    )
    return output


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["0", "3"], [0, 3]),
        (["0,3, 1"], [0, 3, 1]),
        (["0 noto/flag,2"], [0, "noto/flag", 2]),
        (["fluent3d/animal-mammal,noto/flag"], ["fluent3d/animal-mammal", "noto/flag"]),
        (["golden retriever, 1"], ["golden retriever", 1]),
        (["tench, Tinca tinca"], ["tench, Tinca tinca"]),
        (["-1", "nothing"], [-1, "nothing"]),
        ([" , "], []),
    ],
)
def test_classes_are_ids_and_names_with_spaces_and_commas(arguments, expected):
    assert drawing.parse_classes(arguments, set(NAMES)) == expected


def test_a_class_whose_name_is_a_number_is_a_name():
    assert drawing.parse_classes(["7"], {"7", "8"}) == ["7"]


def test_writes_grid_and_stages_and_says_so(model_dir, tmp_path, capsys):
    stages = tmp_path / "new" / "stages.png"
    output = run(model_dir, tmp_path, "--images_per_class", "2", "--stages_output", str(stages))
    with Image.open(output) as grid, Image.open(stages) as stage_grid:
        assert grid.width > 8 * generate.CELL_SIZE  # four classes of two images
        assert stage_grid.width > 8 * generate.STAGE_CELL_SIZE
        assert stage_grid.height > 2 * generate.STAGE_CELL_SIZE
    out, err = capsys.readouterr()
    assert re.fullmatch(
        rf"Wrote {output} and {stages}: 8 images of 4 classes at 8x8 pixels in \d+\.\d s\.", out.splitlines()[-1]
    )
    assert "stage 1/2" in err
    assert "stage 2/2" in err
    assert list(tmp_path.iterdir()) == [output, stages.parent] or list(tmp_path.iterdir()) == [stages.parent, output]


def test_an_image_depends_on_its_seed_and_not_on_its_neighbours(model_dir, tmp_path):
    cell = (6, 6, 6 + generate.CELL_SIZE, 6 + generate.CELL_SIZE)
    images = {}
    for name, arguments in {
        "alone": ["--classes", "1", "--images_per_class", "1"],
        "first": ["--classes", "1", "2", "--images_per_class", "2"],
        "other seed": ["--classes", "1", "--images_per_class", "1", "--seed", "1"],
        "guided": ["--classes", "1", "--images_per_class", "1", "--guidance_scale", "9"],
        "one a stage": ["--classes", "1", "--images_per_class", "1", "--guidance_scale", "4", "9"],
    }.items():
        with Image.open(run(model_dir, tmp_path, *arguments)) as grid:
            images[name] = torch.frombuffer(bytearray(grid.crop(cell).tobytes()), dtype=torch.uint8).int()
    assert (images["alone"] - images["first"]).abs().max() <= 1
    for name in ("other seed", "guided", "one a stage"):
        assert (images["alone"] - images[name]).abs().max() > 1, name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "4"], "`class_labels` contains 4, but this pipeline's classes are 0 to 3"),
        (["--classes", "noto/flagg"], "Did you mean 'noto/flag'?"),
        (["--classes", ","], "`class_labels` is empty"),
        (["--scheduler", "PISDMTransformer2DModel"], "diffusers has no scheduler `PISDMTransformer2DModel`"),
        (["--model", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
    ],
)
def test_bad_arguments_end_with_one_line_and_no_picture(model_dir, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(model_dir, tmp_path, *arguments)
    assert error.value.code.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    old, new = Image.new("L", (1, 1), 1), Image.new("L", (2, 2), 2)
    generate.save_image(old, path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate.save_image(new, path)
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.size == (1, 1)


def test_stages_are_stacked_in_columns_and_short_rows_are_filled():
    sizes, count = (2, 4), generate.STAGE_COLUMNS + 1
    colours = [(index, 0, stage) for stage in range(2) for index in range(count)]
    stage_images = [
        [Image.new("RGB", (size, size), colours[stage * count + index]) for index in range(count)]
        for stage, size in enumerate(sizes)
    ]
    picture = generate.draw_stages(stage_images, [str(index) for index in range(count)])
    step_x = 70  # cell and gap
    centre = 6 + generate.STAGE_CELL_SIZE // 2
    row_height = (picture.height - 6) // 4

    def colour_at(column, row):
        return picture.getpixel((centre + column * step_x, centre + row * row_height))

    for stage in range(2):
        assert [colour_at(column, stage) for column in range(count - 1)] == [
            (index, 0, stage) for index in range(count - 1)
        ]
        assert colour_at(0, 2 + stage) == (count - 1, 0, stage)
        assert colour_at(1, 2 + stage) == (255, 255, 255)


def test_runs_as_a_script(model_dir, tmp_path):
    script = Path(generate.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, script, "--model", model_dir, "--classes", "0", "--images_per_class", "1"]
    command += ["--num_inference_steps", "1", "1", "--dtype", "bfloat16", "--output", tmp_path / "grid.png"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "1 images of 1 classes" in finished.stdout
    assert (tmp_path / "grid.png").exists()
