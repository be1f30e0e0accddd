"""The model card of a training run: a Markdown file with marked sections that are filled from the run's folder."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import EvalResult, ModelCard


SKELETON = Path(__file__).with_name("model_card.md")
PIPELINE_TAG = "unconditional-image-generation"  # the Hub has no task for class-conditional generation
TAGS = ("diffusers", "diffusers_pisdm", "class-conditional-image-generation", "mamba")

# Entries of `training_config.json` other than arguments and versions, with their titles in the card.
FACTS = {"images": "training images", "hardware": "hardware", "num_processes": "processes"}
PRIVATE_ARGUMENT = re.compile("^hub_|^push_to_hub|token$")
PICTURE = re.compile(r'!\[[^\]]*\]\(([^)\s]+)|<img\b[^>]*?\bsrc="([^"]+)"')


def make_model_card(
    run_dir: str | Path,
    repo_id: str,
    model_card: str | Path | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
) -> ModelCard:
    """
    Fills a model card from a run's folder. A section is delimited by `<!-- NAME:begin -->` and `<!-- NAME:end -->`,
    where `NAME` is one of:

    - `samples`: the newest of `samples/step-*.png`;
    - `usage`: how to load the repository;
    - `metrics`: `evaluation*.json` (metric names and values), the last losses of `metrics.jsonl`, `loss_curves.png`;
    - `training`: `training_config.json`, and steps and speed from `metrics.jsonl`.

    A section without markers is appended; one without files is left unchanged. If the card names a data set, the
    evaluations' fractional numbers also become results in the metadata. Arguments about the Hub and tokens are left
    out, and absolute paths are shortened to their last component.

    Args:
        run_dir (`str` or `Path`): The output folder of the training script.
        repo_id (`str`): The repository, as `owner/name`.
        model_card (`str` or `Path`, *optional*): A Markdown file with YAML front matter; by default, our template.
        license (`str`, *optional*):
            The Hub's identifier for the weights' licence, e.g. `"apache-2.0"`; defaults to the card's own.
        datasets (`list[str]`, *optional*):
            Data sets on the Hub that the cascade was trained on; defaults to the card's own.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card; `str(card)` is the content of README.md.

    Raises:
        ValueError: There is no card at `model_card`, its markers are not paired, or a file of the run is not JSON.
    """
    run_dir = Path(run_dir)
    card = ModelCard.load(Path(model_card or SKELETON))
    data = card.data
    data.license = license or data.license
    data.datasets = datasets or data.datasets
    data.library_name = data.library_name or "diffusers"
    data.pipeline_tag = data.pipeline_tag or PIPELINE_TAG
    data.tags = [*(data.tags or []), *(tag for tag in TAGS if tag not in (data.tags or []))]

    metrics = _read_metrics(run_dir / "metrics.jsonl")
    results = _read_results(run_dir)
    if results and data.datasets:  # the Hub requires a data set for each result
        dataset = data.datasets if isinstance(data.datasets, str) else data.datasets[0]
        data.model_name = data.model_name or repo_id.split("/")[-1]
        data.eval_results = [
            EvalResult(PIPELINE_TAG, dataset, dataset, metric, value, metric_name=name)
            for metric, name, value in results
            if isinstance(value, float)  # whole numbers are counts and seeds
        ]

    sections = {
        "samples": _samples(run_dir),
        "usage": _usage(repo_id),
        "metrics": _metrics(run_dir, metrics, results),
        "training": _training(run_dir, metrics),
    }
    for name, body in sections.items():
        if body:
            card.text = _fill(card.text, name, body)
    return card


def find_pictures(card: ModelCard, folders: Iterable[str | Path]) -> dict[str, Path]:
    """
    The pictures that a card shows through relative links.

    Args:
        card ([`~huggingface_hub.ModelCard`]): The card.
        folders (`Iterable[str | Path]`): The folders to search, in order.

    Returns:
        `dict[str, Path]`: Files by link.

    Raises:
        ValueError: A picture is not in any of the folders.
    """
    pictures = {}
    folders = [Path(folder).resolve() for folder in folders]
    for match in PICTURE.finditer(card.text):
        link = unquote(match[1] or match[2]).removeprefix("./")
        if re.match("[a-z]+:", link):  # https:, data:
            continue
        paths = [(folder / link).resolve() for folder in folders]
        found = [p for p, folder in zip(paths, folders) if p.is_file() and p.is_relative_to(folder)]
        if not found:
            raise ValueError(
                f"The model card shows the picture `{link}`, which is not in {' or '.join(map(str, folders))}. Put it"
                " there or in a subfolder, or remove it from the card."
            )
        pictures[link] = found[0]
    return pictures


def _fill(text: str, name: str, body: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    section = f"{begin}\n\n{body}\n\n{end}"
    if begin not in text and end not in text:
        return f"{text.rstrip()}\n\n{section}\n"
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(
            f"The model card has {text.count(begin)} times `{begin}` and {text.count(end)} times `{end}`; it needs"
            " each once, in this order, or neither. Fix the card."
        )
    return text[: text.index(begin)] + section + text[text.index(end) + len(end) :]


def _samples(run_dir: Path) -> str | None:
    pictures = sorted(run_dir.glob("samples/step-*.png"))  # step numbers are zero-padded
    if not pictures:
        return None
    return f"## Samples\n\n![Samples of the last stage](samples/{pictures[-1].name})"


def _usage(repo_id: str) -> str:
    return f"""## Usage

