#!/usr/bin/env python
"""`pisdm train` as a script, for `accelerate launch`; `--help` tells the rest.

accelerate launch examples/train_pisdm.py --cascade_config emoji64 --train_data_dir data/emoji64 --output_dir out
"""

from pisdm_command import run_script


if __name__ == "__main__":
    run_script("train")
