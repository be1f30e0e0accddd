"""Cards say what a run's folder holds, and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import PartialState
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_pisdm import PISDM_EMOJI128
from diffusers_pisdm.commands import evaluate
from diffusers_pisdm.evaluation.networks import extractor
from diffusers_pisdm.publishing.model_card import SKELETON, TAGS, find_pictures, make_model_card
from diffusers_pisdm.training.fine_tuning import add_lora
from diffusers_pisdm.training.metrics import append_metrics
from diffusers_pisdm.utils import shipped_files
from tests.evaluation.pixel_features import PixelFeatures
from tests.pipelines.tiny_cascade import NUM_CLASSES, make_cascade
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


def test_an_evaluation_beside_the_run_becomes_results_for_its_reference(run_dir):
    scores = {"frechet_distance": {"name": "FID", "value": 12.5}, "precision": {"name": "precision", "value": 0.75}}
    report = {"scores": scores, "num_samples": 100, "reference": "/home/someone/my_images, train"}
    (run_dir / "evaluation.json").write_text(json.dumps(report))
    data = reread(make_model_card(run_dir, "someone/name")).data
    assert {result.dataset_type for result in data.eval_results} == {"imagefolder"}
    results = [(r.metric_type, r.metric_name, r.metric_value, r.dataset_name) for r in data.eval_results]
    assert [result[:3] for result in results] == [("frechet_distance", "FID", 12.5), ("precision", "precision", 0.75)]
    assert all("my_images" in result[3] and "home" not in result[3] for result in results)


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


def test_half_a_last_line_is_no_loss(run_dir):
    whole = make_model_card(run_dir, "someone/name").text
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15')
    assert make_model_card(run_dir, "someone/name").text == whole


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"scores": {"fid": 3.0}}', '{"scores": {"fid": {"name": "FID"}}}', "\x00", '{"scores": []}'],
)
def test_an_evaluation_that_is_none_is_named(run_dir, content):
    (run_dir / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json .* Fix or remove it"):
        make_model_card(run_dir, "someone/name")


@pytest.fixture
def evaluated(run_dir, real_image_dir, monkeypatch):
    """The run with a report that examples/evaluate.py wrote into it."""
    monkeypatch.setattr(extractor, "_factories", {**extractor._factories, "pixels": PixelFeatures})
    PartialState._reset_state()
    evaluate.main(
        [
            *("--samples", str(real_image_dir / "animal-mammal"), "--reference", str(real_image_dir / "clothing")),
            *("--features", "pixels", "--batch_size", "4", "--output", str(run_dir / "evaluation.json")),
        ]
    )
    return run_dir


def test_a_report_of_evaluate_becomes_results(evaluated, real_image_dir):
    report = json.loads((evaluated / "evaluation.json").read_text())
    card = reread(make_model_card(evaluated, "someone/name", datasets=["someone/images"]))
    scores = {key: score for key, score in report["scores"].items() if score["value"] is not None}
    assert {"frechet_distance", "inception_score"} <= scores.keys()
    found = {result.metric_type: (result.metric_name, result.metric_value) for result in card.data.eval_results}
    scores["classifier_score"] = scores.pop("inception_score")  # it is not Inception's
    assert found == {key: (score["name"], score["value"]) for key, score in scores.items()}
    assert all(f"\n- {note}" in card.text for note in report["notes"]) and len(report["notes"]) == 2
    for score in scores.values():
        assert f"| {score['name']} | {score['value']:.4g} |" in card.text
    assert f"| num_samples | {report['num_samples']} |" in card.text
    for hidden in (str(real_image_dir), "ema_decay", "seconds", "{'", "| scores"):
        assert hidden not in card.text.replace("images per second", "")


@pytest.mark.parametrize("name", ["IS", "IS (weights of mine)"])
def test_the_inception_score_is_named_so(run_dir, name):
    scores = {"inception_score": {"name": name, "value": 12.5}}
    (run_dir / "evaluation.json").write_text(json.dumps({"scores": scores}))
    (result,) = reread(make_model_card(run_dir, "someone/name", datasets=["a/b"])).data.eval_results
    assert (result.metric_type, result.metric_name) == ("inception_score", name)


@pytest.fixture
def lora_dir(tmp_path):
    """Names its base as its run's arguments do."""

    def make(base, has_classes=False):
        pipe = make_cascade(2, id2label=[f"kind *{i}*" for i in range(NUM_CLASSES)])
        add_lora(pipe.transformer, rank=2, alpha=2)
        pipe.save_lora_weights(tmp_path, save_class_embeddings=has_classes)
        config = {"arguments": {"pretrained_model_name_or_path": base}}
        (tmp_path / "training_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize("base", ["/home/me/base", "outputs/my/base", "./base", "local/base", None])
def test_lora_adapters_of_a_local_folder_need_a_public_base(lora_dir, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("local/base").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"LoRA adapters need .*pass its repository as `base_model`"):
        make_model_card(lora_dir(base), "someone/lora")
    card = make_model_card(lora_dir(base), "someone/lora", base_model="someone/base")
    assert 'from_pretrained("someone/base")\npipe.load_lora_weights("someone/lora")' in card.text


def test_lora_adapters_of_a_public_base_name_it(lora_dir):
    assert 'from_pretrained("someone/base")' in make_model_card(lora_dir("someone/base"), "someone/lora").text
    for shipped in ("pisdm-emoji128", PISDM_EMOJI128):
        text = make_model_card(lora_dir(shipped), "someone/lora").text
        assert "import PISDM_EMOJI128, PISDMCascadePipeline" in text and "from_pretrained(PISDM_EMOJI128)" in text


def test_the_card_of_adapters_names_their_classes_and_describes_no_cascade(lora_dir):
    text = make_model_card(lora_dir("someone/dim", has_classes=True), "someone/lora").text
    assert text.strip().startswith("# LoRA adapters for someone/dim\n") and "first stage" not in text
    assert r"Their classes: kind \*0\*, kind \*1\*," in text and r"kind \*9\*." in text
    assert "They draw its classes" in make_model_card(lora_dir("someone/dim"), "someone/lora").text


def test_the_card_installs_the_package_from_where_it_came(run_dir, monkeypatch):
    class Installed:
        """As pip records what it installs (PEP 610)."""

        def __init__(self, **record):
            self.read_text = lambda name: json.dumps(record)

    for record, command in (
        ({"url": "https://x.org/p.git", "vcs_info": {"vcs": "git"}}, '"diffusers-pisdm @ git+https://x.org/p.git"'),
        ({"url": "https://x.org/p.whl", "archive_info": {}}, '"diffusers-pisdm @ https://x.org/p.whl"'),
        ({"url": "file:///home/me/p", "dir_info": {}}, '"."  # in a clone of diffusers_pisdm'),
    ):
        monkeypatch.setattr(shipped_files, "distribution", lambda name, record=record: Installed(**record))
        text = make_model_card(run_dir, "someone/name").text
        assert f"pip install {command}" in text and "/home" not in text


def test_a_licence_is_one_of_the_hubs(run_dir):
    with pytest.raises(ValueError, match=r"no licence 'apache2'\. Did you mean 'apache-2\.0'"):
        make_model_card(run_dir, "someone/name", license="apache2")
    with pytest.raises(ValueError, match=r"no licence 'foo'.*such as apache-2\.0"):
        make_model_card(run_dir, "someone/name", license="foo")


def test_what_is_not_finite_is_no_result(run_dir):
    (run_dir / "evaluation.json").write_text('{"fid": NaN, "recall": 0.5}')
    card = reread(make_model_card(run_dir, "someone/name", datasets=["someone/images"]))
    assert [result.metric_type for result in card.data.eval_results] == ["recall"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/alice/data/cats", "cats"),
        ("/home/alice", "~"),
        ("/Users/alice/", "~"),
        ("/data/my secret stuff/cats", "cats"),
        ("~/work/cats", "cats"),
        ("~alice", "~"),
        ("../../alice/cats", "cats"),
        ("C:\\Users\\alice\\cats", "cats"),
        ("C:\\Users\\alice", "~"),
        ("c:/Users/alice/cats", "cats"),
        ("\\\\server\\alice\\cats", "cats"),
        ("file:///home/alice/data/cats", "cats"),
        ("--data=/home/alice/data/cats,/mnt/alice/dogs", "--data=cats,dogs"),
        ("transformers:/home/alice/net", "transformers:net"),
        ("https://alice:pass@host.org/cats?token=alice#alice", "https://host.org/cats"),
        ("see s3://bucket/cats?X-Sig=alice, or hf_aliceALICEalice123", "see s3://bucket/cats, or (removed)"),
        ("./../../home/alice/cats", "cats"),
        ("alice@host.example.com:cats", "cats"),
        ("git@github.com:alice/cats.git", "cats.git"),
        ("rsync from alice@nas:/data/alice/cats", "rsync from cats"),
        ("by alice@example.com", "by (removed)"),
        ("PASSWORD=alice", "PASSWORD=(removed)"),
        ("run --token alice --seed 3", "run --token (removed) --seed 3"),
        ("wandb_api_key: alice", "wandb_api_key: (removed)"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.alice_alice", "(removed)"),
        ("AIzaSyA-alicealicealicealicealicealice12", "(removed)"),
        ("wandb_v1_alicealicealice", "(removed)"),
        ("sk-alice1234567890", "(removed)"),
        ("skeletonization, sk-learn-classifiers", "skeletonization, sk-learn-classifiers"),
        ("padding tokens=2; a key: value; c@4", "padding tokens=2; a key: value; c@4"),
        (["/home/alice/data/cats", ["~/alice/dogs"]], r"\['cats', \['dogs'\]\]"),
        ({"path": "/home/alice/data/cats", "wandb_api_key": "alice", "auth_key": "alice"}, "{'path': 'cats'}"),
        ("someone/images", "someone/images"),
        ("row/column", "row/column"),
        (0.0002, "0.0002"),
        (True, "True"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["arguments", "changes", "facts", "versions", "evaluation"])
def test_no_path_and_no_secret_of_the_author_is_shown(run_dir, value, shown, place):
    config = json.loads((run_dir / "training_config.json").read_text())
    if place == "arguments":
        config["arguments"]["given"] = value
    elif place == "changes":
        config["changes"] = [{"step": 4, "given": [value, "new"], "hub_token": ["alice", "alice"]}]
    elif place == "facts":
        config["hardware"] = value
    elif place == "versions":
        config["versions"]["given"] = value
    elif isinstance(value, str):
        (run_dir / "evaluation.json").write_text(json.dumps({"given": value, value: 0.5}))
    (run_dir / "training_config.json").write_text(json.dumps(config))
    card = make_model_card(run_dir, "someone/name", datasets=["someone/images"])
    assert "alice" not in str(card) and "secret" not in str(card)
    if place != "evaluation" or isinstance(value, str):
        assert f" | {shown} |" in card.text


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("training_config.json", '{"changes": 4}', "training_config.json"),
        ("training_config.json", '{"changes": [3]}', "training_config.json"),
        ("training_config.json", '{"changes": [{"step": 4, "ema_decay": []}]}', "training_config.json"),
        ("training_config.json", '{"arguments": 3}', "training_config.json"),
        ("evaluation.json", '{"scores": {"fid": 3}}', "evaluation.json"),
        ("card.md", "---\n[\n---\n", "card.md.* YAML"),
    ],
)
def test_a_file_that_is_not_ours_is_named(run_dir, name, content, culprit):
    (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{culprit}.* Fix"):
        make_model_card(run_dir, "someone/name", run_dir / name if name == "card.md" else None)


@pytest.mark.parametrize("speed", [None, "fast", float("nan"), [1]])
def test_speeds_and_names_that_are_none_cost_no_card(run_dir, speed):
    append_metrics(run_dir / "metrics.jsonl", 1000, {"images_per_second": speed})
    (run_dir / "evaluation.json").write_text('{"scores": {"fid": {"name": 3, "value": 1.5}}}')
    text = make_model_card(run_dir, "someone/name").text
    assert "| images per second | 11 |" in text and "| 3 | 1.5 |" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "training_config.json", "evaluation.json"])
