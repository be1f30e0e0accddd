#!/usr/bin/env python
"""`pisdm sample` as a script, for `accelerate launch`; `--help` tells the rest.

accelerate launch examples/sample.py --output_dir samples --num_samples 5000
"""

from pisdm_command import run_script


if __name__ == "__main__":
    run_script("sample")
