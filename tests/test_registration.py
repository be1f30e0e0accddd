"""diffusers' own loaders find the package's classes, in a process that has done nothing but import the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_pisdm
from tests.hub_server import serve_hub
from tests.pipelines.tiny_cascade import make_cascade


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cascade")
    make_cascade(2, id2label=["cat", "dog"]).save_pretrained(path)
    return path


def run_python(code: str, **environment: str) -> list:
    """Runs code in a fresh process that has imported the package and returns what it puts in `result`."""
    code = f"import json, diffusers_pisdm\n{code}\nprint(json.dumps(result))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


LOAD_ALL = """
from diffusers import AutoModel, DiffusionPipeline
from diffusers_pisdm import PISDMCascadePipeline
pipes = [loader.from_pretrained({name!r}) for loader in (PISDMCascadePipeline, DiffusionPipeline)]
model = AutoModel.from_pretrained({name!r}, subfolder="transformer_2")
result = [type(pipe).__name__ for pipe in pipes] + [type(model).__name__, model.config.low_res_channels]
result += [pipe.num_stages for pipe in pipes] + [pipe.config.id2label[1] for pipe in pipes]
"""
LOADED = ["PISDMCascadePipeline"] * 2 + ["PISDMTransformer2DModel", 3, 2, 2, "dog", "dog"]


def test_public_names():
    assert set(diffusers_pisdm.__all__) == {
        "ModelMixin",
        "PISDM_SIZES",
        "PISDMCascadePipeline",
        "PISDMCascadePipelineOutput",
        "PISDMTransformer2DModel",
        "__version__",
    }
    assert all(hasattr(diffusers_pisdm, name) for name in diffusers_pisdm.__all__)


def test_registration():
    """The private parts of diffusers that the package changes: what to look at when a new diffusers breaks loading."""
    assert LOADABLE_CLASSES["diffusers_pisdm"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    assert diffusers.PISDMCascadePipeline is diffusers_pisdm.PISDMCascadePipeline
    assert diffusers.PISDMTransformer2DModel is diffusers_pisdm.PISDMTransformer2DModel
    assert not hasattr(diffusers.pipelines, "diffusers_pisdm")  # it would be taken for diffusers' own module


def test_saved_pipeline_names_the_package(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "PISDMCascadePipeline"
    assert index["transformer"] == index["transformer_2"] == ["diffusers_pisdm", "PISDMTransformer2DModel"]
    assert index["transformer_3"] == [None, None]


def test_loads_from_a_folder(folder):
    assert run_python(LOAD_ALL.format(name=str(folder))) == LOADED


def test_model_loads_from_its_own_folder(folder):
    code = f"from diffusers import AutoModel\nmodel = AutoModel.from_pretrained({str(folder / 'transformer')!r})\n"
    assert run_python(code + "result = [type(model).__name__]") == ["PISDMTransformer2DModel"]


def test_loads_from_a_hub_and_then_from_its_cache(folder, tmp_path):
    with serve_hub({"someone/cascade": folder}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        assert run_python(LOAD_ALL.format(name="someone/cascade"), **environment) == LOADED
        weights = "/someone/cascade/resolve/"
        assert any(path.startswith(weights) and path.endswith("safetensors") for _, _, path in hub.requests)
    environment["HF_HUB_OFFLINE"] = "1"
    assert run_python(LOAD_ALL.format(name="someone/cascade"), **environment) == LOADED


def test_shortened_cascade_downloads_no_more_than_it_needs(folder, tmp_path):
    code = """
from diffusers_pisdm import PISDMCascadePipeline
pipe = PISDMCascadePipeline.from_pretrained("someone/cascade", transformer_2=None)
result = [pipe.num_stages]
"""
    with serve_hub({"someone/cascade": folder}) as hub:
        assert run_python(code, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0") == [1]
        assert not any("transformer_2" in path for _, _, path in hub.requests)


def test_pickled_weights_on_a_hub_are_refused(tmp_path):
    make_cascade(1).save_pretrained(tmp_path / "repo", safe_serialization=False)
    code = """
from diffusers_pisdm import PISDMCascadePipeline
try:
    PISDMCascadePipeline.from_pretrained("someone/pickled")
except OSError as error:
    result = [str(error)]
"""
    with serve_hub({"someone/pickled": tmp_path / "repo"}) as hub:
        (message,) = run_python(code, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
        assert "safetensors" in message
        assert not any(path.endswith(".bin") for _, _, path in hub.requests)
