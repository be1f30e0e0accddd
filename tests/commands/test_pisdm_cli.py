import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import diffusers_pisdm
from diffusers_pisdm.commands import app, pisdm_cli


HELPERS = {"__init__", "data_sources", "drawing", "pisdm_cli"}
# Nobody has these packages; a command that needs them is asked for its help.
BARE = """
import sys
from diffusers_pisdm.commands.pisdm_cli import main
sys.modules |= {"datasets": None, "gradio": None, "matplotlib": None}
for command in ("train", "evaluate", "cache-latents", "sample"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        print("END", command, end.code)
"""

LIGHT = """
import os
import sys
from pisdm_command import main
try:
    main()
finally:
    imported = [name for name in ("torch", "diffusers", "diffusers_pisdm") if name in sys.modules]
    print("IMPORTED", imported, "WAITING", os.environ["OMP_WAIT_POLICY"])
"""


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])


def test_every_command_is_listed_with_what_it_does(capsys):
    files = {path.stem for path in Path(pisdm_cli.__file__).parent.glob("*.py")} - HELPERS
    assert {command.replace("-", "_") for command in pisdm_cli.COMMANDS} == files
    with pytest.raises(SystemExit, match="0"):
        pisdm_cli.main(["--help"])
    out = capsys.readouterr().out
    for command in pisdm_cli.COMMANDS:
        (line,) = re.findall(rf"^  {command} +(\S.*)$", out, re.MULTILINE)
        assert line == pisdm_cli.summary(command) and len(line) < 100 and line.endswith(".")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("drow", "no command 'drow'. `pisdm --help`"),
        ("genrate", "'genrate'. Did you mean generate?"),
        ("--verbose", "no option '--verbose'"),
    ],
)
def test_what_is_no_command_is_refused(word, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        pisdm_cli.main([word, "more"])
    assert told in capsys.readouterr().err


def test_help_is_also_a_word(capsys):
    with pytest.raises(SystemExit) as end:
        pisdm_cli.main(["help"])
    assert not end.value.code and "generate" in capsys.readouterr().out


def test_without_a_command_all_are_listed(capsys):
    with pytest.raises(SystemExit, match="2"):
        pisdm_cli.main([])
    assert re.search(r"^  new-recipe +Writes", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("command", pisdm_cli.COMMANDS)
def test_the_examples_in_the_help_of_a_command_are_indented(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        pisdm_cli.main([command, "--help"])
    assert not re.search("^(pisdm|hf) ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("waiting", [None, "ACTIVE"])
@pytest.mark.parametrize(("arguments", "code"), [("--help", 0), ("--version", 0), ("drow", 2), ("", 2)])
def test_what_runs_no_command_imports_nothing_that_takes_seconds(arguments, code, waiting):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": waiting} if waiting else {}
    ran = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments.split()],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
    )
    # OpenMP reads its settings when torch is imported, so ours comes before that; the user's own stays.
    last = f"IMPORTED [] WAITING {waiting or 'PASSIVE'}"
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (code, last), ran.stderr
    assert f"pisdm {diffusers_pisdm.__version__}" in ran.stdout or arguments != "--version"


def test_options_go_to_the_command_under_its_name(capsys):
    with pytest.raises(SystemExit, match="0"):
        pisdm_cli.main(["cache-latents", "--help"])
    assert capsys.readouterr().out.startswith("usage: pisdm cache-latents [-h] --output_dir")
    with pytest.raises(SystemExit, match="2"):
        pisdm_cli.main(["generate", "--seed", "-1"])
    assert "pisdm generate: error: argument --seed: must be at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", pisdm_cli.COMMANDS)
def test_a_wrong_option_is_told_in_two_lines_that_name_the_help(command, capsys):
    required = {"publish": ["a", "b/c"], "convert-dim": ["a", "--output_dir", "b"], "new-recipe": ["a"]}
    required |= {"sample": ["--output_dir", "a"], "train": ["--output_dir", "a"]}
    required["cache-latents"] = ["--cascade_config", "a", "--output_dir", "b"]
    with pytest.raises(SystemExit, match="2"):
        pisdm_cli.main([command, *required.get(command, []), "--sead"])
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"pisdm {command}: error: ") and "sead" in error
    assert f"pisdm {command} --help" in hint


def test_a_missing_extra_is_named():
    ran = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    ends = dict(re.findall(r"^END (\S+) (.*)$", ran.stdout, re.MULTILINE))
    for command, extra in {"train": "train", "evaluate": "evaluate", "cache-latents": "train"}.items():
        assert re.search(rf'needs datasets.* pip install ".*\[{extra}\]', ends[command])
    assert ends["sample"] == "0"  # needs none


def test_the_report_says_what_is_installed_and_what_runs(capsys):
    pisdm_cli.main(["env"])
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["diffusers_pisdm version"] == diffusers_pisdm.__version__
    assert lines["PyTorch version (GPU?)"] == f"{torch.__version__} ({torch.cuda.is_available()})"
    assert lines["Backends on cpu"] == "scan: numba, convolution: numba"
    assert lines["Checkpoint pisdm-emoji128"] == "found"
    assert f"{torch.get_num_threads()} threads" in lines["CPU"]
    assert "<fill in>" not in lines.values()


def test_the_app_is_launched_as_told(monkeypatch):
    launched = []
    module = types.ModuleType("diffusers_pisdm.app")  # what gradio is needed for
    module.launch = lambda model, **options: launched.append((model, options))
    monkeypatch.setitem(sys.modules, "diffusers_pisdm.app", module)
    app.main([])
    app.main(["--model", "a/b", "--host", "0.0.0.0", "--port", "80", "--share"])
    assert launched == [
        (None, {"host": "127.0.0.1", "port": 7860, "share": False}),
        ("a/b", {"host": "0.0.0.0", "port": 80, "share": True}),
    ]

    def busy(model, **options):
        raise OSError("Cannot find empty port")

    module.launch = busy
    with pytest.raises(SystemExit, match="error: Cannot find empty port"):
        app.main([])
