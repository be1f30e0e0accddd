import copy
from pathlib import Path

import pytest
import torch

from ablation.rows import FULL, TABLES, check_complete, table_notes
from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.ops.scan_paths import SCAN_DIRECTIONS
from diffusers_pisdm.training.recipes import read_recipe


PUBLISHED = Path(__file__).parents[3] / "examples" / "recipes" / "ablation32.json"
STAGE = {"patch_size": 2, "in_channels": 3, "num_layers": 15, "hidden_size": 16, "num_padding_tokens": 2}
RECIPE = {
    "scheduler": {"prediction_type": "v_prediction"},
    "stages": [
        {"sample_size": 4, **STAGE},
        {"sample_size": 8, "low_res_channels": 3, **STAGE},
        {"sample_size": 16, "low_res_channels": 3, **STAGE, "num_layers": 7},
    ],
    "vae": None,
    "training": {"learning_rate": 1e-3, "batch_shares": [1, 0.75, 0.5], "noise_shifts": [1, 2, 3], "sil_weight": 0.1},
}


def row(name):
    return next(row for table in TABLES.values() for row in table if row.name == name)


def recipe(name):
    return row(name).recipe(RECIPE)


def with_stages(**arguments):
    return RECIPE | {"stages": [stage | arguments for stage in RECIPE["stages"]]}


def layer_directions(recipe):
    with torch.device("meta"):
        return [PISDMTransformer2DModel(num_classes=2, **stage).layer_directions for stage in recipe["stages"]]


def test_rows_of_table_1_differ_from_the_complete_model_by_their_switch_alone():
    training = RECIPE["training"]
    last = {"sample_size": 16, **STAGE, "num_layers": 7}  # a first stage
    single = training | {"batch_shares": [0.5], "noise_shifts": [3]}
    assert {row.name: row.recipe(RECIPE) for row in TABLES[1]} == {
        "full": RECIPE,
        "without_csm": with_stages(scan_directions=["row_top_left"]),
        "without_cn": RECIPE | {"stages": [last], "training": single},
        "without_pt": with_stages(num_padding_tokens=0),
        "without_lsem": with_stages(local_enhancement=False),
        "without_sil": RECIPE | {"training": training | {"sil_weight": 0}},
    }


def test_rows_of_table_2_differ_by_their_directions_alone():
    for count, row in enumerate(TABLES[2], start=1):
        wanted = RECIPE if count == 8 else with_stages(scan_directions=list(SCAN_DIRECTIONS[:count]))
        assert row.recipe(RECIPE) == wanted
        first, second, third = layer_directions(row.recipe(RECIPE))
        assert set(first) == set(second) == set(SCAN_DIRECTIONS[:count])
        assert set(third) == set(SCAN_DIRECTIONS[: min(count, 4)])  # half of 7 layers


def test_marks_and_fids_are_the_papers():
    full, *others = TABLES[1]
    assert set(full.marks.values()) == {"yes"} and full.paper_fid == 1.67
    marks = {tuple(mark for mark, has in row.marks.items() if has == "no"): row.paper_fid for row in others}
    assert marks == {("CSM",): 1.98, ("CN",): 2.26, ("PT",): 1.71, ("LSEM",): 1.75, ("SIL",): 2.11}
    fids = [(row.marks["directions"], row.paper_fid) for row in TABLES[2]]
    assert fids == list(zip("12345678", [1.97, 1.93, 1.90, 1.75, 1.74, 1.73, 1.71, 1.67]))


def test_rows_that_are_the_same_model_share_its_runs():
    assert (row("1_direction").variant, row("8_directions").variant) == ("without_csm", FULL)
    assert recipe("1_direction") == recipe("without_csm") and recipe("8_directions") == recipe(FULL)
    recipes = {row.variant: row.recipe(RECIPE) for table in TABLES.values() for row in table}
    assert len(recipes) == 6 + 8 - 2
    assert all(a == b or recipes[a] != recipes[b] for a in recipes for b in recipes)


def test_the_complete_recipe_stays_as_it_is():
    before = copy.deepcopy(RECIPE)
    for row in (*TABLES[1], *TABLES[2]):
        changed = row.recipe(RECIPE)
        changed["training"]["learning_rate"] = 1
        changed["stages"][0]["patch_size"] = 9
    assert RECIPE == before


def test_too_few_layers_for_the_directions():
    shallow = with_stages(num_layers=7)
    assert row("4_directions").recipe(shallow)["stages"][0]["num_layers"] == 7
    for name in ("5_directions", "8_directions"):
        with pytest.raises(ValueError, match=r"7, 7, 7 layers read in at most 4 directions.* (9|15) layers"):
            row(name).recipe(shallow)
    row("8_directions").recipe({"stages": [{}, {}]})  # 49 layers


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RECIPE | {"stages": RECIPE["stages"][:1]}, "needs a cascade, but the recipe has one stage"),
        (with_stages(scan_directions=["row_top_left"]), "`scan_directions`: remove it from stage 1"),
        (with_stages(num_padding_tokens=0), "`num_padding_tokens` of stage 1 is 0"),
        (with_stages(local_enhancement=False), "`local_enhancement` of stage 1 is False"),
        (RECIPE | {"training": {"sil_weight": 0}}, "`sil_weight` is 0"),
        (RECIPE | {"training": {"train_stages": [1]}}, "remove `train_stages`"),
    ],
)
def test_a_recipe_without_a_component_is_refused(recipe, message):
    check_complete(RECIPE)
    with pytest.raises(ValueError, match=message):
        check_complete(recipe)


def test_the_published_recipe_has_all_rows():
    published = vars(read_recipe(PUBLISHED))
    check_complete(published)
    for row in (*TABLES[1], *TABLES[2]):
        for directions in layer_directions(row.recipe(published)):
            assert len(set(directions)) == int(row.marks.get("directions", 1 if row.name == "without_csm" else 8))


def test_notes_tell_how_the_paper_is_read():
    assert "nothing to compare" in " ".join(table_notes(1))
    assert '"small subsets"' in table_notes(2)[0] and ", ".join(SCAN_DIRECTIONS) in table_notes(2)[1]
