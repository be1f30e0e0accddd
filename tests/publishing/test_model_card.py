"""Cards say what a run's folder holds, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from diffusers_pisdm.publishing.model_card import SKELETON, TAGS, find_pictures, make_model_card
from tests.publishing.finished_run import write_run_files


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path):
    write_run_files(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def own_card(tmp_path):
    path = tmp_path / "own" / "card.md"
    path.parent.mkdir()
    path.write_text("---\nlicense: mit\ntags: [mamba, mine]\n---\n# Mine\n")
    return path


def reread(card: ModelCard) -> ModelCard:
    """The card as the Hub would parse it."""
    return ModelCard(str(card))


def test_metadata(run_dir):
    data = reread(make_model_card(run_dir, "someone/name", license="apache-2.0", datasets=["someone/images"])).data
    assert (data.license, data.datasets, data.library_name) == ("apache-2.0", ["someone/images"], "diffusers")
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.tags == list(TAGS)
    assert data.model_name == "name"
    results = [(result.metric_name, result.metric_value, result.dataset_type) for result in data.eval_results]
    assert results == [("fid", 12.5, "someone/images")]


def test_sections(run_dir):
    text = make_model_card(run_dir, "someone/name").text
    assert text.count("![") == 2
    assert "](samples/step-0001000.png)" in text
    assert 'from_pretrained("someone/name")' in text
    assert "| fid | 12.5 |\n| num_samples | 50,000 |\n| features | inception |" in text
    assert "| train/denoising_1 | 1,000 | 0.125 |\n| validation/denoising_1 | 1,000 | 0.166 |" in text
    assert "](loss_curves.png)" in text
    assert "| training images | 6,014 |\n| hardware | one abacus |\n| processes | 2 |\n| steps | 1,000 |" in text
    assert "| images per second | 11 |\n| torch | 2.13.0 |" in text
    assert "| `learning_rate` | 0.0002 |" in text
    assert r"| `scan` | row\|column |" in text


def test_secrets_and_the_machines_paths_stay_private(run_dir):
    text = make_model_card(run_dir, "someone/name").text
    assert "| `output_dir` | tiny |" in text
    assert all(private not in text for private in ("secret", "/home", "push_to_hub", "dataset_name"))


def test_what_is_missing_is_left_out(tmp_path):
    card = reread(make_model_card(tmp_path, "someone/name", datasets=["someone/images"]))
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# PIS-DM cascade", "## Usage", "## Citation"]
    assert card.data.license is card.data.eval_results is None
    assert "model-index" not in str(card)


def test_results_of_several_files_are_told_apart(run_dir):
    (run_dir / "evaluation_guided.json").write_text('{"fid": 10.0}')
    card = reread(make_model_card(run_dir, "someone/name", datasets=["someone/images"]))
    assert "| fid (evaluation) | 12.5 |" in card.text
    assert "| fid (evaluation_guided) | 10 |" in card.text
    assert [result.metric_value for result in card.data.eval_results if result.metric_type == "fid"] == [12.5, 10.0]


def test_an_own_card_keeps_its_text_and_gets_the_sections(run_dir, own_card):
    card = reread(make_model_card(run_dir, "someone/name", own_card))
    assert card.data.license == "mit"
    assert card.data.tags == ["mamba", "mine", *(tag for tag in TAGS if tag != "mamba")]
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# Mine", "## Samples", "## Usage", "## Metrics", "## Training"]
    assert make_model_card(run_dir, "someone/name", own_card, license="other").data.license == "other"


def test_a_card_can_be_filled_again(run_dir, own_card):
    first = make_model_card(run_dir, "someone/name", own_card)
    own_card.write_text(str(first))
    (run_dir / "samples" / "step-0002000.png").touch()
    second = make_model_card(run_dir, "someone/name", own_card)
    assert str(second) == str(first).replace("step-0001000", "step-0002000")


def test_text_between_markers_stays_where_the_run_has_nothing(tmp_path, own_card):
    own_card.write_text(own_card.read_text() + "<!-- training:begin -->\nBy hand.\n<!-- training:end -->\n")
    assert "By hand." in make_model_card(tmp_path, "someone/name", own_card).text


@pytest.mark.parametrize(
    "markers",
    ["<!-- usage:begin -->", "<!-- usage:end --><!-- usage:begin -->", "<!-- usage:begin --><!-- usage:end -->" * 2],
)
def test_unpaired_markers(tmp_path, own_card, markers):
    own_card.write_text(own_card.read_text() + markers)
    with pytest.raises(ValueError, match=r"times `<!-- usage:begin -->` and .* Fix the card"):
        make_model_card(tmp_path, "someone/name", own_card)


def test_a_card_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"path not found on disk \(.*none\.md\)"):
        make_model_card(tmp_path, "someone/name", tmp_path / "none.md")


def test_a_torn_file(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not valid JSON: .* Fix or remove it"):
        make_model_card(run_dir, "someone/name")


def test_pictures_are_found(run_dir, own_card):
    (own_card.parent / "my pictures").mkdir()
    (own_card.parent / "my pictures" / "a.png").touch()
    links = (
        '![a](./my%20pictures/a.png "title") <img width="1" src="https://somewhere/b.png"> <img src="loss_curves.png">'
    )
    own_card.write_text(own_card.read_text() + links)
    pictures = find_pictures(make_model_card(run_dir, "someone/name", own_card), [run_dir, own_card.parent])
    assert pictures == {
        "my pictures/a.png": own_card.parent / "my pictures" / "a.png",
        "loss_curves.png": run_dir / "loss_curves.png",
        "samples/step-0001000.png": run_dir / "samples" / "step-0001000.png",
    }


@pytest.mark.parametrize("link", ["none.png", "../own/card.md", "/etc/hosts"])
def test_a_picture_that_is_not_there(run_dir, link):
    with pytest.raises(ValueError, match=f"shows the picture `{link}`, which is not in .*run. Put it there"):
        find_pictures(ModelCard(f"---\na: b\n---\n![]({link})"), [run_dir])


def test_the_published_checkpoints_card_keeps_its_facts():
    path = ROOT / "model_card.md"
    card = reread(make_model_card(ROOT / "checkpoints" / "pisdm-emoji128", "someone/name", path))
    lines = [
        line for line in path.read_text().splitlines() if "from_pretrained" not in line and "class_labels" not in line
    ]
    body = lines[lines.index("# pisdm-emoji128") :]
    assert [line for line in body if line not in str(card).splitlines()] == []
    assert set(TAGS) <= set(card.data.tags)
    assert 'from_pretrained("someone/name")' in card.text
    assert len(find_pictures(card, [ROOT])) == 3


def test_the_skeleton_is_installed(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / SKELETON.relative_to(ROOT)).read_text() == SKELETON.read_text()


def test_the_skeleton_has_a_place_for_every_section(run_dir):
    filled = make_model_card(run_dir, "someone/name").text
    assert filled.endswith(SKELETON.read_text()[-200:])  # nothing was appended


def test_run_config_may_lack_keys(run_dir):
    (run_dir / "training_config.json").write_text(json.dumps({"images": 3}))
    assert "| training images | 3 |" in make_model_card(run_dir, "someone/name").text
