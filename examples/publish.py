#!/usr/bin/env python
"""`pisdm publish` as a script; `--help` tells the rest.

python examples/publish.py outputs/emoji64 owner/name --license apache-2.0 --dry_run
"""

from diffusers_pisdm.commands.publish import main


if __name__ == "__main__":
    main()
