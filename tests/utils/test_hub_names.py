import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets.data_files import DataFilesDict
from datasets.load import configure_builder_class
from datasets.packaged_modules.parquet.parquet import Parquet, ParquetConfig
from huggingface_hub import constants

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.rows import DataError
from diffusers_pisdm.utils.hub_names import hub_or_cache, is_path
from tests.data.image_folders import write_parquet
from tests.pipelines.tiny_cascade import make_cascade
from tests.support.hub_server import connect, serve_hub


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["/a", "./a", "../a", "~/a", "a/b/c", "my images", "a\\b", "a/", ""])
def test_what_the_hub_cannot_have_is_a_path(name):
    assert is_path(name)
    with pytest.raises(FileNotFoundError, match="There is no folder"), hub_or_cache(name):
        pytest.fail("loaded")


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"a")
    with pytest.raises(FileNotFoundError, match=r"weights\.bin is a file: pass a folder"), hub_or_cache(file):
        pytest.fail("loaded")


@pytest.mark.parametrize("name", ["mnist", "owner/name"])
def test_other_names_may_be_on_the_hub(name):
    assert not is_path(name)


@pytest.fixture
def no_retries(monkeypatch):
    def sleep(seconds):
        pytest.fail("waits to ask again")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleep)


LOADERS = {
    "model": PISDMCascadePipeline.from_pretrained,
    "dataset": lambda name: load_image_data(name, "train"),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", ["nosuchfolder", "owner/name"])
def test_a_name_that_nobody_has_is_both_readings(kind, name, no_retries, monkeypatch, tmp_path):
    with serve_hub(tokens={}) as server:
        connect(monkeypatch, server, None, tmp_path)
        with pytest.raises(FileNotFoundError, match=f"no folder {name}, and no {kind} of this name on the Hub"):
            LOADERS[kind](name)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_hub_that_does_not_answer_is_asked_once(kind, no_retries, monkeypatch, tmp_path):
    with serve_hub(tokens={}) as server:
        connect(monkeypatch, server, None, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no {kind} of this name in the cache; the Hub cannot be reached"):
        LOADERS[kind]("owner/name")
    assert not constants.HF_HUB_OFFLINE


LOAD_TWICE = """
import os, sys
from pathlib import Path
from tests.support.hub_server import serve_hub

with serve_hub({"owner/name": Path(sys.argv[1])}) as server:
    os.environ["HF_ENDPOINT"] = server.url  # read at import
    import torch
    from huggingface_hub import constants
    from diffusers_pisdm import PISDMCascadePipeline
    from diffusers_pisdm.commands.drawing import _load_pipeline
    from diffusers_pisdm.commands.generate import list_classes

    def asked(load):
        server.requests.clear()
        load()
        return sum(path == "/api/models/owner/name" for status, method, path in server.requests)

    print(asked(lambda: PISDMCascadePipeline.from_pretrained("owner/name")))
    print(asked(lambda: _load_pipeline("owner/name", None, torch.float32)))

class Watched(type(constants)):
    def __setattr__(self, name, value):
        raise AssertionError(f"{name} is set for the whole process")

constants.__class__ = Watched
list_classes("owner/name", "")
for load in (PISDMCascadePipeline.from_pretrained, lambda name: _load_pipeline(name, None, torch.float32)):
    print(type(load("owner/name")).__name__)
"""


def test_the_hub_is_asked_once_and_without_it_the_cache_is_read(tmp_path):
    make_cascade(num_stages=2, id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path / "cascade")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    process = subprocess.run(
        [sys.executable, "-c", LOAD_TWICE, str(tmp_path / "cascade")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    once, with_class, *loaded = process.stdout.split("\n")
    assert once == with_class
    assert "PISDMCascadePipeline\nPISDMCascadePipeline" in "\n".join(loaded)
    assert "OFFLINE" not in process.stderr and "connect" not in process.stderr


def fill_cache(folder, cache):
    """Leaves in the cache what loading `owner/name` from the Hub does."""
    files = DataFilesDict.from_patterns({"train": ["train.parquet"]}, str(folder))
    builder_class = configure_builder_class(Parquet, [ParquetConfig("default", data_files=files)], "default", "name")
    builder_class(str(cache), dataset_name="name", hash="0123").download_and_prepare()
    (cache / "name").rename(cache / "owner___name")


@pytest.mark.parametrize("streaming", [False, True])
def test_without_the_hub_a_cached_data_set_is_read(streaming, no_retries, monkeypatch, tmp_path, real_image_files):
    folder = write_parquet(real_image_files[:4], tmp_path / "parquet", [0, 1, 0, 1])
    with serve_hub(tokens={}) as server:
        connect(monkeypatch, server, None, tmp_path)
    fill_cache(folder, tmp_path / "cache")
    columns = {"image_column": "picture", "label_column": "kind", "class_names": ["a", "b"]}
    data = load_image_data("owner/name", "train", streaming, cache_dir=tmp_path / "cache", **columns)
    assert [row["kind"] for row in data.dataset] == [0, 1, 0, 1]
    with pytest.raises(FileNotFoundError, match="no dataset of this name in the cache"):
        load_image_data("owner/name", "train", cache_dir=tmp_path / "cache", config_name="other")
    with pytest.raises(DataError, match="split 'test'"):
        load_image_data("owner/name", "test", cache_dir=tmp_path / "cache")
