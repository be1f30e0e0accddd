import re
from importlib.metadata import distributions
from pathlib import Path
from urllib.request import urlopen

import pytest
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from publish_space import main

from tests.support.hub_server import connect, serve_hub


ROOT = Path(__file__).parents[2]
TOKENS = {"token": "someone", "read token": "someone"}


# Importing pip, or only looking for it, keeps setuptools (which torch.compile needs) from being imported later.
@pytest.mark.skipif(not [*distributions(name="pip")], reason="needs pip")
def test_a_space_is_published_with_the_wheel_that_it_installs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # needs no index
    with serve_hub(tokens=TOKENS) as server:
        connect(monkeypatch, server, "token", tmp_path)
        main(["someone/page"])
        files = server.hub.files("spaces/someone/page")
        needed = Requirement(files["requirements.txt"].decode().strip())
        assert (needed.name, needed.extras) == ("diffusers-pisdm", {"gradio"})
        place, name = needed.url.rsplit("/", 1)
        assert place == f"{server.url}/spaces/someone/page/resolve/main"
        with urlopen(needed.url) as response:  # as pip will, without a login
            assert len(response.read()) == len(files[name]) > 10e6
    assert set(files) == {".gitattributes", "app.py", "README.md", "requirements.txt", name}
    assert ModelCard(files["README.md"].decode()).data.sdk == "gradio"
    assert "/spaces/someone/page: it builds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "token", "told"),
    [
        ("someone/page", None, r"not logged in.*`hf auth login`"),
        ("someone/page", "read token", "may only read"),
        ("someone/a b", "token", "Repo id must .*'someone/a b'"),
        ("page", "token", "`owner/name` but is 'page'"),
    ],
)
def test_what_the_hub_would_refuse_is_told_before_anything_is_built(name, token, told, tmp_path, monkeypatch):
    monkeypatch.setattr("publish_space.prepare_space", lambda *_: pytest.fail("built"))
    with serve_hub(tokens=TOKENS) as server:
        connect(monkeypatch, server, token, tmp_path)
        with pytest.raises(SystemExit, match=f"^error: .*{told}"):
            main([name])


def test_a_hub_that_cannot_be_reached_or_refuses_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("publish_space.prepare_space", lambda _, folder: (folder / "app.py").write_text("1"))
    with serve_hub(tokens=TOKENS) as server:
        connect(monkeypatch, server, "token", tmp_path)
        with pytest.raises(SystemExit, match=r"^error: The Hub does not let you write to another/page .*namespace"):
            main(["another/page"])
    with pytest.raises(SystemExit, match=r"^error: The Hub cannot be reached .*connection"):
        main(["someone/page"])


def test_no_text_installs_the_package_from_an_index_that_lacks_it():
    folders = (ROOT / name for name in ("docs", "examples", "diffusers_pisdm"))
    tops = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*"))]
    files = [path for path in tops if path.suffix in (".md", ".py", ".txt")]
    wrong = re.compile(r"""pip install ["']?diffusers[-_]pisdm(?!\S* @ |\S*\.whl)""")
    assert len(files) > 100
    assert [str(path) for path in files if wrong.search(path.read_text(encoding="utf-8"))] == []
