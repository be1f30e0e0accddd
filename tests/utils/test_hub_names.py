import pytest
from huggingface_hub import constants

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.utils.hub_names import hub_or_cache, is_path
from tests.support.hub_server import connect, serve_hub


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
