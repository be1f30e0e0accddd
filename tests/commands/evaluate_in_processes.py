"""`pisdm evaluate` in two processes, with a network "pixels".

evaluate_in_processes.py ARGUMENTS...
"""

import sys

from diffusers_pisdm.commands import evaluate
from diffusers_pisdm.evaluation import register_feature_extractor
from tests.evaluation.pixel_features import PixelFeatures
from tests.support.forked_processes import finish, start


if __name__ == "__main__":
    register_feature_extractor("pixels", PixelFeatures)
    finish(start(evaluate.main, sys.argv[1:], num_processes=2))
