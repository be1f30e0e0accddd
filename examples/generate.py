#!/usr/bin/env python
"""`pisdm generate` as a script; `--help` tells the rest.

python examples/generate.py --classes noto/animal-bird 207 --output grid.png
"""

from diffusers_pisdm.commands.generate import main


if __name__ == "__main__":
    main()
