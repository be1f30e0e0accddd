import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_pisdm import PISDM_EMOJI128
from diffusers_pisdm.commands import publish
from tests.publishing.finished_run import make_finished_run
from tests.support.hub_server import connect, serve_hub


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub(tokens={"token": "someone"}) as server:
        connect(monkeypatch, server, "token", tmp_path)
        yield server


def test_the_command_publishes_and_says_how_to_load(hub, run_dir, tmp_path):
    """In its own process, with nothing but the environment that a user has."""
    options = ["--license", "mit", "--variant", "fp16", "--revision", "later", "--private"]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run(
        [sys.executable, "examples/publish.py", str(run_dir), "someone/cascade", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(
        rf"Published 12 files, [\d.]+ MB to {hub.url}/someone/cascade\. Load it with"
        r' PISDMCascadePipeline\.from_pretrained\("someone/cascade", revision="later"\)',
        run.stdout.splitlines()[-1],
    )
    files = hub.hub.files("someone/cascade", "later")
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in files
    assert "license: mit" in files["README.md"].decode()
    assert hub.hub.repositories["someone/cascade"].private
    assert set(hub.hub.files("someone/cascade")) == {".gitattributes"}


def test_a_dry_run_shows_files_and_card_and_sends_nothing(hub, run_dir, capsys):
    publish.main([str(run_dir), "someone/cascade", "--dataset", "someone/images", "--dry_run"])
    out = capsys.readouterr().out
    assert re.search(r"^ +0\.0\d MB  transformer/diffusion_pytorch_model\.safetensors$", out, re.MULTILINE)
    assert "checkpoint-4" not in out
    assert "datasets:\n- someone/images" in out
    assert re.fullmatch(
        r"Nothing was uploaded \(--dry_run\)\. someone/cascade would get 10 files, [\d.]+ MB\.", out.splitlines()[-1]
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "folder", "message"),
    [
        ("token", "nowhere", "error: .*nowhere is not a saved pipeline"),
        ("", "", "error: You are not logged in .*hf auth login"),
        ("wrong", "", "error: The Hub does not accept your token"),
    ],
)
def test_errors_are_one_message(hub, run_dir, monkeypatch, token, folder, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=message):
        publish.main([str(run_dir / folder), "someone/cascade"])


def test_the_shipped_checkpoint_has_a_name():
    assert publish.parse_args(["pisdm-emoji128", "someone/cascade"]).folder == PISDM_EMOJI128


def test_an_unknown_variant(capsys):
    with pytest.raises(SystemExit):
        publish.parse_args(["folder", "someone/cascade", "--variant", "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err
