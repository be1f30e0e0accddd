import gc
import os
from pathlib import Path

import pytest
import torch

from tests.support.browser import browser  # noqa: F401  (a fixture: one browser for a whole session)


# Triton reads this at import and then runs its kernels on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes share the cores: more threads would only wait for each other. Thread tests set their own number.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start


# Files that take longest go first: if one began last, a process would run it while the others have nothing to do.
LONG = """
app/test_page test_readme commands/training/test_train_processes ops/scan/test_triton_operator publishing/test_hub
test_wheel commands/training/test_train_uses commands/test_new_recipe commands/test_evaluate
commands/training/test_train_faults commands/training/test_train_arguments models/dim/test_transformer_dim
examples/test_train_on_device training/cost/test_stage_cost models/test_transformer_pisdm_compile test_docs
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Needs `--no-loadscope-reorder`: otherwise pytest-xdist starts with the files that have the most tests."""
    places = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what imports made is not searched again and again: accelerate collects after each training


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries complain of objects that outlive the interpreter


REAL_IMAGES = Path(__file__).parent / "data" / "fluent3d"


@pytest.fixture(scope="session")
def real_image_dir() -> Path:
    """Real 64x64 pictures (Fluent 3D emoji), one folder per class."""
    return REAL_IMAGES


@pytest.fixture(scope="session")
def real_image_files() -> list[Path]:
    return sorted(REAL_IMAGES.glob("*/*.png"))


@pytest.fixture(scope="session")
def real_images(real_image_files) -> torch.Tensor:
    """The same pictures as a tensor of shape (B, 3, 64, 64) in [-1, 1]."""
    import numpy as np
    from PIL import Image

    pixels = []
    for file in real_image_files:
        with Image.open(file) as image:
            pixels.append(np.array(image.convert("RGB")))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