def test_no_link_out_of_the_folder_is_read(run_dir, tmp_path, name):
    (run_dir / name).rename(tmp_path / name)
    (run_dir / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=rf"links to files outside of it: .*{name}"):
        make_model_card(run_dir, "someone/name")


ODD = "a`b|c<script>alert(1)</script>\n## d <!-- usage:end --> [e](f) *g* \u202eh\x1b[31m " + "x" * 16_000


def test_what_comes_from_files_cannot_change_the_card(run_dir):
    plain = make_model_card(run_dir, "someone/name").text
    config = json.loads((run_dir / "training_config.json").read_text())
    config["arguments"] |= {"odd": ODD, ODD: "odd", "list": [ODD]}
    config["hardware"] = ODD
    config["versions"][ODD] = ODD
    config["changes"] = [{"step": 4, ODD: [ODD, ODD]}]
    (run_dir / "training_config.json").write_text(json.dumps(config))
    (run_dir / "evaluation.json").write_text(json.dumps({ODD: ODD, "fid": 12.5}))
    (run_dir / "evaluation_<b>|.json").write_text(json.dumps({"fid": 1.5}))
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 4, f"train/{ODD}": 0.5}) + "\n")
    (run_dir / "samples" / "step-9](javascript:x).png").touch()
    text = make_model_card(run_dir, "someone/name").text
    outside_code = re.sub("`[^`\n]*`", "", text[: text.index("## Citation")])
    assert (
        "<script" not in outside_code and "<b>" not in outside_code and "](f)" not in outside_code.replace("\\]", "")
    )
    assert all(character.isprintable() or character == "\n" for character in text)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
    assert max(map(len, text.splitlines())) < 1000
    assert "javascript" not in text and "](samples/step-0001000.png)" in text
    for line in text.splitlines():  # every row of a table has the columns of its table
        if line.startswith("| ") and ODD[:3] in line:
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["x" * 400_000, "-" * 400_000, "a-" * 200_000, "a." * 200_000])
def test_long_texts_take_no_time(run_dir, text):
    """The search for what is private would take hours of these."""
    config = json.loads((run_dir / "training_config.json").read_text())
    config["arguments"] |= {"long": text, "secret": f"hf_{'s' * 20} {text}", "path": f"/home/me/{text} token=abc"}
    (run_dir / "training_config.json").write_text(json.dumps(config))
    card = make_model_card(run_dir, "someone/name").text
    assert text[:100] in card and "sss" not in card and "/home" not in card


