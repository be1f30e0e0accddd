#!/usr/bin/env python
"""`pisdm publish` as a script; `--help` tells the rest.

python examples/publish.py outputs/emoji64 owner/name --license apache-2.0 --dry_run
"""

from pisdm_command import run_script


if __name__ == "__main__":
    run_script("publish")
