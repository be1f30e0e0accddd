"""`pisdm train` in two processes, without a launcher.

train_in_processes.py ARGUMENTS...
"""

import sys

from diffusers_pisdm.commands import train
from tests.support.forked_processes import finish, start


if __name__ == "__main__":
    finish(start(train.main, sys.argv[1:]))
