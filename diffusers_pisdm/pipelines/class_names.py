"""Classes of a pipeline by id and by name, in all the forms that users give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch

from ..utils.names import did_you_mean, show_name


# Sequences may be nested, as in DiTPipeline; a mapping is a mix of classes, by their shares.
ClassLabels = int | str | Mapping[int | str, float] | Sequence | np.ndarray | torch.Tensor

T = TypeVar("T")
MOST_FAULTS = 5  # labels that a message tells of
MAX_WEIGHT_ERROR = 1e-3  # of the sum of a mix's weights: 0.333 three times will do


def list_labels(labels: ClassLabels) -> list[Any]:
    """The labels of nested sequences, arrays and tensors; raises a ValueError if there are none."""
    flat = list(_flatten(labels))
    if not flat:
        raise ValueError("`class_labels` is empty. Pass at least one class id or name.")
    return flat


def _flatten(labels: ClassLabels) -> Iterator[Any]:
    if isinstance(labels, (torch.Tensor, np.ndarray)):
        labels = labels.tolist()
    if isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)):
        for label in labels:
            yield from _flatten(label)
    else:
        yield labels


def for_each_label(
    convert: Callable[..., T], labels: list[Any], id2label: dict[int, str] | None, num_classes: int
) -> list[T]:
    """Converts labels; raises one ValueError for all wrong ones, or a TypeError for the first that is no label."""
    converted, faults = [], {}
    for label in labels:
        try:
            converted.append(convert(label, id2label, num_classes))
        except ValueError as error:
            faults[str(error)] = None
    if faults:
        more = f" There are {len(faults) - MOST_FAULTS:,} more like this." if len(faults) > MOST_FAULTS else ""
        raise ValueError(" ".join([*faults][:MOST_FAULTS]) + more)
    return converted


def get_class_mix(
    label: int | str | Mapping[int | str, float], id2label: dict[int, str] | None, num_classes: int
) -> dict[int, float]:
    """
    The shares of a label's classes, by id; of a single class, 1. Raises a TypeError or ValueError if there is no such
    class, or shares do not sum to 1.
    """
    if not isinstance(label, Mapping):
        return {get_class_id(label, id2label, num_classes): 1.0}
    mix: dict[int, float] = {}
    for name, weight in label.items():
        if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 <= weight <= 1:  # false for NaN, too
            raise ValueError(f"`class_labels` gives {name!r} the weight {weight!r}, which has to be in [0, 1].")
        class_id = get_class_id(name, id2label, num_classes)
        mix[class_id] = mix.get(class_id, 0.0) + float(weight)  # a class may stand there by id and by name
    total = sum(mix.values())
    # Scaling them would hide what was forgotten or mistyped.
    if abs(total - 1) > MAX_WEIGHT_ERROR:
        raise ValueError(
            f"`class_labels` has the mix {label!r:.200}, whose weights sum to {total:g}. Pass weights that sum to 1."
        )
    return mix


def stack_mixes(
    mixes: list[dict[int, float]], num_images_per_prompt: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Returns the class ids of all images, `(B,)`, and no weights, if each label is a single class; else ids and weights
    `(B, K)`, with weights of 0 where a label has fewer classes.
    """
    most = max(map(len, mixes))
    ids = torch.tensor([[*mix, *[next(iter(mix))] * (most - len(mix))] for mix in mixes], device=device)  # (N, K)
    ids = ids.repeat_interleave(num_images_per_prompt, dim=0)  # (B, K)
    if most == 1:
        return ids[:, 0], None
    weights = torch.tensor([[*mix.values(), *[0.0] * (most - len(mix))] for mix in mixes], device=device)
    return ids, weights.repeat_interleave(num_images_per_prompt, dim=0)


def ids_by_name(id2label: dict[int, str] | None) -> dict[str, list[int]]:
    """The ids of the classes with each name, in full or one of its comma-separated synonyms."""
    ids: dict[str, list[int]] = {}
    for class_id, label in (id2label or {}).items():
        for name in {label, *(synonym.strip() for synonym in label.split(","))}:
            ids.setdefault(name, []).append(class_id)
    return ids


def get_class_id(
    label: int | str, id2label: dict[int, str] | None, num_classes: int, listed_by: str = "Its `config.id2label`"
) -> int:
    """
    The id of a class given by id or name; raises a TypeError or ValueError if there is no such class, which says what
    lists them where no name is near.
    """
    if isinstance(label, bool) or not isinstance(label, (Integral, str)):
        raise TypeError(
            f"`class_labels` has to hold class ids (`int`) or names (`str`) but has {label!r}, a {type(label)}."
        )
    if isinstance(label, str):
        if not id2label:
            raise ValueError(  # the same for each name, so that it is told once
                f"Cannot look up class names: this pipeline has none. Pass class ids from 0 to {num_classes - 1}."
            )
        label = _find_class(label, id2label, listed_by)
    if not 0 <= label < num_classes:
        raise ValueError(f"`class_labels` contains {label}, but this pipeline's classes are 0 to {num_classes - 1}.")
    return int(label)


def _find_class(name: str, id2label: dict[int, str], listed_by: str) -> int:
    known = ids_by_name(id2label)
    if name not in known:
        raise ValueError(
            f"`class_labels` contains '{show_name(name)}', which is not a class of this pipeline."
            f" {did_you_mean(name, known) or f'{listed_by} lists them.'}"
        )
    if len(known[name]) > 1:
        raise ValueError(
            f"`class_labels` contains '{show_name(name)}', the name of several classes: {known[name]}. Pass one of"
            " these ids."
        )
    return known[name][0]


def check_id2label(id2label: dict | Sequence | None, num_classes: int) -> dict[int, str] | None:
    """
    Returns class names by id, from a dictionary (whose ids JSON may have made strings) or a list in order of ids.
    Raises a TypeError or ValueError unless ids are in `0..num_classes - 1` and names are text.
    """
    if id2label is None:
        return None
    if isinstance(id2label, (list, tuple)):
        id2label = dict(enumerate(id2label))
    if not isinstance(id2label, dict):
        raise TypeError(
            f"`id2label` has to be a dictionary of class names by id, or a list, but is {id2label!r:.100}."
        )
    names = {}
    for key, name in id2label.items():
        is_id = isinstance(key, Integral) and not isinstance(key, bool)
        is_id = is_id or (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10)
        if not is_id or not 0 <= int(key) < num_classes or int(key) in names:
            raise ValueError(
                f"`id2label` has {key!r:.100} as an id, but ids have to be the integers 0 to {num_classes - 1}"
                " (`num_classes`), each at most once."
            )
        if not isinstance(name, str):
            raise TypeError(
                f"`id2label` names class {key} {name!r:.100}, of {type(name)}, but names have to be `str`."
            )
        names[int(key)] = name
    return names
