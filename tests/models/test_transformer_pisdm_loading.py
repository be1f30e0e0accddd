"""Saving and loading the model, its precisions, and files that are missing, broken or not to be trusted."""

import json
import logging

import diffusers
import pytest
import torch
from diffusers import AutoModel
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, constants
from safetensors.torch import load_file, save_file

from diffusers_pisdm import PISDMTransformer2DModel
from tests.models.tiny_model import make_inputs, make_model


WEIGHTS = "diffusion_pytorch_model.safetensors"
SSM_PARAMETERS = ("A_log", "D", "dt_bias")


@torch.no_grad()
def run(model, dtype=torch.float32):
    return model(**make_inputs(model, dtype=dtype)).sample


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    return tmp_path


# --- Round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [PISDMTransformer2DModel, AutoModel])
def test_folder(folder, loader):
    model = loader.from_pretrained(str(folder))
    assert type(model) is PISDMTransformer2DModel and not model.training
    assert torch.equal(run(model), run(make_model()))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]


def test_config_keeps_every_argument(tmp_path):
    """Other values than the defaults, through JSON, where tuples become lists."""
    arguments = {
        "sample_size": 12,
        "patch_size": 4,
        "in_channels": 2,
        "out_channels": 5,
        "num_layers": 3,
        "hidden_size": 8,
        "state_size": 2,
        "conv_kernel": 4,
        "expand": 1,
        "time_step_rank": 3,
        "num_classes": 7,
        "low_res_channels": 1,
        "scan_directions": ("column_top_left", "row_bottom_left"),
        "snake": True,
        "num_padding_tokens": 2,
        "local_enhancement": False,
        "long_skips": False,
        "overlapping_patches": True,
        "pixel_head_channels": 3,
        "residual_scale": 0.25,
        "class_factors": ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)),
    }
    PISDMTransformer2DModel(**arguments).save_pretrained(tmp_path)
    loaded = PISDMTransformer2DModel.from_pretrained(tmp_path)
    config = {name: value for name, value in loaded.config.items() if not name.startswith("_")}
    as_lists = {
        "scan_directions": list(arguments["scan_directions"]),
        "class_factors": [list(ids) for ids in arguments["class_factors"]],
    }
    assert config == {**arguments, **as_lists}
    assert loaded.layer_directions == ("column_top_left", "row_bottom_left", "column_top_left")
    inputs = make_inputs(loaded, height=8, width=12)
    assert loaded(**inputs).sample.shape == (2, 5, 8, 12)


def test_variant(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(run(PISDMTransformer2DModel.from_pretrained(tmp_path, variant="fp16")), run(model))
    with pytest.raises(OSError, match=f"no file named {WEIGHTS}"):
        PISDMTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_shards(tmp_path, variant, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB", variant=variant)
    index = SAFE_WEIGHTS_INDEX_NAME if variant is None else SAFE_WEIGHTS_INDEX_NAME.replace(".json", ".bf16.json")
    files = set(json.loads((tmp_path / index).read_text())["weight_map"].values())
    assert files == {path.name for path in tmp_path.glob("*.safetensors")} and len(files) > 2
    assert torch.equal(run(PISDMTransformer2DModel.from_pretrained(tmp_path, variant=variant)), run(model))

    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", True)
    assert torch.equal(run(PISDMTransformer2DModel.from_pretrained(tmp_path, variant=variant)), run(model))


def test_exponential_average(tmp_path):
    model = make_model()
    ema = EMAModel(model.parameters(), model_cls=PISDMTransformer2DModel, model_config=model.config, decay=0.5)
    before = model.proj_out.weight.clone()
    ema.step(model.parameters())
    model.proj_out.weight.data += 1.0
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)

    averaged = PISDMTransformer2DModel.from_pretrained(tmp_path)  # EMAModel adds keys to the configuration
    assert 0 < (averaged.proj_out.weight - before).mean() < 1
    loaded = EMAModel.from_pretrained(tmp_path, PISDMTransformer2DModel)
    assert loaded.optimization_step == 2
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, ema.shadow_params))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": "disk"}], ids=str)
def test_device_map(folder, tmp_path, device_map):
    offload_folder = tmp_path / "offloaded" if device_map == {"": "disk"} else None
    model = PISDMTransformer2DModel.from_pretrained(folder, device_map=device_map, offload_folder=offload_folder)
    assert torch.equal(run(model), run(make_model()))


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_the_scan_stay_in_single_precision(folder, dtype):
    model = PISDMTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    assert model.dtype == dtype
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.split(".")[-1] in SSM_PARAMETERS else dtype), name
    exact = make_model()
    for name, parameter in exact.named_parameters():
        if name.split(".")[-1] in SSM_PARAMETERS:
            assert torch.equal(model.get_parameter(name), parameter)

    out, expected = run(model, dtype), run(exact)
    assert out.dtype == dtype
    assert (out.float() - expected).norm() / expected.norm() < (5e-2 if dtype == torch.bfloat16 else 1e-2)


