"""Saved pipelines come back whole, shortened where asked, and never from files that cannot be trusted."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from diffusers_pisdm import PISDMCascadePipeline
from tests.models.tiny_vae import make_tiny
from tests.pipelines.tiny_cascade import generators, make_cascade, make_transformer
from tests.pipelines.tiny_dit import make_dit


WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = ["cat", "dog, hound", *"cdefghij"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved cascade of four stages; copied by tests that change it."""
    path = tmp_path_factory.mktemp("cascade")
    scheduler_3 = EulerDiscreteScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    make_cascade(4, scheduler_3=scheduler_3, id2label=NAMES).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def run(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 2], num_inference_steps=2, output_type="np", generator=generators(0, 1)).images


def test_round_trip(folder):
    pipe = PISDMCascadePipeline.from_pretrained(folder)
    original = make_cascade(4, scheduler_3=pipe.scheduler_3)
    assert np.array_equal(run(pipe), run(original))
    assert pipe.config.id2label == dict(enumerate(NAMES))
    assert pipe.get_label_ids("hound") == [1]
    assert (pipe.vae, pipe.scheduler_2, pipe.scheduler_4) == (None, None, None)
    assert isinstance(pipe.scheduler_3, EulerDiscreteScheduler)
    assert all(not transformer.training for transformer in pipe.stages)


def test_loading_warns_of_nothing(folder, caplog):
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    with caplog.at_level(logging.WARNING):
        PISDMCascadePipeline.from_pretrained(folder)
    logger.propagate = False
    assert [record.getMessage() for record in caplog.records] == []


def test_names_may_be_given_at_load(folder):
    pipe = PISDMCascadePipeline.from_pretrained(folder, id2label={"0": "zero", 1: "one"})
    assert pipe.config.id2label == {0: "zero", 1: "one"}


def test_components_may_be_given_at_load(folder):
    transformer, scheduler = make_transformer(2), DDIMScheduler()
    pipe = PISDMCascadePipeline.from_pretrained(folder, transformer_2=transformer, scheduler=scheduler)
    assert pipe.transformer_2 is transformer
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize(("name", "num_stages"), [("transformer_4", 3), ("transformer_3", 2), ("transformer_2", 1)])
def test_shortened_at_load(folder, name, num_stages, tmp_path):
    pipe = PISDMCascadePipeline.from_pretrained(folder, **{name: None})
    assert pipe.num_stages == num_stages
    assert run(pipe).shape == (2, 4 * 2**num_stages, 4 * 2**num_stages, 3)
    pipe.save_pretrained(tmp_path)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    expected = {"transformer", "scheduler", *(f"transformer_{stage}" for stage in range(2, num_stages + 1))}
    assert folders == expected | ({"scheduler_3"} if num_stages >= 3 else set())
    assert np.array_equal(run(PISDMCascadePipeline.from_pretrained(tmp_path)), run(pipe))


def test_the_first_stage_stays(folder):
    with pytest.raises(ValueError, match=r"`transformer` is None, .*Pass `transformer`"):
        PISDMCascadePipeline.from_pretrained(folder, transformer=None)


def test_components_set_later_are_saved(tmp_path):
    pipe = make_cascade(3)
    pipe.scheduler_2 = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    transformer, pipe.transformer_3 = pipe.transformer_3, None
    pipe.transformer_3 = transformer
    pipe.save_pretrained(tmp_path)
    loaded = PISDMCascadePipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler_2, DDIMScheduler)
    assert loaded.num_stages == 3


def test_from_pipe():
    pipe = make_cascade(3, id2label=NAMES)
    same = PISDMCascadePipeline.from_pipe(pipe)
    for name, component in pipe.components.items():
        is_scheduler = name.startswith("scheduler") and component is not None
        assert (getattr(same, name) is component) != is_scheduler  # for threads, schedulers are copied
    assert same.scheduler.config == pipe.scheduler.config
    assert same.config.id2label == pipe.config.id2label
    assert np.array_equal(run(same), run(pipe))
    shorter = PISDMCascadePipeline.from_pipe(pipe, transformer_2=None)
    assert shorter.num_stages == 1
    assert pipe.num_stages == 3
    other = PISDMCascadePipeline.from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    assert isinstance(other.scheduler, DDIMScheduler)
    assert other.transformer is pipe.transformer


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_pipe_leaves_the_original_its_precision(name):
    pipe = make_cascade(2)
    pipe.transformer_2.to(torch.bfloat16)
    expected = run(pipe)
    other = PISDMCascadePipeline.from_pipe(pipe, **{name: torch.bfloat16})
    assert [transformer.dtype for transformer in other.stages] == [torch.bfloat16] * 2
    assert other.transformer_2 is pipe.transformer_2
    assert [transformer.dtype for transformer in pipe.stages] == [torch.float32, torch.bfloat16]
    assert [transformer.dtype for transformer in PISDMCascadePipeline.from_pipe(pipe).stages] == [
        torch.float32,
        torch.bfloat16,
    ]
    assert np.array_equal(run(pipe), expected)


