"""The scripts that are commands, too."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from diffusers_pisdm.commands.pisdm_cli import summary


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ["cache-latents", "convert-dim", "evaluate", "generate", "publish", "sample", "train"]


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_runs_its_command(command, monkeypatch, capsys):
    script = EXAMPLES / f"{command.replace('-', '_').replace('train', 'train_pisdm')}.py"
    text = script.read_text()
    assert f"`pisdm {command}` as a script" in text
    assert re.findall("^.*import.*", text, re.MULTILINE) == ["from pisdm_command import run_script"]  # and no torch
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert out.startswith(f"usage: {script.name}") and summary(command) in out
