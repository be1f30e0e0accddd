"""
Fuzzing: damages files that users may receive or find on their disks, and reads them. A file loads, or the error is one
that the reader documents; nothing hangs, and a pipeline whose adapter failed to load is as it was.

    python -m tests.fuzz [--mutations 10000] [--seed 0] [--targets pipeline checkpoint lora recipe image]

Each mutation depends only on the seed, its target and its number; `--only N` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.commands.train import TrainingArguments
from diffusers_pisdm.data.image_transform import ImageTransform, decode_image
from diffusers_pisdm.training.checkpoints import CheckpointError, find_resume_point, read_state, save_checkpoint
from diffusers_pisdm.training.fine_tuning import add_lora
from diffusers_pisdm.training.recipes import read_recipe, recipe_arguments
from tests.pipelines.tiny_cascade import make_cascade


MAX_SECONDS = 10
IMAGES = Path(__file__).parent / "data" / "fluent3d"
STRANGE_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 10**6, 10**30, -(10**30), 0.5, -0.5, 1e308, math.nan, math.inf),
    *("", "a", "3", "\x00", "../../a", "ä" * 1000, "x" * 100_000, "(a+)+$", "[", "{}", "\ud800"),
    *([], {}, [[]], [None], [0] * 1000, {"a": {}}, [1, "a", None], {"0": "a", "1": "b"}),
)


@dataclass
class Target:
    """
    Args:
        folder (`Path`): A folder of sound files.
        read (`Callable[[Path], None]`): Reads a folder like it.
        errors (`tuple[type[Exception], ...]`): What it may raise.
        check (`Callable[[], None]`): Raises if a failed read has left something behind.
    """

    folder: Path
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    check: Callable[[], None] = lambda: None


class Hang(BaseException):
    """A read took too long."""


def mutate(content: bytes, is_json: bool, chance: random.Random) -> bytes:
    """Changes a file in one to three places."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if is_json and chance.random() < 0.8:
            with contextlib.suppress(ValueError, UnicodeDecodeError, RecursionError):
                content = mutate_json(json.loads(content), chance)
                continue
        content = mutate_bytes(content, chance)
    return content


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    # Headers say the most, so half of the changes are near the beginning.
    end = min(len(content), chance.choice((64, 2000, len(content), len(content))))
    place, length = chance.randrange(end + 1), chance.choice((1, 1, 2, 8, 100))
    kind = chance.randrange(6)
    if kind == 0:  # one bit
        changed = bytearray(content or b"\0")
        changed[place % len(changed)] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + content[place + length :]
    if kind == 3:
        return content[:place] + chance.randbytes(length) + content[place + length :]
    if kind == 4:
        return content[:place] + chance.randbytes(length) + content[place:]
    return content[:place] + content[place : place + 100] * chance.choice((2, 50)) + content[place + 100 :]


def mutate_json(content: Any, chance: random.Random) -> bytes:
    places = list(places_in(content))
    if not places:
        return json.dumps(chance.choice(STRANGE_VALUES)).encode()
    owner, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[chance.choice((key[:-1], key + "s", key.upper(), chance.choice(("", "_name_or_path", "a\n"))))] = (
            owner.pop(key)
        )
    elif kind == 2:
        other_owner, other_key = chance.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            owner[key] = json.loads(json.dumps(other_owner[other_key]))
    elif kind == 3 and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
        owner[key] = chance.choice((owner[key] + 1, owner[key] - 1, owner[key] * 2, -owner[key], owner[key] * 10**9))
    elif kind == 4:
        for _ in range(chance.choice((1, 50, 5000))):
            owner[key] = [owner[key]]
    else:
        owner[key] = chance.choice(STRANGE_VALUES)
    try:
        return json.dumps(content).encode()
    except RecursionError:
        return b"[" * 5000


