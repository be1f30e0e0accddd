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
from tests.pipelines.tiny_cascade import make_cascade
from tests.support.hub_server import serve_hub


ROOT = Path(__file__).parents[1]

LOAD = """
import json
import os
import sys

import diffusers_pisdm
from diffusers import AutoModel, DiffusionPipeline
from diffusers_pisdm import PISDMCascadePipeline


def load(name, **kwargs):
    pipes = [loader.from_pretrained(name, **kwargs) for loader in (PISDMCascadePipeline, DiffusionPipeline)]
    model = AutoModel.from_pretrained(name, subfolder="transformer_2", **kwargs)
    classes = [type(loaded).__name__ for loaded in (*pipes, model)]
    return [*classes, model.config.low_res_channels, *(pipe.num_stages for pipe in pipes)]


result = {
    "threads' waiting": os.environ.get("OMP_WAIT_POLICY"),
    "folder": load(sys.argv[1]),
    "model alone": type(AutoModel.from_pretrained(sys.argv[1] + "/transformer")).__name__,
    "hub": load("someone/cascade"),
    "cache": load("someone/cascade", local_files_only=True),
    "shortened": PISDMCascadePipeline.from_pretrained("someone/shortened", transformer_2=None).num_stages,
}
try:
    PISDMCascadePipeline.from_pretrained("someone/pickled")
except OSError as error:
    result["pickled"] = str(error)
print(json.dumps(result))
"""
LOADED = ["PISDMCascadePipeline", "PISDMCascadePipeline", "PISDMTransformer2DModel", 3, 2, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cascade")
    make_cascade(2).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder, tmp_path_factory):
    """What a fresh process loads, and what it asks the Hub for; one process, as importing takes most of the time."""
    home = tmp_path_factory.mktemp("home")
    make_cascade(1).save_pretrained(home / "pickled", safe_serialization=False)
    repositories = {"someone/cascade": folder, "someone/shortened": folder, "someone/pickled": home / "pickled"}
    with serve_hub(repositories) as hub:
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run(
            [sys.executable, "-c", LOAD, str(folder)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **place},
        )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), [path for _, _, path in hub.requests]


def test_public_names():
    assert set(diffusers_pisdm.__all__) == {
        "DIM_SIZES",
        "DiMTransformer2DModel",
        "ModelMixin",
        "PISDM_EMOJI128",
        "PISDM_SIZES",
        "PISDMCascadePipeline",
        "PISDMCascadePipelineOutput",
        "PISDMTransformer2DModel",
        "__version__",
        "keep_freed_memory",
    }
    assert all(hasattr(diffusers_pisdm, name) for name in diffusers_pisdm.__all__)


def test_registration():
    """The private parts of diffusers that the package changes: what to look at when a new diffusers breaks loading."""
    assert LOADABLE_CLASSES["diffusers_pisdm"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    assert diffusers.PISDMCascadePipeline is diffusers_pisdm.PISDMCascadePipeline
    assert diffusers.DiMTransformer2DModel is diffusers_pisdm.DiMTransformer2DModel
    assert diffusers.PISDMTransformer2DModel is diffusers_pisdm.PISDMTransformer2DModel
    assert not hasattr(diffusers.pipelines, "diffusers_pisdm")  # it would be taken for diffusers' own module


def test_saved_pipeline_names_the_package(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "PISDMCascadePipeline"
    assert index["transformer"] == index["transformer_2"] == ["diffusers_pisdm", "PISDMTransformer2DModel"]
    assert index["transformer_3"] == [None, None]


def test_loads_from_a_folder(loaded):
    result, _ = loaded
    assert result["folder"] == LOADED
    assert result["model alone"] == "PISDMTransformer2DModel"


def test_loads_from_a_hub(loaded):
    result, paths = loaded
    assert result["hub"] == result["cache"] == LOADED
    assert result["shortened"] == 1
    assert "Could not find the necessary `safetensors` weights" in result["pickled"]
    assert any(path.startswith("/someone/cascade/resolve/") and "transformer_2" in path for path in paths)
    assert not any(path.startswith("/someone/shortened/resolve/") and "transformer_2" in path for path in paths)
    assert not any(path.endswith(".bin") for path in paths)


def test_importing_does_not_change_how_threads_wait(loaded):
    """Commands do, if need be; the package never."""
    assert loaded[0]["threads' waiting"] == os.environ.get("OMP_WAIT_POLICY")
