"""
Runs every Python block of README.md and of the documentation, page by page, as a reader would from the clone; where
they name a folder of `checkpoints`, with a smaller one of the same form.
"""

import re
from pathlib import Path

import pytest

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The first line's number and the code of each block that is marked as Python."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in BLOCK.finditer(text)]


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if python_blocks(page)]


def test_blocks_are_found_with_their_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\na = 1\nb = 2\n```\n\n```bash\nls\n```\n\n```python\nc = 3\n```\n")
    assert python_blocks(page) == [(4, "a = 1\nb = 2\n"), (13, "c = 3\n")]


def test_the_readme_has_code():
    assert ROOT / "README.md" in PAGES


@pytest.fixture(scope="module")
def small_checkpoints(tmp_path_factory) -> Path:
    """The published checkpoints' names, classes, stages and settings, with models that take no time."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for published in (ROOT / "checkpoints").iterdir():
        pipe = PISDMCascadePipeline.from_pretrained(published)
        small = {"num_layers": 2, "hidden_size": 16, "state_size": 4}
        stages = [PISDMTransformer2DModel.from_config(stage.config, **small) for stage in pipe.stages]
        for index, stage in enumerate(stages):
            pipe.register_modules(**{f"transformer_{index + 1}" if index else "transformer": stage})
        pipe.save_pretrained(folder / published.name)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, tmp_path, monkeypatch, small_checkpoints):
    # What a block writes lands in an empty folder that has checkpoints in it.
    (tmp_path / "checkpoints").symlink_to(small_checkpoints)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in python_blocks(page):
        # Blank lines in front make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    targets += re.findall(r"`((?:diffusers_pisdm|examples|tests|benchmarks)/[\w./]+)`", text)
    assert targets
    assert [target for target in targets if "NAME" not in target and not (ROOT / target).exists()] == []


def test_every_row_of_the_map_names_a_test_that_is_there():
    rows = re.findall(r"`(tests/[\w/]+\.py)`: `(\w+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(rows) > 10
    assert [row for row in rows if f"def {row[1]}(" not in (ROOT / row[0]).read_text(encoding="utf-8")] == []
