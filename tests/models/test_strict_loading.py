"""A class with `StrictLoadingMixin` loads as diffusers does, or says why not."""

import json

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffusers_pisdm.models.strict_loading import StrictLoadingMixin


class Model(StrictLoadingMixin, ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 3, depth: int = 1):
        super().__init__()
        self.linear = torch.nn.Linear(width, depth)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def change_config(folder, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_round_trip(tmp_path):
    model = Model(width=5)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert loaded.config.width == 5
    assert torch.equal(loaded.linear.weight, model.linear.weight)


def test_unknown_key(tmp_path):
    Model().save_pretrained(tmp_path)
    change_config(tmp_path, widht=4, length=1)
    message = r"`config\.json` of Model .* unknown keys: length, widht\. .* Known keys: depth, width\."
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Model.from_config({"width": 3, "widht": 4, "length": 1})


def test_unknown_argument(tmp_path):
    Model().save_pretrained(tmp_path)
    for name, nearest in (("widht", "width"), ("torch_dtyp", "torch_dtype"), ("sub_folder", "subfolder")):
        with pytest.raises(TypeError, match=rf"Model got .*argument '{name}'\. Did you mean '{nearest}'\?"):
            Model.from_pretrained(tmp_path, **{name: 1})
    with pytest.raises(TypeError, match="'widht'"):
        Model.from_config({"width": 3}, widht=4)


def test_loading_info(tmp_path):
    Model().save_pretrained(tmp_path)
    model, info = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, Model) and info["missing_keys"] == info["unexpected_keys"] == []


def test_keys_that_diffusers_adds_are_known(tmp_path):
    Model().save_pretrained(tmp_path)
    change_config(tmp_path, _private=1, auto_map={"AutoModel": "model.Model"})
    assert Model.from_pretrained(tmp_path).config.width == 3


def test_pickled_weights(tmp_path):
    Model().save_pretrained(tmp_path / "part", safe_serialization=False)
    message = r"model\.safetensors found.* \(diffusion_pytorch_model\.bin\) are not read.*use_safetensors=False"
    for arguments in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(OSError, match=message):
            Model.from_pretrained(tmp_path, subfolder="part", **arguments)
    assert isinstance(Model.from_pretrained(tmp_path, subfolder="part", use_safetensors=False), Model)


def test_broken_pickles(tmp_path):
    """Whoever has asked for them is not told how to ask."""
    Model().save_pretrained(tmp_path / "part", safe_serialization=False)
    (tmp_path / "part" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(OSError, match=r"model\.bin.*Remedy: copy the files again, .*`force_download=True`\.$"):
        Model.from_pretrained(tmp_path, subfolder="part", use_safetensors=False)


def test_broken_weights(tmp_path):
    Model().save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{WEIGHTS}.* Remedy: copy the files again, .*`force_download=True`\\.$"):
        Model.from_pretrained(tmp_path)


def test_weights_of_another_size_are_named_and_no_random_ones_advised(tmp_path):
    Model().save_pretrained(tmp_path)
    change_config(tmp_path, width=4)
    message = r"weights in .* `config\.json`: linear\.weight expected shape .*\. Copy or download both again"
    with pytest.raises(ValueError, match=message) as error:
        Model.from_pretrained(tmp_path)
    assert "mismatched" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_no_repository(name):
    with pytest.raises(FileNotFoundError, match=f"no folder {name}"):
        Model.from_pretrained(name)


def test_missing_configuration(tmp_path):
    with pytest.raises(OSError, match=r"no file named config\.json .*Remedy: copy the files again"):
        Model.from_pretrained(tmp_path)


def test_errors_of_the_hub_are_diffusers_own(tmp_path):
    with pytest.raises(OSError, match="someone/nothing") as error:
        Model.from_pretrained("someone/nothing", cache_dir=tmp_path, local_files_only=True)
    assert "Remedy" not in str(error.value)
