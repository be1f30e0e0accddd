#!/usr/bin/env python
"""`pisdm evaluate` as a script, for `accelerate launch`; `--help` tells the rest.

accelerate launch examples/evaluate.py --model outputs/emoji64 --reference data/emoji64
"""

from diffusers_pisdm.commands.evaluate import main


if __name__ == "__main__":
    main()
