import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image, ImageChops
from safetensors.torch import save_file

import diffusers_pisdm
from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.commands import drawing, evaluate, generate, sample
from diffusers_pisdm.schedulers import swap_scheduler
from diffusers_pisdm.training.fine_tuning import add_lora, resize_class_embedding
from diffusers_pisdm.utils.png_recipe import fingerprint, read_recipe
from tests.pipelines.tiny_cascade import make_cascade


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
        (["golden retreiver, noto/flag 7 x"], ["golden retreiver", "noto/flag", 7, "x"]),
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
        rf"Wrote {output} and {stages}: 8 images of 4 classes at 8x8 pixels in [\d.]+ s\.", out.splitlines()[-1]
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
        (["--classes", "4"], "--classes contains 4, but this pipeline's classes are 0 to 3"),
        (["--classes", "noto/flagg"], "Did you mean 'noto/flag'?"),
        (["--classes", ","], "--classes is empty"),
        (["--lora", "no/such/adapter"], "no/such/adapter"),
        (["--model", "no/such/folder/anywhere"], "There is no folder no/such/folder/anywhere"),
    ],
)
def test_bad_arguments_end_with_one_line_and_no_picture(model_dir, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(model_dir, tmp_path, *arguments)
    assert error.value.code.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "grid.xyz"], "'grid.xyz' is no picture's name"),
        (["--stages_output", "stages"], "'stages' is no picture's name"),
        (["--output", "folder.png"], "folder.png is a folder"),
        (["--output", "file/grid.png"], "file is not a folder that you may write to"),
        (["--stages_output", "file/deeper/stages.png"], "file is not a folder that you may write to"),
        (["--output_dir", "file"], "file is a file"),
        (["--device", "gpuu"], "'gpuu' cannot be used"),
        (["--lora_scale", "0.5"], "--lora_scale needs --lora"),
        (["--scheduler", "DDIMSchedular"], "Did you mean 'DDIMScheduler'"),
        (["--seed", str(2**70)], "--seed: must be at most"),
    ],
)
def test_what_cannot_be_written_is_told_before_a_model_is_read(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("file").touch()
    with pytest.raises(SystemExit) as error:
        generate.main(["--model", "nowhere", *arguments])
    assert message in f"{error.value.code} {capsys.readouterr().err}"
    assert len(list(tmp_path.iterdir())) == 2


def test_single_files_keep_recipes_that_draw_them_again(model_dir, tmp_path, capsys):
    arguments = ["--model", str(model_dir), "--classes", "tench", "1", "--images_per_class", "2", "--seed", "5"]
    arguments += ["--steps", "2", "1", "--noise_level", "0.3", "--scheduler", "DDIMScheduler"]
    arguments += ["--dtype", "bfloat16"]
    generate.main([*arguments, "--output_dir", str(tmp_path / "new" / "images")])
    files = sorted((tmp_path / "new" / "images").iterdir())
    assert [file.name for file in files] == [
        *("0005_tench-Tinca-tinca.png", "0006_tench-Tinca-tinca.png", "0007_noto-flag.png", "0008_noto-flag.png")
    ]
    assert "images: 4 images of 2 classes" in capsys.readouterr().out.replace(str(tmp_path / "new"), "")
    pipe = PISDMCascadePipeline.from_pretrained(model_dir, dtype=torch.bfloat16)
    swap_scheduler(pipe, "DDIMScheduler")
    for number, file in enumerate(files):
        recipe = read_recipe(file)
        assert recipe.pop("versions")["diffusers_pisdm"] == diffusers_pisdm.__version__
        label, seed = recipe.pop("class_label"), recipe.pop("seed")
        assert (label, seed) == (["tench, Tinca tinca", "noto/flag"][number // 2], 5 + number)
        assert (recipe.pop("model"), recipe.pop("scheduler")) == (str(model_dir), "DDIMScheduler")
        assert (recipe.pop("dtype"), recipe.pop("weights")) == ("bfloat16", fingerprint(pipe.stages))
        assert recipe == {
            "num_inference_steps": [2, 1],
            "guidance_scale": pipe.config.default_guidance_scale,
            "noise_level": 0.3,
        }
        again = pipe(class_labels=label, generator=[torch.Generator().manual_seed(seed)], **recipe).images[0]
        with Image.open(file) as image:
            assert ImageChops.difference(image, again).getextrema() <= ((0, 1),) * 3


def test_a_recipe_draws_its_picture_again(model_dir, tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    arguments = ["--model", str(model_dir), "--classes", "tench", "--images_per_class", "1", "--seed", "5"]
    arguments += ["--num_inference_steps", "3", "2", "--guidance_scale", "5", "--noise_level", "0.3"]
    arguments += ["--relay_strength", "0.6", "--scheduler", "DDIMScheduler", "--dtype", "bfloat16"]
    generate.main([*arguments, "--output_dir", str(first)])
    (picture,) = first.iterdir()
    generate.main(["--recipe", str(picture), "--output_dir", str(again)])
    generate.main(["--seed", "6", "--recipe", str(picture), "--classes", "1", "--output_dir", str(other)])
    recipe = read_recipe(picture)
    assert read_recipe(again / picture.name) == recipe
    assert read_recipe(other / "0006_noto-flag.png") == {**recipe, "seed": 6, "class_label": "noto/flag"}
    with Image.open(picture) as image, Image.open(again / picture.name) as redrawn:
        assert ImageChops.difference(image, redrawn).getbbox() is None
    plain = Image.open(run(model_dir, tmp_path, "--classes", "tench", "--images_per_class", "1", "--seed", "5"))
    assert plain.tobytes() != Image.open(run(model_dir, tmp_path, "--recipe", str(picture))).tobytes()


def test_weights_that_have_changed_since_are_told(model_dir, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    arguments = ["--classes", "tench", "--images_per_class", "1", "--num_inference_steps", "1"]
    picture = run(model, tmp_path, *arguments)

    def warned(*arguments):
        capsys.readouterr()
        generate.main(["--recipe", str(picture), "--output", str(tmp_path / "again.png"), *arguments])
        return "other weights now" in capsys.readouterr().err

    assert not warned()
    pipe = PISDMCascadePipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.stages[-1].proj_out.bias.add_(0.1)
    pipe.save_pretrained(model)
    assert warned()
    assert not warned("--dtype", "bfloat16") and not warned("--model", str(model_dir))  # chosen to be other


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "carries no recipe"),
        ({"seed": 1}, "no `class_label`"),
        ({"class_label": 0, "seed": 1, "output_dir": "elsewhere"}, "`output_dir`, which a recipe cannot"),
        ({"class_label": 0, "seed": 1, "noise_level": ["--output_dir=elsewhere"]}, "--noise_level: invalid float"),
        ({"class_label": 0, "seed": -1}, "--seed: must be at least"),
    ],
)
def test_a_recipe_that_cannot_be_drawn_says_why(tmp_path, monkeypatch, capsys, recipe, message):
    monkeypatch.chdir(tmp_path)
    generate.save_image(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe)
    with pytest.raises(SystemExit):
        generate.main(["--recipe", "x.png"])
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("key", ["model", "lora"])
def test_a_recipe_does_not_choose_what_is_downloaded(tmp_path, capsys, key):
    recipe = {"class_label": 0, "seed": 1, "model": "pisdm-emoji128", key: "someone/other", "lora_scale": 0.5}
    recipe = recipe if key == "lora" else {**recipe, "lora": str(tmp_path)}
    generate.save_image(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe)
    arguments = ["--recipe", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit):
        generate.parse_args(arguments)
    assert re.search(rf"x\.png names the {key} 'someone/other', .*: pass --{key}\n", capsys.readouterr().err)
    for name in ("someone/other", "some/else", str(tmp_path)):  # a user may
        assert getattr(generate.parse_args([*arguments, f"--{key}", name]), key) == name


def test_a_class_that_a_recipe_names_is_told_as_such(model_dir, tmp_path):
    recipe = {"class_label": "zzz", "seed": 1, "model": str(model_dir)}
    generate.save_image(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe)
    for arguments, option in ((), "--recipe"), (("--classes", "yyy"), "--classes"):
        with pytest.raises(SystemExit, match=rf"error: {option} contains '(zzz|yyy)'"):
            run(model_dir, tmp_path, "--recipe", str(tmp_path / "x.png"), *arguments)


def test_a_recipe_that_cannot_be_read_is_told(tmp_path, capsys):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(SystemExit):
            generate.main(["--recipe", str(path)])
        message = capsys.readouterr().err
        assert f"--recipe: {path} cannot be read: " in message and "Errno" not in message


def test_a_grid_keeps_a_recipe_if_it_shows_one_image(model_dir, tmp_path):
    path = run(model_dir, tmp_path, "--classes", "0", "--images_per_class", "1")
    recipe = read_recipe(path)
    assert (recipe["class_label"], recipe["scheduler"]) == (NAMES[0], "DPMSolverMultistepScheduler")
    with pytest.raises(ValueError, match="carries no recipe"):
        read_recipe(run(model_dir, tmp_path, "--classes", "0", "--images_per_class", "2"))
    assert generate.parse_args(["--output_dir", "a"]).output is None
    assert generate.parse_args(["--output_dir", "a", "--output", "b.png"]).output == Path("b.png")


def test_a_class_that_shares_its_name_is_its_id_in_a_recipe(tmp_path):
    make_cascade(1, id2label=["cat, puss", "puss", "dog", *"abcdefg"]).save_pretrained(tmp_path / "model")
    generate.main(
        [
            *("--model", str(tmp_path / "model"), "--classes", "0", "1", "--images_per_class", "1"),
            *("--num_inference_steps", "1", "--output_dir", str(tmp_path / "images")),
        ]
    )
    recipes = [read_recipe(file) for file in sorted((tmp_path / "images").iterdir())]
    assert [recipe["class_label"] for recipe in recipes] == ["cat, puss", 1]  # "puss" is a name of both


def test_all_unknown_classes_are_told_and_only_near_names_suggested(model_dir, tmp_path):
    with pytest.raises(SystemExit) as error:
        run(model_dir, tmp_path, "--classes", "noto/flagg", "0", "zzz", "7")
    listed_by = re.escape(f"`pisdm generate --list_classes --model {model_dir}` lists them")
    assert re.search(f"'noto/flagg'.*'noto/flag'.*'zzz'.*{listed_by}.*contains 7, but", error.value.code)
    assert error.value.code.count("Did you mean") == 1


def test_a_misspelt_class_of_several_words_is_one_fault_and_missing_names_another(model_dir, tmp_path):
    with pytest.raises(SystemExit) as error:
        run(model_dir, tmp_path, "--classes", "golden retreiver")
    assert re.fullmatch(r".*contains 'golden retreiver'.*Did you mean 'golden retriever'\?", error.value.code)
    make_cascade(1).save_pretrained(tmp_path / "nameless")
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "nameless", tmp_path, "--classes", "cat", "dog")
    assert error.value.code.count("Cannot look up") == 1 and "ids from 0 to 9" in error.value.code


def test_classes_are_listed_without_weights(model_dir, tmp_path, capsys):
    bare = shutil.ignore_patterns("*.safetensors")
    model_dir = shutil.copytree(model_dir, tmp_path / "bare", ignore=bare)
    generate.main(["--model", str(model_dir), "--list_classes"])
    assert capsys.readouterr().out.splitlines() == [f"{number:>6}  {name}" for number, name in enumerate(NAMES)]
    generate.main(["--model", str(model_dir), "--list_classes", "FLU"])
    assert capsys.readouterr().out == "     0  fluent3d/animal-mammal\n"
    with pytest.raises(SystemExit, match=r"No class name contains 'retreiver'\. Did you mean 'golden retriever'"):
        generate.main(["--model", str(model_dir), "--list_classes", "retreiver"])
    make_cascade(1).save_pretrained(tmp_path / "nameless")
    with pytest.raises(SystemExit, match="no names: they are 0 to 9"):
        generate.main(["--model", str(tmp_path / "nameless"), "--list_classes", "cat"])


def test_an_adapters_own_classes_are_listed(model_dir, tmp_path, capsys):
    pipe = PISDMCascadePipeline.from_pretrained(model_dir)
    for stage in pipe.stages:
        resize_class_embedding(stage, NAMES, ["ours, mine", "yours"])
        add_lora(stage, rank=2, alpha=2)
    pipe.save_lora_weights(tmp_path / "base classes")
    pipe.register_to_config(id2label={0: "ours, mine", 1: "yours"})
    pipe.save_lora_weights(tmp_path / "lora", save_class_embeddings=True)
    listed = {}
    for name in ("lora", "base classes"):
        generate.main(["--model", str(model_dir), "--lora", str(tmp_path / name), "--list_classes"])
        listed[name] = capsys.readouterr().out.splitlines()
    assert listed["lora"] == ["     0  ours, mine", "     1  yours"]
    assert [line[8:] for line in listed["base classes"]] == NAMES
    run(model_dir, tmp_path, "--lora", str(tmp_path / "lora"), "--classes", "yours", "--images_per_class", "1")
    with pytest.raises(SystemExit) as error:
        run(model_dir, tmp_path, "--lora", str(tmp_path / "base classes"), "--classes", "zzz")
    assert f"--list_classes --model {model_dir} --lora '{tmp_path / 'base classes'}'` lists" in error.value.code


def test_a_damaged_adapters_classes_end_with_one_line(model_dir, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"transformer.class_embedding.weight": torch.tensor(1.0)}, file)
    with pytest.raises(SystemExit, match=r"^error: "):
        generate.main(["--model", str(model_dir), "--lora", str(tmp_path), "--list_classes"])


