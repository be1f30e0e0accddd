import runpy
import sys
from pathlib import Path

import pytest

import benchmarks.block


FOLDER = Path(benchmarks.block.__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_as_a_module(script, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    assert "--output" in capsys.readouterr().out
