#!/usr/bin/env python
"""`pisdm sample` as a script, for `accelerate launch`; `--help` tells the rest.

accelerate launch examples/sample.py --output_dir samples --num_samples 5000
"""

from diffusers_pisdm.commands.sample import main


if __name__ == "__main__":
    main()
