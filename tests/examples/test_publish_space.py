import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from publish_space import prepare_space


ROOT = Path(__file__).parents[2]


def test_a_space_installs_the_wheel_that_is_put_into_it(tmp_path, monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # needs no index
    prepare_space("someone/page", tmp_path)
    needed = Requirement((tmp_path / "requirements.txt").read_text().strip())
    assert (needed.name, needed.extras) == ("diffusers-pisdm", {"gradio"})
    place, name = needed.url.rsplit("/", 1)
    assert place.endswith("/spaces/someone/page/resolve/main") and (tmp_path / name).stat().st_size > 10e6
    assert {path.name for path in tmp_path.iterdir()} == {"app.py", "README.md", "requirements.txt", name}


def test_no_text_installs_the_package_from_an_index_that_lacks_it():
    folders = (ROOT / name for name in ("docs", "examples", "diffusers_pisdm"))
    tops = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*"))]
    files = [path for path in tops if path.suffix in (".md", ".py", ".txt")]
    wrong = re.compile(r"""pip install ["']?diffusers[-_]pisdm(?!\S* @ |\S*\.whl)""")
    assert len(files) > 100
    assert [str(path) for path in files if wrong.search(path.read_text(encoding="utf-8"))] == []