```python
from diffusers_pisdm import PISDMCascadePipeline

pipe = PISDMCascadePipeline.from_pretrained("{repo_id}")
images = pipe(class_labels=[0]).images  # class ids, or names from pipe.config.id2label
```"""


def _metrics(run_dir: Path, metrics: list[dict], results: list[tuple[str, str, Any]]) -> str | None:
    parts = []
    if results:
        parts.append(_table(["metric", "value"], [(name, value) for _, name, value in results]))
    last = {name: (row["step"], value) for row in metrics for name, value in row.items()}
    losses = [(name, *last[name]) for name in sorted(last) if name.startswith(("train/", "validation/"))]
    if losses:
        parts.append(_table(["loss", "step", "value"], losses))
    if (run_dir / "loss_curves.png").exists():
        parts.append("![Losses over training steps](loss_curves.png)")
    return "\n\n".join(["## Metrics", *parts]) if parts else None


def _training(run_dir: Path, metrics: list[dict]) -> str | None:
    path = run_dir / "training_config.json"
    if not path.exists():
        return None
    config = _read_json(path.read_text(encoding="utf-8"), path)
    facts = [(title, config[name]) for name, title in FACTS.items() if name in config]
    if metrics:
        facts.append(("steps", metrics[-1]["step"]))
    speeds = [row["images_per_second"] for row in metrics if "images_per_second" in row]
    if speeds:
        facts.append(("images per second", statistics.median(speeds)))
    for change in config.get("changes", []):
        step = change.pop("step")
        facts += [(f"`{name}` until step {step:,}", _public(old)) for name, (old, _) in change.items()]
    facts += config.get("versions", {}).items()
    arguments = [
        (f"`{name}`", _public(value))
        for name, value in config.get("arguments", {}).items()
        if value is not None and not PRIVATE_ARGUMENT.search(name)
    ]
    return f"""## Training

{_table(["", ""], facts)}

<details><summary>Arguments of the training script</summary>

{_table(["argument", "value"], arguments)}

</details>"""


def _public(value: Any) -> str:
    # An absolute path reveals the machine; its last component is all that describes the run.
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).replace("|", "\\|").split())


def _read_results(run_dir: Path) -> list[tuple[str, str, Any]]:
    # Metric, its name in the card (with the file's name if there are several), and value.
    paths = sorted(run_dir.glob("evaluation*.json"))
    return [
        (metric, metric if len(paths) == 1 else f"{metric} ({path.stem})", value)
        for path in paths
        for metric, value in _read_json(path.read_text(encoding="utf-8"), path).items()
    ]


def _read_metrics(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [_read_json(line, path) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_json(text: str, path: Path) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Fix or remove it.") from error
