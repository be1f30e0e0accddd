#!/usr/bin/env python
"""`pisdm convert-dim` as a script; `--help` tells the rest.

python examples/convert_dim.py nnet_ema.pth --output_dir dim-huge-256 --vae stabilityai/sd-vae-ft-ema
"""

from pisdm_command import run_script


if __name__ == "__main__":
    run_script("convert_dim")
