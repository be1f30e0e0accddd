#!/usr/bin/env python
"""`pisdm convert-dim` as a script; `--help` tells the rest.

python examples/convert_dim.py nnet_ema.pth --output_dir dim-huge-256 --vae stabilityai/sd-vae-ft-ema
"""

from diffusers_pisdm.commands.convert_dim import main


if __name__ == "__main__":
    main()