def test_an_adapter_in_place_of_a_model_is_told(model_dir, tmp_path, capsys):
    pipe = PISDMCascadePipeline.from_pretrained(model_dir)
    add_lora(pipe.transformer, rank=2, alpha=2)
    pipe.save_lora_weights(tmp_path)
    told = rf"{tmp_path} is a LoRA adapter: .*--lora, with its base as --model"
    with pytest.raises(OSError, match=told):
        PISDMCascadePipeline.from_pretrained(tmp_path)
    for parse_args in (generate.parse_args, sample.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse_args(["--model", str(tmp_path), "--output", str(tmp_path / "x.json")])
        assert re.search(rf"argument --model: {told}", capsys.readouterr().err)


def test_an_adapter_draws_at_its_scale(model_dir, tmp_path):
    pipe = PISDMCascadePipeline.from_pretrained(model_dir)
    add_lora(pipe.transformer, rank=2, alpha=64)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    pipe.save_lora_weights(tmp_path / "lora")
    drawn = {}
    for name, options in {
        "plain": [],
        "off": ["--lora", str(tmp_path / "lora"), "--lora_scale", "0"],
        "full": ["--lora", str(tmp_path / "lora")],
    }.items():
        path = run(model_dir, tmp_path, "--classes", "1", "--images_per_class", "1", *options)
        recipe = read_recipe(path)
        assert (recipe.get("lora"), recipe.get("lora_scale")) == {
            "plain": (None, None),
            "off": (str(tmp_path / "lora"), 0.0),
            "full": (str(tmp_path / "lora"), 1.0),
        }[name]
        with Image.open(path) as image:
            drawn[name] = image.convert("RGB")
    assert ImageChops.difference(drawn["plain"], drawn["off"]).getbbox() is None
    assert ImageChops.difference(drawn["plain"], drawn["full"]).getbbox() is not None


@pytest.mark.parametrize("has_instructions", [True, False])
def test_float16_runs_on_a_cpu_and_is_warned_of_where_it_is_slow(
    model_dir, tmp_path, caplog, capsys, monkeypatch, has_instructions
):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: has_instructions)
    run(model_dir, tmp_path, "--classes", "1", "--images_per_class", "1", "--dtype", "float16")
    assert [record.getMessage() for record in caplog.records] == []
    assert ("instructions for float16" in capsys.readouterr().err) is not has_instructions


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
    script = Path(__file__).parents[2] / "examples" / "generate.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, script, "--model", model_dir, "--classes", "0", "--images_per_class", "1"]
    command += ["--num_inference_steps", "1", "1", "--dtype", "bfloat16", "--output", tmp_path / "grid.png"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "1 image of 1 class at" in finished.stdout
    assert (tmp_path / "grid.png").exists()
