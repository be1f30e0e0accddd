"""Adds to the site what stands elsewhere in the repository: the model card, and the map from paper to code."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    card = re.sub(r"\A---\n.*?\n---\n", "", _read("model_card.md"), flags=re.DOTALL)  # for the Hub
    card = re.sub(r"<!-- .*? -->\n*", "", card)
    contributing = _read("CONTRIBUTING.md")
    start = contributing.index("## From paper to code")
    end = contributing.find("\n## ", start + 1)
    section = contributing[start : end if end > 0 else None].replace("## ", "# ", 1)
    for name, text in (("model_card.md", card), ("paper_to_code.md", section)):
        text = text.replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")