def test_from_pipe_takes_what_another_kind_of_pipeline_has_in_common(folder):
    dit = make_dit()
    with pytest.raises(ValueError, match=r"`transformer` is of .*DiTTransformer2DModel.*`PISDMTransformer2DModel`"):
        PISDMCascadePipeline.from_pipe(dit)
    pipe = PISDMCascadePipeline.from_pipe(dit, transformer=make_transformer(1, in_channels=4))
    assert pipe.vae is dit.vae and pipe.scheduler.config == dit.scheduler.config
    with pytest.raises(TypeError, match="unexpected keyword argument 'id2labels'"):
        PISDMCascadePipeline.from_pipe(pipe, id2labels=NAMES)
    pipe = PISDMCascadePipeline.from_pretrained(folder)
    assert PISDMCascadePipeline.from_pipe(pipe).name_or_path == pipe.name_or_path


def test_variant(tmp_path):
    make_cascade(2).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer_2" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert pipe.transformer_2.dtype == torch.float16
    assert np.isfinite(run(pipe)).all()
    with pytest.raises(ValueError, match="no such modeling files are available"):
        PISDMCascadePipeline.from_pretrained(tmp_path, variant="bf16")


def test_shards(tmp_path):
    pipe = make_cascade(2)
    pipe.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list((tmp_path / "transformer_2").glob("*.safetensors"))) > 1
    assert np.array_equal(run(PISDMCascadePipeline.from_pretrained(tmp_path)), run(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_load(folder, dtype):
    pipe = PISDMCascadePipeline.from_pretrained(folder, dtype=dtype)
    assert all(transformer.dtype == dtype for transformer in pipe.stages)
    assert np.isfinite(run(pipe)).all()


def test_precision_of_each_component(folder):
    pipe = PISDMCascadePipeline.from_pretrained(folder, dtype={"transformer_3": torch.bfloat16})
    assert [transformer.dtype for transformer in pipe.stages] == [torch.float32] * 2 + [torch.bfloat16, torch.float32]


# Files that are missing, broken or not to be trusted


@pytest.mark.parametrize("loader", [PISDMCascadePipeline, DiffusionPipeline])
def test_missing_weights(copy, loader):
    (copy / "transformer_2" / WEIGHTS).unlink()
    with pytest.raises(OSError, match=rf"no file named {WEIGHTS} .*transformer_2\. Remedy: copy the files") as error:
        loader.from_pretrained(copy)
    assert error.type is OSError and str(error.value).count("Remedy") == 1


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-10], lambda data: data[:100], lambda data: b"", lambda data: b"\xff" * len(data)],
    ids=["truncated", "truncated header", "empty", "corrupt"],
)
def test_broken_weights(copy, damage):
    path = copy / "transformer" / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=rf"transformer/{WEIGHTS}.* Remedy: copy the files again"):
        PISDMCascadePipeline.from_pretrained(copy)


@pytest.mark.parametrize("loader", [PISDMCascadePipeline, DiffusionPipeline])
def test_pickled_weights_are_refused(copy, loader):
    path = copy / "transformer" / WEIGHTS
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(OSError, match=r"\(diffusion_pytorch_model\.bin\) are not read .*`use_safetensors=False`"):
        loader.from_pretrained(copy)
    with pytest.raises(OSError, match="are not read"):
        loader.from_pretrained(copy, use_safetensors=None)


def test_pickled_weights_load_where_asked_for(tmp_path):
    pipe = make_cascade(1)
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert np.array_equal(run(PISDMCascadePipeline.from_pretrained(tmp_path, use_safetensors=False)), run(pipe))


