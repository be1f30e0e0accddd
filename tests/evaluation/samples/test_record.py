import json

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.evaluation import SampleSettings, read_sample_set
from diffusers_pisdm.evaluation.samples.record import RECORD_FILE, claim_folder, describe_samples, weights_fingerprint
from tests.pipelines.tiny_cascade import make_cascade, make_transformer
from tests.support.hub_server import connect, serve_hub


def describe(pipe, **settings):
    return describe_samples(pipe, SampleSettings(**settings).resolve(pipe))


def test_the_record_holds_what_makes_the_images(tmp_path):
    pipe = make_cascade(2, scheduler_2=DDIMScheduler(prediction_type="v_prediction"))
    claim_folder(tmp_path, describe(pipe, num_samples=7, classes=[3, 1], noise_level=0.25), 0)
    record = read_sample_set(tmp_path)
    assert SampleSettings(**record["settings"]) == SampleSettings(
        7, 0, [3, 1], 20, 4.0, guidance_start=0.0, guidance_stop=1.0, noise_level=0.25
    )
    assert record["num_classes"] == 10
    assert record["model"]["pipeline"] == "PISDMCascadePipeline"
    assert record["model"]["dtype"] == "float32"
    schedulers = record["schedulers"]
    assert {name: config["_class_name"] for name, config in schedulers.items()} == {
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_2": "DDIMScheduler",
    }
    assert schedulers["scheduler"]["beta_schedule"] == "squaredcos_cap_v2"
    assert record["packages"].keys() == {"diffusers_pisdm", "diffusers", "torch", "numpy", "pillow"}
    text = (tmp_path / RECORD_FILE).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_model_of_the_hub_is_recorded_with_its_commit(tmp_path, monkeypatch):
    make_cascade(2).save_pretrained(tmp_path / "saved")
    with serve_hub({"someone/cascade": tmp_path / "saved"}) as hub:
        connect(monkeypatch, hub, None, tmp_path / "home")
        # What diffusers' functions have taken from the environment at import.
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        pipe = PISDMCascadePipeline.from_pretrained("someone/cascade", cache_dir=tmp_path / "cache")
        commit = hub.hub.repositories["someone/cascade"].branches["main"]
    model, local = describe(pipe)["model"], describe(make_cascade(2))["model"]
    assert (model["path"], model["revision"]) == ("someone/cascade", commit)
    assert (local["path"], local["revision"]) == (None, None)
    assert model["sha256"] == local["sha256"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "not a sample set: .*sample_set.json"),
        (b"", "sample_set.json is damaged: "),
        (b'{"settings": {', "sample_set.json is damaged: "),
        (b"\xff\xfe", "sample_set.json is damaged: "),
        (b"[]", "not a sample set's record: it lacks settings, num_classes"),
        (b'{"settings": {}, "num_classes": 2, "model": {}}', "it lacks schedulers, packages"),
    ],
)
def test_what_is_no_sample_set_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sample_set(tmp_path)


def test_neither_is_a_folder_that_is_not_there_or_a_file(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(ValueError, match=f"{name} is not a sample set"):
            read_sample_set(tmp_path / name)


def test_other_versions_are_told_once(tmp_path):
    record = describe(make_cascade(1), num_samples=1)
    claim_folder(tmp_path, record, 0)
    (tmp_path / "000").mkdir()
    (tmp_path / "000" / "000000.png").touch()
    newer = {**record, "packages": {**record["packages"], "torch": "9.9"}}
    with pytest.warns(UserWarning, match="other package versions: packages.torch was '.*', is '9.9'") as warned:
        for process_index in range(3):
            claim_folder(tmp_path, newer, process_index)
    assert len(warned) == 1


def test_a_saved_and_loaded_or_compiled_pipeline_keeps_it(tmp_path):
    pipe = make_cascade()
    expected = weights_fingerprint(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = PISDMCascadePipeline.from_pretrained(tmp_path)
    assert weights_fingerprint(loaded) == expected
    loaded.transformer = torch.compile(loaded.transformer)
    assert weights_fingerprint(loaded) == expected


def test_any_change_of_the_model_shows():
    def changed_weight(pipe):
        with torch.no_grad():
            pipe.transformer_2.proj_out.bias[-1] += 1e-6

    def swapped(pipe):
        pipe.transformer.proj_out.weight, pipe.transformer_2.proj_out.weight = (
            pipe.transformer_2.proj_out.weight,
            pipe.transformer.proj_out.weight,
        )

    def other_configuration(pipe):
        pipe.transformer = make_transformer(1, snake=True)

    def cast(pipe):
        pipe.to(torch.bfloat16)

    def shortened(pipe):
        pipe.transformer_2 = None

    fingerprints = {weights_fingerprint(make_cascade())}
    changes = [changed_weight, swapped, other_configuration, cast, shortened]
    for change in changes:
        pipe = make_cascade()
        change(pipe)
        fingerprints.add(weights_fingerprint(pipe))
    assert len(fingerprints) == 1 + len(changes)


def test_weights_that_are_not_in_memory_are_named():
    pipe = make_cascade(1)
    pipe.transformer.proj_out.to("meta")
    with pytest.raises(ValueError, match=r"`transformer.proj_out.bias` is not in memory.*enable_model_cpu_offload"):
        weights_fingerprint(pipe)
