"""The scripts that are commands, too."""

import runpy
import sys
from pathlib import Path

import pytest

from diffusers_pisdm.commands.pisdm_cli import summary


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ["cache-latents", "evaluate", "generate", "publish", "sample", "train"]


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_runs_its_command(command, monkeypatch, capsys):
    script = EXAMPLES / f"{command.replace('-', '_').replace('train', 'train_pisdm')}.py"
    assert f"`pisdm {command}` as a script" in script.read_text()
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {script.name}") and summary(command) in out
