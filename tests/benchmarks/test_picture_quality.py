import json

import pytest
from PIL import Image

from benchmarks.picture_quality import main
from diffusers_pisdm import PISDMCascadePipeline
from tests.data.image_folders import copy_folder
from tests.pipelines.tiny_cascade import make_scheduler, make_transformer


CLASSES = ["noto/animal-mammal", "noto/clothing", "other/face-smiling", "other/heart"]


@pytest.fixture
def data(real_image_files, tmp_path):
    """A data set of four classes in two styles, with ids in another order than the model's."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    for split, part in (("train", slice(0, None, 2)), ("validation", slice(1, None, 2))):
        folder = copy_folder(real_image_files[part], tmp_path / split)
        rows = []
        for label, name in enumerate(reversed(CLASSES)):
            for file in sorted((folder / name.split("/")[1]).iterdir()):
                rows.append({"image": {"bytes": file.read_bytes(), "path": file.name}, "label": label})
        features = Features(image=ImageFeature(), label=ClassLabel(names=CLASSES[::-1]))
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "data" / f"{split}-0.parquet")
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path):
    pipe = PISDMCascadePipeline(
        make_transformer(1, num_classes=4),
        make_scheduler(),
        make_transformer(2, num_classes=4),
        id2label=CLASSES,
        default_num_inference_steps=[2, 1],
        default_guidance_scale=[3.0, 1.0],
    )
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("styles", [None, pytest.param("noto", marks=pytest.mark.slow)])
def test_a_model_is_judged(data, model, tmp_path, styles):
    output = tmp_path / "output"
    arguments = ["--model", str(model), "--data_dir", str(data), "--output", str(output), "--num_samples", "10"]
    main([*arguments, "--size", "32", *(["--styles", styles] if styles else [])])
    result = json.loads((output / "picture_quality.json").read_text())
    assert result["settings"]["num_inference_steps"] == [2, 1]  # the model's own
    assert result["settings"]["guidance_scale"] == [3.0, 1.0]
    counts = result["images"]
    assert counts["samples"] == 10 and counts["train"] + counts["held_out"] == (12 if styles else 24)
    for name in ("train", "held_out"):
        assert result[f"frechet_distance_{name}"] > result["frechet_distance_of_held_out_to_train"] > 0
    assert 0 <= result["nearest_class_samples"] <= result["nearest_subject_samples"] <= 1
    assert result["nearest_class_held_out"] > 0.5  # real pictures do look like their class
    assert result["white_roughness_held_out"] < 0.5
    assert result["nearest_training_image"]["share_below_first_percentile"] == 0
    with Image.open(output / "samples.png") as grid:
        assert grid.width >= 8 * 128


def test_a_missing_model_is_a_sentence(data, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*no-model"):
        main(["--model", str(tmp_path / "no-model"), "--data_dir", str(data), "--output", str(tmp_path / "o")])
