"""The package as a stranger gets it: a wheel, built from the source distribution and used outside of the clone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from PIL import Image

from diffusers_pisdm.utils.png_recipe import read_recipe
from tests.test_readme import python_blocks


ROOT = Path(__file__).parents[1]
SOURCES = (
    "setup.py",
    "pisdm_command.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "diffusers_pisdm",
    "checkpoints",
    "examples",
)
LIMIT = 100e6  # bytes, of a file on the Python package index
# After README.md's first block, in the same process: importing torch takes most of the time.
STEPS = """
import diffusers_pisdm
from diffusers_pisdm.commands.pisdm_cli import main
print(diffusers_pisdm.__file__)
images[0].save("readme.png")
main(["env"])
main(["sample", "--output_dir", "samples", "--num_samples", "2", "--num_inference_steps", "1"])
main(["cache-latents", "--cascade_config", "emoji64", "--train_data_dir", "nowhere", "--output_dir", "latents"])
"""


def run(*command, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=250
    )


def build(kind, source, target):
    target.mkdir()
    code = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    built = run(sys.executable, "-c", code, target, cwd=source)
    assert built.returncode == 0, built.stderr
    (file,) = target.iterdir()
    assert file.stat().st_size < LIMIT
    return file


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new environment: the wheel, and what the package needs from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "clone"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    with tarfile.open(build("sdist", source, folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("wheel", unpacked, folder / "dist")

    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel]
    installed = run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # A path in a .pth file is not searched for .pth files: this environment's editable install stays out of it.
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_index_page_needs_no_file_beside_it(python):
    (metadata,) = (python.parents[1]).glob("lib/python*/site-packages/diffusers_pisdm-*.dist-info")
    page = PathDistribution(metadata).read_text("METADATA")
    assert "(Picture: 64 unpicked samples" in page
    assert re.findall(r"<img|\]\((?!https?:)", page) == []


def test_readme_and_commands_run_anywhere(python, tmp_path):
    _, readme = python_blocks(ROOT / "README.md")[0]
    ran = run(python, "-c", readme + STEPS, cwd=tmp_path)
    assert str(python.parents[1]) in ran.stdout.splitlines()[0]
    with Image.open(tmp_path / "readme.png") as image:
        assert image.size == (128, 128) and len(image.getcolors(16384)) > 100
    assert "Checkpoint pisdm-emoji128: found" in ran.stdout
    assert "2 samples in samples" in ran.stdout and len(list((tmp_path / "samples").rglob("*.png"))) == 2
    assert ran.stderr.splitlines()[-1].startswith("error: The recipe has no `vae`")  # it found the recipe

    few = ["--classes", "noto/animal-bird", "--images_per_class", "1", "--num_inference_steps", "1"]
    drawn = run(python.with_name("pisdm"), "generate", *few, "--output_dir", "birds", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "Wrote birds: 1 image of 1 class at 128x128 pixels" in drawn.stdout
    (bird,) = (tmp_path / "birds").iterdir()
    assert read_recipe(bird)["model"] == "pisdm-emoji128"
