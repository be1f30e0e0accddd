#!/usr/bin/env python
"""`pisdm cache-latents` as a script, for `accelerate launch`; `--help` tells the rest.

accelerate launch examples/cache_latents.py --cascade_config imagenet256 --train_data_dir images --output_dir latents
"""

from pisdm_command import run_script


if __name__ == "__main__":
    run_script("cache_latents")
