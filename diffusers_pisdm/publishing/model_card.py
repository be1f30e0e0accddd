"""The model card of a training run: a Markdown file with marked sections that are filled from the run's folder."""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import EvalResult, ModelCard

from ..pipelines.lora_fit import read_classes, split_by_component
from ..pipelines.pipeline_pisdm_cascade import PISDMCascadePipeline
from ..utils.hub_names import holds_lora, is_path
from ..utils.messages import count_of, list_first, one_line
from ..utils.metrics_file import read_metrics
from ..utils.shipped_files import CHECKPOINT, install_command
from .licenses import check_license


SKELETON = Path(__file__).with_name("model_card.md")
DIM_CARD = Path(__file__).with_name("dim_model_card.md")  # `pisdm convert-dim` fills it
PIPELINE_TAG = "unconditional-image-generation"  # the Hub has no task for class-conditional generation
LOCAL_IMAGES = "imagefolder"  # the Hub's type for results on images that are no data set there
TAGS = ("diffusers", "diffusers_pisdm", "class-conditional-image-generation", "mamba")

# Entries of `training_config.json` other than arguments and versions, with their titles in the card.
FACTS = {"images": "training images", "hardware": "hardware", "num_processes": "processes"}
PRIVATE_WORD = "token|passw(?:or)?d|secret|credentials?|(?:api|auth|access)[_-]?key"
PRIVATE_NAME = re.compile(f"^hub_|^push_to_hub|(?:{PRIVATE_WORD})$|password|secret|credential|api_?key", re.IGNORECASE)
# A value with a private name; a URL, with its user, query and fragment; an account on a machine, and the path there; a
# path, absolute or from a home or parent folder; a known kind of token.
NAMED = (
    rf"(?P<name>--[\w-]*(?:{PRIVATE_WORD})[=\s]+|\b[\w-]*(?:{PRIVATE_WORD})\s*[=:]\s*)(?!\(removed)[^\s'\",;|<>)\]}}]+"
)
URL = r"(?P<scheme>[a-z][a-z0-9+.-]{0,30}://)(?:[^\s/@]*@)?(?P<place>[^\s?#'\",)\]}]*)(?:[?#][^\s'\",)\]}]*)?"
REST = r"[^\s'\",;|<>)\]}]+"
ACCOUNT = rf"(?<![\w/])[\w.+-]+@(?:[\w-]+(?:\.[\w-]+)+(?::(?P<there>{REST}))?|[\w-]+:(?P<near>{REST}))"
PATH = r"(?<![\w.\\/-])(?:[a-z]:(?=[\\/])|~|(?:\.[\\/])*\.\.(?=[\\/]))?[\\/][^\s'\",:;|<>)\]}]+"
TOKEN = (
    r"\b(?:(?:hf|ghp|gho|ghs|github_pat|glpat|xox[abp]|AKIA|AIza|wandb_v\d)[-_]?[\w-]{12,}|sk[-_](?=[\w-]*\d)[\w-]{12,}"
    r"|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]+)?)"
)
PRIVATE_TEXT = re.compile(
    f"{NAMED}|(?P<url>{URL})|(?P<account>{ACCOUNT})|(?P<path>{PATH})|(?P<token>{TOKEN})", re.IGNORECASE
)
WHOLE_PATH = re.compile(r"(?:[a-z]:)?[\\/]|~|(?:\.[\\/])*\.\.[\\/]", re.IGNORECASE)
LONGEST_CELL = 200
LONGEST_SEARCHED = 10 * LONGEST_CELL  # what is private may be long, and gives way to less
RUN_FILES = ("training_config.json", "metrics.jsonl", "stage_*/metrics.jsonl", "evaluation*.json")  # to be read
# In place of what our template says of a cascade, which the base of adapters need not be.
LORA_INTRODUCTION = """# LoRA adapters for {base}

They adapt {base}, which draws images of a given class, and were trained with, and load with, the `diffusers_pisdm`
package. {classes}

"""
MOST_CLASSES = 100
SAMPLE_SHEETS = re.compile(r"step-\d+\.png")
PICTURE = re.compile(r'!\[[^\]]*\]\(([^)\s]+)|<img\b[^>]*?\bsrc="([^"]+)"')


