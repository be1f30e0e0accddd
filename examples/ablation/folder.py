"""The folder of an ablation: what it is of, whose turn a run is, and what is done."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

from diffusers_pisdm.utils.files import write_whole

from .rows import AblationRow


class AblationError(ValueError):
    """Something the user has to fix; the message says how."""


class AblationFolder:
    """
    An ablation's output: `ablation.json` says what all runs have in common, and `VARIANT/seed-N/` is the folder of a
    run, whose outcome is its `result.json`. Any number of processes may work in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.conditions_file = self.path / "ablation.json"

    def claim(self, conditions: dict) -> None:
        """
        Makes the folder that of an ablation; raises AblationError if it holds runs under other conditions (all that
        decides the outcome besides row and seed, as JSON has it).
        """
        claim(self.conditions_file, conditions)

    def conditions(self) -> dict:
        """Those that the folder was claimed with; raises AblationError if it is not an ablation's."""
        if not self.conditions_file.exists():
            raise AblationError(f"{self.path} is not an ablation's folder: {self.conditions_file} does not exist.")
        return json.loads(self.conditions_file.read_text())

    def run(self, variant: str, seed: int) -> Path:
        """The folder of a run."""
        return self.path / variant / f"seed-{seed}"

    def is_done(self, variant: str, seed: int) -> bool:
        return (self.run(variant, seed) / "result.json").exists()

    def write_result(self, variant: str, seed: int, result: dict) -> None:
        """Adds a run's result to those of [`~AblationFolder.results`]."""
        content = {"variant": variant, "seed": seed, **result, "conditions": self.conditions()}
        self.write_json((self.run(variant, seed) / "result.json").relative_to(self.path), content)

    def results(self, rows: Sequence[AblationRow]) -> list[dict]:
        """
        `variant`, `seed` and what was written of each run of these rows that is done; raises AblationError if one was
        made under other conditions.
        """
        conditions, results = self.conditions(), []
        for row in rows:
            for file in sorted(self.path.glob(f"{row.variant}/seed-*/result.json")):
                results.append(json.loads(file.read_text()))
                changed = _differences(results[-1].pop("conditions"), conditions)
                if changed:
                    raise AblationError(
                        f"{file} does not belong to {self.conditions_file}: {'; '.join(changed)}. Remove its folder."
                    )
        return results

    def write_json(self, name: str | Path, content: dict) -> None:
        """Writes a file as a whole."""
        _write_json(self.path / name, content)

    def write(self, name: str | Path) -> AbstractContextManager[Path]:
        """[`write_whole`], by several processes at a time if need be: the last one's file stays."""
        return _write(self.path / name)


def claim(file: Path, conditions: dict) -> None:
    """
    Writes what all runs in `file`'s folder have in common, as JSON has it; raises AblationError if that is there and
    differs.
    """
    if not file.exists():
        _write_json(file, conditions)
    check_conditions(json.loads(file.read_text()), conditions, file.parent)


def check_conditions(found: dict, wanted: dict, place: Path) -> None:
    """Raises AblationError, which names what differs, if what is in a folder was made under other conditions."""
    changed = _differences(found, wanted)
    if changed:
        raise AblationError(
            f"{place} holds runs with other arguments: {'; '.join(changed)}. They would not be comparable: use the"
            " same arguments or another folder."
        )


def _write(file: Path) -> AbstractContextManager[Path]:
    return write_whole(file, f".{os.getpid()}.unfinished")


def _write_json(file: Path, content: dict) -> None:
    with _write(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def hold_lock(file: Path, wait: bool) -> Iterator[TextIO | None]:
    """
    Yields the lock's open file, or `None` if somebody else holds it and `wait` is false. The lock lasts until the
    block and every process that the file was passed to have ended: a killed process's child still keeps others away.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as lock:
        is_mine = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_mine = False
        yield lock if is_mine else None


def _differences(found: object, wanted: object, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        nested = (_differences(found.get(key), wanted.get(key), f"{name}.{key}") for key in keys)
        return [text for texts in nested for text in texts]
    return [] if found == wanted else [f"{name.removeprefix('.')} was {found!r}, is {wanted!r}"]