def test_weights_of_another_shape(copy):
    path = copy / "transformer" / WEIGHTS
    save_file({**load_file(path), "proj_out.bias": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"proj_out.bias expected shape torch.Size\(\[12\]\), but got torch.Size"):
        PISDMCascadePipeline.from_pretrained(copy)


@pytest.mark.parametrize("loader", [PISDMCascadePipeline, DiffusionPipeline])
def test_unknown_key_of_the_pipeline(copy, loader):
    path = copy / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformer_5": [None, None]}))
    with pytest.raises(ValueError, match=r"`model_index\.json` of .* unknown keys: transformer_5\. .*remove"):
        loader.from_pretrained(copy)


@pytest.mark.parametrize("loader", [PISDMCascadePipeline, DiffusionPipeline])
def test_unknown_key_of_a_model(copy, loader):
    path = copy / "transformer_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layer": 2}))
    with pytest.raises(ValueError, match=r"`config\.json` of PISDMTransformer2DModel .* unknown keys: num_layer\."):
        loader.from_pretrained(copy)


@pytest.mark.parametrize("loader", [PISDMCascadePipeline, DiffusionPipeline])
@pytest.mark.parametrize(
    ("name", "nearest"), [("id2labels", "id2label"), ("torch_dtyp", "torch_dtype"), ("tranformer_2", "transformer_2")]
)
def test_unknown_argument(folder, loader, name, nearest):
    with pytest.raises(TypeError, match=rf"PISDMCascadePipeline got .*'{name}'\. Did you mean '{nearest}'\?"):
        loader.from_pretrained(folder, **{name: None})


@pytest.mark.parametrize("loader", [PISDMCascadePipeline, DiffusionPipeline])
def test_class_names_of_another_cascade(copy, loader):
    path = copy / "model_index.json"
    names = {str(i): "class" for i in range(11)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names}))
    with pytest.raises(ValueError, match=r"`id2label` has '10' as an id, .* 0 to 9 \(`num_classes`\)"):
        loader.from_pretrained(copy)


@pytest.mark.parametrize("value", [10**9, 0, "1000", None])
def test_absurd_number_of_timesteps(copy, value):
    path = copy / "scheduler_3" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": value}))
    with pytest.raises(ValueError, match=rf"`num_train_timesteps` in .*scheduler_3.* 1 to 100000 but is {value!r}\."):
        PISDMCascadePipeline.from_pretrained(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["transformer_2", "vae"])
def test_weights_that_are_not_finite(tmp_path, name, value):
    pipe = make_cascade(2, in_channels=4, vae=make_tiny(latent_channels=4))
    parameter_name, parameter = [*getattr(pipe, name).named_parameters()][-1]
    parameter.data.view(-1)[-1] = value
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`{parameter_name}` of .*{name}.* NaN or infinite weights\. Copy"):
        PISDMCascadePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "file"), [("", "model_index.json"), ("transformer", "config.json")])
def test_missing_configuration(copy, name, file):
    (copy / name / file).unlink()
    with pytest.raises(OSError, match=f"no (file named )?`?{file}"):
        PISDMCascadePipeline.from_pretrained(copy)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_cascade(id2label={0: "cat"}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "culprit"),
    [
        ("model_index.json", {"_class_name": None}, "_class_name"),
        ("model_index.json", {"transformer": 3}, "transformer"),
        ("model_index.json", {"scheduler": ["diffusers", {}]}, "scheduler"),
        ("model_index.json", {"vae": None}, "vae"),
        ("model_index.json", {"id2label": "{}"}, "id2label"),
        ("model_index.json", {"id2label": {"0": 3}}, "id2label"),
        ("model_index.json", {"default_guidance_scale": [[[]]]}, "default_guidance_scale"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": True}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "zigzag"}, "zigzag"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear", "beta_end": "x"}, "Multistep"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(saved, file, changes, culprit):
    path = saved / file
    content = path.read_text()
    path.write_text(json.dumps({**json.loads(content), **changes}))
    try:
        with pytest.raises(ValueError, match=rf"(?s)({culprit}.*{path}|{path}.*{culprit})"):
            PISDMCascadePipeline.from_pretrained(saved)
    finally:
        path.write_text(content)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_endless_nesting_is_named(saved, file):
    path = saved / file
    content = path.read_text()
    path.write_text("[" * 100_000)
    try:
        with pytest.raises((ValueError, OSError), match=r"nested too deeply|recursion"):
            PISDMCascadePipeline.from_pretrained(saved)
    finally:
        path.write_text(content)