def places_in(content: Any) -> Iterator[tuple[dict | list, Any]]:
    """All pairs of a container and a key in it."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from places_in(value)


def pipeline_target(folder: Path) -> Target:
    make_cascade(id2label={index: f"class {index}" for index in range(10)}).save_pretrained(folder)

    def read(damaged: Path) -> None:
        PISDMCascadePipeline.from_pretrained(damaged)

    return Target(folder, read, (OSError, ValueError, ImportError))  # schedulers may ask for a package


def checkpoint_target(folder: Path) -> Target:
    def write(checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").write_bytes(bytes(range(256)) * 4)

    accelerator = Accelerator(cpu=True)
    for step in (2, 4):
        state = {"run": 0, "identity": {"class 0": "a"}, "settings": {"seed": 0}, "processes": [{"data": {}}]}
        save_checkpoint(accelerator, folder, step, state, write)
    sound = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def read(damaged: Path) -> None:
        checkpoint, _ = find_resume_point(damaged, "latest", lambda message: None)
        if checkpoint is not None:  # then it is one of the two, unchanged
            state = read_state(checkpoint)
            for path, content in sound.items():
                if path.parent.name == checkpoint.name and path.name != "trainer_state.json":
                    assert (checkpoint / path.name).read_bytes() == content
            assert state == read_state(folder / checkpoint.name)

    return Target(folder, read, (CheckpointError, ValueError))


def lora_target(folder: Path) -> Target:
    trained, pipe = make_cascade(), make_cascade()
    for stage in trained.stages:
        add_lora(stage, 2, 2.0)
        torch.nn.init.normal_(next(p for name, p in stage.named_parameters() if "lora_B" in name))
    trained.save_lora_weights(folder)
    before = {name: tensor.clone() for name, tensor in state_of(pipe)}

    def read(damaged: Path) -> None:
        pipe.load_lora_weights(damaged, adapter_name="damaged")
        pipe.unload_lora_weights()

    def check() -> None:
        after = dict(state_of(pipe))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert pipe.get_list_adapters() == {}

    return Target(folder, read, (OSError, ValueError), check)


def state_of(pipe: PISDMCascadePipeline) -> Iterator[tuple[str, torch.Tensor]]:
    for number, stage in enumerate(pipe.stages):
        yield from ((f"{number}.{name}", tensor) for name, tensor in stage.state_dict().items())


def recipe_target(folder: Path) -> Target:
    recipes = Path(__file__).parents[1] / "examples" / "recipes"
    folder.mkdir()
    for recipe in ("emoji64.json", "imagenet256.json"):
        shutil.copy(recipes / recipe, folder)

    def read(damaged: Path) -> None:
        for file in damaged.iterdir():
            recipe = read_recipe(file)
            recipe_arguments(recipe, TrainingArguments)
            recipe.noise_schedule()
            with torch.device("meta"):
                for stage in recipe.stages:
                    PISDMTransformer2DModel(**stage)

    return Target(folder, read, (ValueError,))


def image_target(folder: Path) -> Target:
    folder.mkdir()
    image = decode_image(next(IMAGES.rglob("*.png")).read_bytes())
    for name, mode in (("a.png", "RGB"), ("b.jpg", "RGB"), ("c.webp", "RGBA"), ("d.gif", "P"), ("e.tif", "L")):
        image.convert(mode).save(folder / name)

    def read(damaged: Path) -> None:
        for file in damaged.iterdir():
            try:
                decoded = decode_image(file.read_bytes())
            except Exception:
                continue
            ImageTransform(32)(decoded, None)

    return Target(folder, read, ())


TARGETS = {
    "pipeline": pipeline_target,
    "checkpoint": checkpoint_target,
    "lora": lora_target,
    "recipe": recipe_target,
    "image": image_target,
}


def fuzz(name: str, numbers: range, seed: int) -> list[str]:
    """Reads damaged files; returns a report of each read that ended as none may."""
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        target = TARGETS[name](Path(temporary) / "sound")
        target.read(target.folder)
        target.check()
        files = sorted(path.relative_to(target.folder) for path in target.folder.rglob("*") if path.is_file())
        damaged = Path(temporary) / "damaged"
        for number in tqdm(numbers, desc=name, disable=None):
            chance = random.Random(f"{seed} {name} {number}")
            shutil.copytree(target.folder, damaged)
            path = damaged / chance.choice(files)
            path.write_bytes(mutate(path.read_bytes(), path.suffix == ".json", chance))
            report = run(target, damaged)
            if report is not None:
                failures.append(f"{name} --seed {seed} --only {number}, {path.relative_to(damaged)}: {report}")
            shutil.rmtree(damaged)
    return failures


def run(target: Target, damaged: Path) -> str | None:
    def hang(*args: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(MAX_SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(damaged)
    except target.errors:
        pass
    except Hang:
        return f"no end after {MAX_SECONDS} s"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
    finally:
        signal.alarm(0)
    try:
        target.check()
    except Exception as error:
        return f"left behind: {type(error).__name__}: {str(error)[:200]}"
    return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", type=int, help="only the mutation of this number")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    start, failures = time.monotonic(), []
    numbers = range(args.mutations // len(args.targets)) if args.only is None else range(args.only, args.only + 1)
    for name in args.targets:
        failures += fuzz(name, numbers, args.seed)
    kinds = {}  # one of each: they come in hundreds
    for failure in failures:
        kinds.setdefault(failure.split(": ", 1)[1], []).append(failure)
    for found in kinds.values():
        print(f"{len(found)} x {found[0]}")
    count = len(numbers) * len(args.targets)
    print(f"{count:,} mutations, {len(failures)} failures in {time.monotonic() - start:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
