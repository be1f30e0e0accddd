"""examples/evaluate.py in two processes, as `accelerate launch` starts them.

evaluate_in_processes.py ARGUMENTS...

One interpreter imports everything and forks, since importing takes longer than all else. It knows a network
"pixels".
"""

import os
import socket
import sys
import traceback

from diffusers_pisdm.evaluation import register_feature_extractor
from examples import evaluate
from tests.evaluation.pixel_features import PixelFeatures


NUM_PROCESSES = 2


if __name__ == "__main__":
    register_feature_extractor("pixels", PixelFeatures)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = {"WORLD_SIZE": NUM_PROCESSES, "LOCAL_WORLD_SIZE": NUM_PROCESSES, "MASTER_PORT": free.getsockname()[1]}
    children = []
    for rank in range(NUM_PROCESSES):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                places |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
                os.environ.update({name: str(value) for name, value in places.items()})
                evaluate.main(sys.argv[1:])
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(ends))