def test_half_precision_is_kept_on_disk(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "single")
    half = PISDMTransformer2DModel.from_pretrained(tmp_path / "single", torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = PISDMTransformer2DModel.from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters()))
    dtypes = {name.split(".")[-1]: tensor.dtype for name, tensor in load_file(tmp_path / "half" / WEIGHTS).items()}
    assert {dtypes[name] for name in SSM_PARAMETERS} == {torch.float32}
    assert dtypes["scale_shift_table"] == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bare_cast_warns_and_still_scans_in_single_precision(dtype, caplog):
    """diffusers casts everything and says so; the states are of single precision even then."""
    model = make_model()
    diffusers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="diffusers.models.modeling_utils"):
            model.to(dtype)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert f"should be kept in float32: {list(SSM_PARAMETERS)}" in caplog.text
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    expected = run(make_model())
    assert (run(model, dtype).float() - expected).norm() / expected.norm() < 5e-2


# --- Files that are missing, broken or not to be trusted -------------------------------------------------------------


def test_missing_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError) as error:
        PISDMTransformer2DModel.from_pretrained(folder)
    assert error.type is OSError
    assert f"no file named {WEIGHTS}" in str(error.value)
    assert str(folder) in str(error.value)
    assert "Remedy: copy the files again, or download them" in str(error.value)
    assert "Pickled" not in str(error.value)


def test_missing_shard(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="60KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(OSError, match=f"{lost.name}"):
        PISDMTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-10], lambda data: data[:100], lambda data: b"", lambda data: b"\xff" * len(data)],
    ids=["truncated", "truncated header", "empty", "corrupt"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_broken_weights(tmp_path, damage, sharded):
    make_model().save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "1GB")
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError) as error:
        PISDMTransformer2DModel.from_pretrained(tmp_path)
    assert error.type is OSError
    assert path.name in str(error.value)
    assert "Remedy: copy the files again, or download them" in str(error.value)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=r"\(diffusion_pytorch_model\.bin\) are not read .*`use_safetensors=False`"):
        PISDMTransformer2DModel.from_pretrained(folder)
    assert torch.equal(run(PISDMTransformer2DModel.from_pretrained(folder, use_safetensors=False)), run(make_model()))


def test_incomplete_weights(folder):
    path = folder / WEIGHTS
    tensors = load_file(path)
    del tensors["proj_out.bias"], tensors["transformer_blocks.2.mixer.D"]
    save_file(tensors, path)
    with pytest.raises(OSError) as error:
        PISDMTransformer2DModel.from_pretrained(folder)
    assert str(error.value) == (
        f"The weights of PISDMTransformer2DModel in {folder} lack transformer_blocks.2.mixer.D, proj_out.bias. Remedy:"
        " copy or download weights and `config.json` again; they do not belong together."
    )


@pytest.mark.parametrize(
    ("option", "value", "surplus"),
    [
        ("num_layers", 2, r"transformer_blocks\.2\.mixer\.A_log"),
        ("long_skips", False, r"transformer_blocks\.2\.skip_proj\.bias"),
        ("local_enhancement", False, r"local_in\.bias"),
        ("num_padding_tokens", 0, "padding_tokens"),
        ("pixel_head_channels", None, r"pixel_head\.conv_in\.bias"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_surplus_weights(tmp_path, option, value, surplus, sharded):
    """A model without parts that the file has would load and draw other images."""
    make_model(pixel_head_channels=4).save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "1GB")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(OSError, match=rf"weights of PISDM.* also hold .*{surplus}.* Remedy: .*not belong together"):
        PISDMTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    path = folder / WEIGHTS
    tensors = load_file(path)
    tensors["transformer_blocks.1.mixer.D"][3] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"`transformer_blocks\.1\.mixer\.D` of .*{folder.name}.*NaN or infinite"):
        PISDMTransformer2DModel.from_pretrained(folder)


def test_weights_beyond_half_precision(folder):
    path = folder / WEIGHTS
    tensors = load_file(path)
    tensors["proj_out.bias"][0] = 1e5
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"`proj_out\.bias` .*try `dtype=torch\.float32`"):
        PISDMTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float16)
    assert torch.get_default_dtype() == torch.float32
    assert PISDMTransformer2DModel.from_pretrained(folder).proj_out.bias[0] == 1e5


def test_a_refused_configuration_leaves_the_default_precision(folder):
    """diffusers sets it while it makes the model."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 10**6}))
    with pytest.raises(ValueError, match="`num_layers` must be an integer from 1 to 1000, got 1000000"):
        PISDMTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float16)
    assert torch.get_default_dtype() == torch.float32


def test_weights_of_another_shape(folder):
    path = folder / WEIGHTS
    tensors = load_file(path)
    save_file({**tensors, "proj_out.bias": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"proj_out\.bias expected shape torch\.Size\(\[12\]\), but got torch\.Size"):
        PISDMTransformer2DModel.from_pretrained(folder)


def test_unknown_key_of_the_configuration(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layer": 2, "heads": 4}))
    message = r"^`config\.json` of PISDMTransformer2DModel .*: heads, num_layer\. .* remove .*: class_factors, conv"
    with pytest.raises(ValueError, match=message):
        PISDMTransformer2DModel.from_pretrained(folder)


def test_missing_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"no file named config\.json found in directory"):
        PISDMTransformer2DModel.from_pretrained(folder)
