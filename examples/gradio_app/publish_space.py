"""Publishes the page as a Space on the Hugging Face Hub, with this clone's package as a wheel beside it.

    hf auth login
    python examples/gradio_app/publish_space.py your-name/pisdm

The package is on no index, and a Space installs its requirements before it sees its files, so requirements.txt names
the wheel by its address in the Space: the Space has to be public.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants

from diffusers_pisdm.publishing.hub import check_login, check_repo_id, plain_errors


HERE = Path(__file__).parent


def prepare_space(repo_id: str, folder: Path) -> None:
    """Writes a Space's files: the page, its front matter, the package's wheel and the requirements that name it."""
    clone, leftover = HERE.parents[1], HERE.parents[1] / "build"
    was_there = leftover.exists()
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, clone]
    subprocess.run(build, check=True)
    if not was_there:
        shutil.rmtree(leftover, ignore_errors=True)
    (wheel,) = folder.glob("*.whl")
    for name in ("app.py", "README.md"):
        (folder / name).write_bytes((HERE / name).read_bytes())
    address = f"{constants.ENDPOINT}/spaces/{repo_id}/resolve/main/{wheel.name}"
    requirement = (HERE / "requirements.txt").read_text(encoding="utf-8").strip()
    (folder / "requirements.txt").write_text(f"{requirement} @ {address}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", metavar="owner/name", help="The Space; created if needed.")
    args = parser.parse_args(arguments)
    try:
        check_repo_id(args.repo_id)
        check_login(args.repo_id)
        with tempfile.TemporaryDirectory() as folder:
            prepare_space(args.repo_id, Path(folder))
            api = HfApi(token=True)
            with plain_errors(args.repo_id):
                api.create_repo(args.repo_id, repo_type="space", space_sdk="gradio", private=False, exist_ok=True)
                api.upload_folder(repo_id=args.repo_id, repo_type="space", folder_path=folder)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    print(f"Published {constants.ENDPOINT}/spaces/{args.repo_id}: it builds for some minutes.")


if __name__ == "__main__":
    main()
