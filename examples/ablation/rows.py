"""The rows of the paper's ablations (its Tables 1 and 2): what a recipe becomes when one component is taken away."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from diffusers_pisdm.models.transformer_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.ops.scan_paths import SCAN_DIRECTIONS


FULL = "full"
COMPONENTS = {
    "CSM": "cyclic scanning",
    "CN": "cascade",
    "PT": "padding tokens",
    "LSEM": "local enhancement",
    "SIL": "scale-invariant loss",
}
PER_STAGE_ARGUMENTS = ("batch_shares", "stage_loss_weights", "noise_shifts")  # of the training script


def scan_in(directions: int) -> Callable[[dict], dict]:
    """Every stage scans in the first so many of [`SCAN_DIRECTIONS`]."""

    def change(recipe: dict) -> dict:
        _check_layers(recipe, directions)
        if directions == len(SCAN_DIRECTIONS):
            return recipe  # the complete one
        return _set_in_stages(recipe, scan_directions=list(SCAN_DIRECTIONS[:directions]))

    return change


def without_cascade(recipe: dict) -> dict:
    """The last stage alone makes the image from nothing."""
    last = {name: value for name, value in recipe["stages"][-1].items() if name != "low_res_channels"}
    training = dict(recipe.get("training", {}))
    for name in PER_STAGE_ARGUMENTS:
        if name in training:
            training[name] = training[name][-1:]
    return recipe | {"stages": [last], "training": training}


def without_padding_tokens(recipe: dict) -> dict:
    return _set_in_stages(recipe, num_padding_tokens=0)


def without_local_enhancement(recipe: dict) -> dict:
    return _set_in_stages(recipe, local_enhancement=False)


def without_scale_invariant_loss(recipe: dict) -> dict:
    return recipe | {"training": {**recipe.get("training", {}), "sil_weight": 0}}


@dataclass(frozen=True)
class AblationRow:
    """A row of a table."""

    name: str  # on the command line
    variant: str  # of its model, under which runs are kept: rows of two tables may share one
    label: str  # for tables and pictures
    marks: dict[str, str]  # the cells that say what the model has, by column
    paper_fid: float  # on ImageNet at 256 px
    # makes the row's recipe of the complete one; `None` leaves it as it is
    change: Callable[[dict], dict] | None = None

    def recipe(self, complete: dict) -> dict:
        """
        The row's recipe, which differs from the complete one by the row's switch alone; raises ValueError if its
        stages have too few layers for the row's directions.
        """
        recipe = copy.deepcopy(complete)
        return recipe if self.change is None else self.change(recipe)


def _without(component: str, paper_fid: float, change: Callable[[dict], dict]) -> AblationRow:
    marks = {name: "no" if name == component else "yes" for name in COMPONENTS}
    name = f"without_{component.lower()}"
    return AblationRow(name, name, f"without {COMPONENTS[component]}", marks, paper_fid, change)


def _directions(count: int, paper_fid: float) -> AblationRow:
    name = f"{count}_direction" if count == 1 else f"{count}_directions"
    shared = {1: "without_csm", len(SCAN_DIRECTIONS): FULL}  # these two rows are in both tables
    label, marks = name.replace("_", " "), {"directions": str(count)}
    return AblationRow(name, shared.get(count, name), label, marks, paper_fid, scan_in(count))


TABLES = {
    1: (
        AblationRow(FULL, FULL, "all components", dict.fromkeys(COMPONENTS, "yes"), 1.67),
        _without("CSM", 1.98, scan_in(1)),
        _without("CN", 2.26, without_cascade),
        _without("PT", 1.71, without_padding_tokens),
        _without("LSEM", 1.75, without_local_enhancement),
        _without("SIL", 2.11, without_scale_invariant_loss),
    ),
    2: tuple(
        _directions(count, paper_fid)
        for count, paper_fid in enumerate((1.97, 1.93, 1.90, 1.75, 1.74, 1.73, 1.71, 1.67), start=1)
    ),
}


def table_notes(table: int) -> list[str]:
    """How we read a table of the paper, and where its rows are not comparable."""
    if table == 1:
        return [
            "We infer which component each row of the paper lacks from its order; the text only names padding tokens.",
            "Without a cascade there is no second scale, so the scale-invariant loss has nothing to compare: the row"
            " without CN, marked SIL as in the paper, also trains without that loss.",
            "All rows train for the same number of steps on the same batches, but not with the same FLOPs: the row"
            " without CN trains and samples only the last stage, and has fewer parameters.",
        ]
    return [
        'The paper gives 1.97, 1.93 and 1.90 for "small subsets" of directions: we read that as one, two and three.',
        f"The order of directions is {', '.join(SCAN_DIRECTIONS)}.",
        "A stage of N layers reads in at most N/2 (rounded up) of them, since its second half mirrors the first.",
    ]


def check_complete(recipe: dict) -> None:
    """
    Raises ValueError unless the recipe has every component of the paper, leaves the scan directions to the rows, and
    trains all from the start.
    """
    stages, training = recipe["stages"], recipe.get("training", {})
    if len(stages) < 2:
        raise ValueError("an ablation needs a cascade, but the recipe has one stage: add one below it")
    for number, stage in enumerate(stages, start=1):
        if "scan_directions" in stage:
            raise ValueError(f"the rows set `scan_directions`: remove it from stage {number}")
        for name in ("num_padding_tokens", "local_enhancement"):
            if not stage.get(name, True):
                raise ValueError(f"an ablation needs all components, but `{name}` of stage {number} is {stage[name]}")
    if training.get("sil_weight", 1.0) <= 0:
        raise ValueError(f"an ablation needs all components, but `sil_weight` is {training['sil_weight']}")
    for name in ("train_stages", "pretrained_model_name_or_path", "lora_rank"):
        if name in training:
            raise ValueError(f"every row trains all stages from scratch: remove `{name}`")


def _check_layers(recipe: dict, directions: int) -> None:
    default = inspect.signature(PISDMTransformer2DModel).parameters["num_layers"].default
    layers = [stage.get("num_layers", default) for stage in recipe["stages"]]
    used = max(math.ceil(count / 2) for count in layers)
    if used < directions:
        raise ValueError(
            f"stages of {', '.join(map(str, layers))} layers read in at most {used} directions, since the second half"
            f" mirrors the first: {directions} directions need a stage of {2 * directions - 1} layers"
        )


def _set_in_stages(recipe: dict, **arguments: object) -> dict:
    return recipe | {"stages": [stage | arguments for stage in recipe["stages"]]}
