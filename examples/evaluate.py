#!/usr/bin/env python
"""`pisdm evaluate` as a script, for `accelerate launch`; `--help` tells the rest.

accelerate launch examples/evaluate.py --model outputs/emoji64 --reference data/emoji64
"""

from pisdm_command import run_script


if __name__ == "__main__":
    run_script("evaluate")