def test_a_run_stage_by_stage(run_dir):
    """As examples/train_on_device.py leaves it."""
    (run_dir / "metrics.jsonl").unlink()
    shutil.rmtree(run_dir / "samples")
    for stage, loss in (("stage_1", 0.25), ("stage_2", 0.5)):
        append_metrics(
            _made(run_dir / stage) / "metrics.jsonl", 40, {"train/denoising": loss, "images_per_second": 7.0}
        )
        for step in (20, 40):
            Image.new("RGB", (8, 8)).save(_made(run_dir / "samples" / stage) / f"step-{step:07d}.png")
    card = make_model_card(run_dir, "someone/name")
    for row in ("stage 1: train/denoising | 40 | 0.25", "stage 2: train/denoising | 40 | 0.5", "stage 2: steps | 40"):
        assert f"| {row} |" in card.text
    pictures = find_pictures(card, [run_dir])
    assert {f"samples/stage_{stage}/step-0000040.png" for stage in (1, 2)} < pictures.keys()
    assert not any("0020" in link for link in pictures)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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


@pytest.mark.parametrize("link", ["none.png", "../own/card.md", "/etc/hosts", ".hidden.png", "linked.png"])
def test_a_picture_that_is_not_there(run_dir, link):
    (run_dir / ".hidden.png").touch()
    (run_dir / "linked.png").symlink_to("/etc/hosts")
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
