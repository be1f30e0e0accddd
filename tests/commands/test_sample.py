import re

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.commands import drawing, sample
from diffusers_pisdm.evaluation import SampleSettings, read_sample_set, write_sample_set
from diffusers_pisdm.training.fine_tuning import add_lora, resize_class_embedding
from tests.pipelines.tiny_cascade import make_cascade
from tests.pipelines.tiny_dit import make_dit
from tests.support.processes import run_ranks, start_ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_cascade(2).save_pretrained(folder)
    return str(folder)


def run(model, folder, *arguments):
    sample.main(["--model", model, "--output_dir", str(folder), "--num_samples", "4", *arguments])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writes_what_the_arguments_say(model, tmp_path, capsys):
    options = ["--num_inference_steps", "2", "1", "--guidance_scale", "1.5", "--noise_level", "0.2", "--seed", "5"]
    options += ["--classes", "3", "9", "--scheduler", "DDIMScheduler", "--batch_size", "3", "--dtype", "bfloat16"]
    folder, packed = tmp_path / "samples", tmp_path / "samples.npz"
    run(model, folder, *options, "--save_npz", str(packed))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"Wrote {packed}"
    assert re.fullmatch(rf"4 samples in {folder}, [\d.]+ s", out[1])

    record = read_sample_set(folder)
    settings = record["settings"]
    assert (settings["num_samples"], settings["seed"], settings["classes"]) == (4, 5, [3, 9])
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == ([2, 1], 1.5)
    assert (settings["noise_level"], settings["guidance_stop"]) == (0.2, 1.0)
    assert (record["model"]["path"], record["model"]["dtype"]) == (model, "bfloat16")
    assert record["schedulers"]["scheduler"]["_class_name"] == "DDIMScheduler"
    with np.load(packed, allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (4, 16, 16, 3)

    before = contents(folder)
    run(model, folder, *options)
    assert contents(folder) == before


def test_an_adapter_draws_at_its_scale_and_with_its_classes(model, tmp_path):
    pipe = PISDMCascadePipeline.from_pretrained(model)
    old = [str(number) for number in range(10)]
    names = ["ours", *old[1:]]
    for stage in pipe.stages:
        resize_class_embedding(stage, old, names)
        add_lora(stage, rank=2, alpha=64)
        for name, weight in stage.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
    pipe.register_to_config(id2label=dict(enumerate(names)))
    lora = str(tmp_path / "lora")
    pipe.save_lora_weights(lora, save_class_embeddings=True)
    options = ["--num_inference_steps", "1", "--classes", "1", "2"]
    run(model, tmp_path / "plain", *options)
    run(model, tmp_path / "off", *options, "--lora", lora, "--lora_scale", "0")
    run(model, tmp_path / "half", *options, "ours", "--lora", lora, "--lora_scale", "0.5")
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    write_sample_set(pipe, tmp_path / "expected", SampleSettings(4, classes=[1, 2, 0], num_inference_steps=1))

    drawn = {}
    for name in ("plain", "off", "half", "expected"):
        files = sorted((tmp_path / name).rglob("*.png"))
        drawn[name] = np.stack([np.asarray(Image.open(file), dtype=int) for file in files])
    assert np.array_equal(drawn["plain"], drawn["off"])
    assert abs(drawn["half"] - drawn["expected"]).max() <= 1 < abs(drawn["half"] - drawn["plain"]).max()
    record = read_sample_set(tmp_path / "half")
    assert record["settings"]["classes"] == [1, 2, 0]
    assert record["model"]["path"] == f"{model} with {lora}, scaled by 0.5"
    with pytest.raises(SystemExit, match=r"made differently: model\.sha256"):
        run(model, tmp_path / "half", *options, "ours", "--lora", lora)
    make_dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(SystemExit, match="DiTPipeline is no PIS-DM cascade"):
        run(str(tmp_path / "dit"), tmp_path / "samples", "--lora", lora)


def test_any_class_conditional_pipeline_is_sampled(tmp_path):
    make_dit().save_pretrained(tmp_path / "dit")
    run(str(tmp_path / "dit"), tmp_path / "samples", "--num_inference_steps", "1", "--classes", "uniform")
    record = read_sample_set(tmp_path / "samples")
    assert (record["model"]["pipeline"], record["settings"]["classes"]) == ("DiTPipeline", "uniform")


def test_classes_mean_the_same_as_in_generate(tmp_path):
    """Names that are numbers are not their ids: 9 is the class of id 1, and 5, which is no name, an id."""
    names = ["2", "9", *"abcdefg", "tench, 7"]
    make_cascade(1, id2label=names).save_pretrained(tmp_path / "model")
    run(str(tmp_path / "model"), tmp_path / "samples", "--num_inference_steps", "1", "--classes", "9", "5", "b", "7")
    ids = [1, 5, 3, 9]
    assert read_sample_set(tmp_path / "samples")["settings"]["classes"] == ids
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path / "model")
    assert drawing.find_class_ids(pipe, ["9,5", "b 7"], "m") == pipe.get_label_ids(["9", 5, "b", "7"]) == ids


def test_names_of_another_pipeline():
    dit = make_dit()
    dit = type(dit)(dit.transformer, dit.vae, dit.scheduler, id2label={0: "tench, Tinca tinca", 1: "2"})
    assert drawing.find_class_ids(dit, ["Tinca tinca", "2", "0"], "m") == [0, 1, 0]
    unnamed = DDPMPipeline(UNet2DModel(block_out_channels=(32, 32, 32, 32)), DDPMScheduler())
    with pytest.raises(ValueError, match="pass class ids to --classes, not 'cat'"):
        drawing.find_class_ids(unnamed, ["1", "cat"], "m")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_samples", "4294967297"], "`num_samples` has to be from 1"),
        (["--classes", "cat", "3"], "Cannot look up class names"),
        (["--classes", "-1"], "--classes contains -1, but this pipeline's classes are 0 to 9"),
        (["--guidance_scale", "1", "2", "3"], "`guidance_scale` has 3 values, but this pipeline has 2 stages"),
        (["--model", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
    ],
)
def test_bad_arguments_end_with_one_line_and_no_image(model, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(model, tmp_path / "samples", *arguments)
    assert error.value.code.startswith("error: ")
    assert list(tmp_path.rglob("*.png")) == []


def test_a_folder_of_no_pipeline_is_told(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(SystemExit, match="is a pipeline of class None, which diffusers does not have"):
        run(str(tmp_path), tmp_path / "samples")


def test_killed_processes_go_on_to_the_files_that_one_process_writes(model, tmp_path):
    killed = tmp_path / "killed"
    arguments = ["--model", model, "--num_samples", "20", "--batch_size", "2", "--num_inference_steps", "2"]
    processes = start_ranks(sample.main, [*arguments, "--output_dir", str(killed)])
    processes[0].wait_for(lambda: len(list(killed.rglob("*.png"))) >= 5)
    for process in processes:
        process.kill()
    assert 5 <= len(list(killed.rglob("*.png"))) < 20, "killed too late to test anything"
    rest = ["--output_dir", str(killed), "--save_npz", str(tmp_path / "killed.npz")]
    processes = run_ranks(sample.main, [*arguments, *rest])
    alone = ["--output_dir", str(tmp_path / "one"), "--save_npz", str(tmp_path / "one.npz")]
    processes += run_ranks(sample.main, [*arguments, *alone], num_processes=1)
    assert sum(process.stdout.count("20 samples in") for process in processes) == 2  # one process of each run says so
    killed, one = contents(tmp_path / "killed"), contents(tmp_path / "one")
    assert killed == one
    assert len(one) == 21
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