def make_model_card(
    run_dir: str | Path,
    repo_id: str,
    model_card: str | Path | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """
    Fills a model card from a run's folder. A section is delimited by `<!-- NAME:begin -->` and `<!-- NAME:end -->`,
    where `NAME` is one of:

    - `samples`: the newest of `samples/step-*.png`, or of each stage's `samples/stage_*/step-*.png`;
    - `usage`: how to load the repository;
    - `metrics`: `evaluation*.json` (reports of `pisdm evaluate`, or metric names and values), the last losses of
      `metrics.jsonl` or `stage_*/metrics.jsonl`, `loss_curves.png`;
    - `training`: `training_config.json`, and steps and speed from the metrics.

    A section without markers is appended; one without files is left unchanged. The evaluations' scores also become
    results in the metadata, for the card's data set or else the evaluation's reference. Arguments about the Hub and
    secrets are left out, paths are shortened to their last component, and URLs to what tells where.

    Args:
        run_dir (`str` or `Path`): The output folder of the training script.
        repo_id (`str`): The repository, as `owner/name`.
        model_card (`str` or `Path`, *optional*): A Markdown file with YAML front matter; by default, our template.
        license (`str`, *optional*):
            The Hub's identifier for the weights' licence, e.g. `"apache-2.0"`; defaults to the card's own.
        datasets (`list[str]`, *optional*):
            Data sets on the Hub that the cascade was trained on; defaults to the card's own.
        base_model (`str`, *optional*):
            The cascade on the Hub that this one was fine-tuned from, or that LoRA adapters adapt; defaults to the
            card's own, and for adapters to the run's unless that is a local folder.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card; `str(card)` is the content of README.md.

    Raises:
        ValueError: The Hub knows no such licence, there is no card at `model_card`, its markers are not paired, LoRA
            adapters have no public base, or a file of the run is not JSON or not an evaluation.
    """
    run_dir = Path(run_dir)
    check_license(license)
    check_links(run_dir, [file for pattern in RUN_FILES for file in run_dir.glob(pattern)])
    try:
        card = ModelCard.load(Path(model_card or SKELETON))
    except yaml.YAMLError as error:
        raise ValueError(f"The header of {model_card} is not valid YAML: {one_line(error)}. Fix it.") from error
    data = card.data
    data.license = license or data.license
    data.datasets = datasets or data.datasets
    data.library_name = data.library_name or "diffusers"
    data.pipeline_tag = data.pipeline_tag or PIPELINE_TAG
    data.tags = [*(data.tags or []), *(tag for tag in TAGS if tag not in (data.tags or []))]

    metrics = _read_metrics(run_dir)
    results = _read_results(run_dir)
    named = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
    eval_results = [
        # The Hub requires a data set for each result.
        EvalResult(
            PIPELINE_TAG,
            named[0] if named else LOCAL_IMAGES,
            named[0] if named else reference,
            metric,
            value,
            metric_name=name,
        )
        for metric, name, value, reference in results
        # Whole numbers are counts and seeds.
        if isinstance(value, float) and math.isfinite(value) and (named or reference)
    ]
    if eval_results:
        data.model_name = data.model_name or repo_id.split("/")[-1]
        data.eval_results = eval_results
    data.base_model, adapted = base_model or data.base_model, None
    if holds_lora(run_dir):
        adapted = public_base(data.base_model or _pretrained(run_dir))
        if "lora" not in data.tags:
            data.tags.append("lora")
        if model_card is None:
            sections = card.text[card.text.index("<!-- samples:begin") :]
            card.text = LORA_INTRODUCTION.format(base=adapted, classes=_adapter_classes(run_dir)) + sections

    sections = {
        "samples": _samples(run_dir),
        "usage": _usage(repo_id, adapted),
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
        hidden = any(part.startswith(".") for part in Path(link).parts)
        found = [p for p, folder in zip(paths, folders) if p.is_file() and p.is_relative_to(folder) and not hidden]
        if not found:
            raise ValueError(
                f"The model card shows the picture `{link}`, which is not in {' or '.join(map(str, folders))}. Put it"
                " there or in a subfolder, or remove it from the card."
            )
        pictures[link] = found[0]
    return pictures


def add_rights(card: ModelCard) -> None:
    """Says in a card that no licence is stated for DiM's weights, and whose paper to cite."""
    name = "rights"
    text = DIM_CARD.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->")[2]
    card.text = _fill(card.text, name, text.partition(f"<!-- {name}:end -->")[0].format().strip())


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raises a ValueError if one of a folder's files is a link to somewhere else."""
    outside = [str(path) for path in files if not path.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ValueError(
            f"{folder} holds links to files outside of it: {', '.join(outside)}. Copy the files there, so that nothing"
            " is published by mistake."
        )


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
    pictures = []
    for folder in [run_dir / "samples", *sorted(run_dir.glob("samples/stage_*"))]:
        sheets = [picture for picture in folder.glob("step-*.png") if SAMPLE_SHEETS.fullmatch(picture.name)]
        if sheets:
            title = "the last stage" if folder.name == "samples" else _plain(folder.name.replace("_", " "))
            newest = max(sheets).relative_to(run_dir).as_posix()  # step numbers are zero-padded
            pictures.append(f"![Samples of {title}]({newest})")
    return "\n\n".join(["## Samples", *pictures]) if pictures else None


def _usage(repo_id: str, base_model: str | None) -> str:
    # `base_model`: what LoRA adapters adapt; None for a whole cascade.
    names, model = "PISDMCascadePipeline", f'"{base_model or repo_id}"'
    if base_model == CHECKPOINT.name:  # everybody has it
        names, model = f"PISDM_EMOJI128, {names}", "PISDM_EMOJI128"
    load = f"pipe = PISDMCascadePipeline.from_pretrained({model})"
    install = install_command()
    other = f"""
Without the import, diffusers runs this repository's `pipeline.py`, once you say that you trust it:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
```"""
    if base_model is not None:
        load += f'\npipe.load_lora_weights("{repo_id}")'
        install, other = install_command("train"), ""
    return f"""## Usage

```bash
{install}
```

```python
from diffusers_pisdm import {names}

{load}
images = pipe(class_labels=[0]).images  # class ids, or names from pipe.config.id2label
```
{other}""".rstrip()


def public_base(name: object) -> str:
    """The cascade that LoRA adapters adapt, by the name under which others load it; ValueError if it has none."""
    if isinstance(name, list):  # as the Hub also takes it
        name = name[0] if name else None
    if isinstance(name, str) and (name == CHECKPOINT.name or Path(name).resolve() == CHECKPOINT.resolve()):
        return CHECKPOINT.name
    if not isinstance(name, str) or is_path(name) or Path(name).exists():
        raise ValueError(
            "LoRA adapters need the cascade that they adapt, and the one they were trained from is a folder of yours,"
            " or unknown. Publish it, too, and pass its repository as `base_model`, or to training as"
            " `pretrained_model_name_or_path`."
        )
    return name


def _adapter_classes(run_dir: Path) -> str:
    weights, metadata = PISDMCascadePipeline.lora_state_dict(run_dir, return_lora_metadata=True)
    classes = read_classes(split_by_component(weights), split_by_component(metadata or {}))
    if classes is None:
        return "They draw its classes."
    num_classes, names = classes
    if not names:
        return f"They have {count_of(num_classes, 'class')} of their own."
    return f"Their classes: {list_first(map(_plain, names.values()), MOST_CLASSES)}."


def _pretrained(run_dir: Path) -> str | None:
    # The cascade that a run's LoRA adapters adapt, as its arguments name it.
    path = run_dir / "training_config.json"
    arguments = _read_json(path).get("arguments", {}) if path.exists() else {}
    return arguments.get("pretrained_model_name_or_path") if isinstance(arguments, dict) else None


def _metrics(run_dir: Path, metrics: dict[str, list[dict]], results: list[tuple[str, str, Any, str]]) -> str | None:
    parts = []
    if results:
        parts.append(_table(["metric", "value"], [(name, value) for _, name, value, _ in results]))
    if notes := _read_notes(run_dir):
        parts.append("\n".join(f"- {note}" for note in notes))
    losses = []
    for stage, rows in metrics.items():
        last = {name: (row["step"], value) for row in rows for name, value in row.items()}
        names = [name for name in sorted(last) if name.startswith(("train/", "validation/"))]
        losses += [(f"{stage}{name}", *last[name]) for name in names]
    if losses:
        parts.append(_table(["loss", "step", "value"], losses))
    if (run_dir / "loss_curves.png").exists():
        parts.append("![Losses over training steps](loss_curves.png)")
    return "\n\n".join(["## Metrics", *parts]) if parts else None


def _training(run_dir: Path, metrics: dict[str, list[dict]]) -> str | None:
    path = run_dir / "training_config.json"
    if not path.exists():
        return None
    config = _read_json(path)
    facts = [(title, config[name]) for name, title in FACTS.items() if name in config]
    for stage, rows in metrics.items():
        facts.append((f"{stage}steps", rows[-1]["step"]))
        speeds = [row.get("images_per_second") for row in rows]
        speeds = [speed for speed in speeds if isinstance(speed, (int, float)) and math.isfinite(speed)]
        if speeds:
            facts.append((f"{stage}images per second", statistics.median(speeds)))
    try:
        for change in config.get("changes", []):
            old = {name: values[0] for name, values in change.items() if name != "step"}
            until = f"until step {change['step']:,}"
            facts += [(_Markdown(f"{_code(name)} {until}"), value) for name, value in _public(old).items()]
        facts += config.get("versions", {}).items()
        arguments = _public({name: value for name, value in config.get("arguments", {}).items() if value is not None})
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not as `pisdm train` wrote it: {error!r}. Fix or remove it.") from error
    return f"""## Training

{_table(["", ""], facts)}

<details><summary>Arguments of the training script</summary>

{_table(["argument", "value"], [(_code(name), value) for name, value in arguments.items()])}

</details>"""


class _Markdown(str):
    """A cell that is escaped already."""


def _code(name: str) -> _Markdown:
    return _Markdown("`" + _shorten(_public(name)).replace("`", "'").replace("|", "\\|") + "`")


def _public(value: Any) -> Any:
    """A value without what tells of the author's machine and accounts."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items() if not PRIVATE_NAME.search(name)}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    if WHOLE_PATH.match(value):  # which may hold spaces
        value = _last_part(value)
    # The search takes the square of the length, and no more than a cell is shown.
    if len(value) > LONGEST_SEARCHED:
        value = value[:LONGEST_SEARCHED] + "…"
    return PRIVATE_TEXT.sub(_without_place, value)


def _without_place(match: re.Match) -> str:
    if match["name"]:
        return match["name"] + "(removed)"
    if match["token"]:
        return "(removed)"
    if match["account"]:
        path = match["there"] or match["near"]
        return _last_part(path) if path else "(removed)"
    if match["url"] and match["scheme"].lower() != "file://":
        return match["scheme"] + match["place"]
    return _last_part(match["place"] if match["url"] else match[0])


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]", path) if part not in ("", ".", "..")]
    # A home folder has its owner's name.
    is_home = not parts or (len(parts) < 3 and parts[0] in ("home", "Users")) or parts[-1].startswith("~")
    return "~" if is_home or (len(parts) < 4 and parts[-2:-1] == ["Users"]) else parts[-1]


def _table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, _Markdown) else _plain(value)


def _plain(value: Any) -> str:
    """A value as it is, on one line of Markdown, whatever Markdown or HTML it holds."""
    text = _shorten(str(_public(value)))
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", text), quote=False)


def _shorten(text: str) -> str:
    text = one_line(" ".join(text.split()))
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def _read_results(run_dir: Path) -> list[tuple[str, str, Any, str]]:
    # Metric, its name in the card (with the file's name if there are several), value, and what it was compared with.
    paths = sorted(run_dir.glob("evaluation*.json"))
    results = []
    for path in paths:
        report = _public(_read_json(path))
        if "scores" in report:  # of `pisdm evaluate`
            try:
                scores = [
                    (_metric_type(key, score["name"]), score["name"], score["value"])
                    for key, score in report["scores"].items()
                ]
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is not a report of `pisdm evaluate`: {error!r}. Fix or remove it."
                ) from error
            counts = ("num_samples", "num_reference", "num_reference_features", "extractor")
            scores += [(name, name, report.get(name)) for name in counts]
        else:
            scores = [(name, name, value) for name, value in report.items()]
        several = f" ({path.stem})" if len(paths) > 1 else ""
        reference = report.get("reference")
        reference = _shorten(reference) if isinstance(reference, str) else ""
        results += [
            (_shorten(_public(metric)), _shorten(_public(str(name))) + several, value, reference)
            for metric, name, value in scores
            if isinstance(value, (int, float, str))
        ]
    return results


def _metric_type(key: str, name: str) -> str:
    """The metric's identifier on the Hub: only with Inception v3, whose score is "IS", is it the inception score."""
    return "classifier_score" if key == "inception_score" and not name.startswith("IS") else key


def _read_notes(run_dir: Path) -> list[str]:
    # What has to be known to read the scores, as `pisdm evaluate` says it.
    reports = [_read_json(path) for path in sorted(run_dir.glob("evaluation*.json"))]
    notes = [report["notes"] for report in reports if isinstance(report.get("notes"), list)]
    return list(dict.fromkeys(_plain(note) for found in notes for note in found))


def _read_metrics(run_dir: Path) -> dict[str, list[dict]]:
    # Rows by what to write before their names: nothing, or the stage if each was trained alone.
    files = {"": run_dir / "metrics.jsonl"}
    files |= {
        f"{file.parent.name.replace('_', ' ')}: ": file for file in sorted(run_dir.glob("stage_*/metrics.jsonl"))
    }
    rows = {stage: read_metrics(file) for stage, file in files.items()}
    return {stage: found for stage, found in rows.items() if found}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}. Fix or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object, but a {type(content).__name__}. Fix or remove it.")
    return content
