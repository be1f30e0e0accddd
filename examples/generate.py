#!/usr/bin/env python
"""`pisdm generate` as a script; `--help` tells the rest.

python examples/generate.py --classes noto/animal-bird 207 --output grid.png
"""

from pisdm_command import run_script


if __name__ == "__main__":
    run_script("generate")
