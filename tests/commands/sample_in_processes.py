"""`pisdm sample` in two processes: killed, run again, and in one process.

sample_in_processes.py MODEL FOLDER
"""

import os
import signal
import sys
import time
from pathlib import Path

from diffusers_pisdm.commands import sample
from tests.support.forked_processes import finish, start


NUM_PROCESSES = 2


if __name__ == "__main__":
    model, folder = sys.argv[1:]
    arguments = ["--model", model, "--num_samples", "20", "--batch_size", "2", "--num_inference_steps", "2"]
    killed = Path(folder, "killed")

    children = start(sample.main, [*arguments, "--output_dir", str(killed)], NUM_PROCESSES)
    while len(list(killed.rglob("*.png"))) < 5:
        if os.waitpid(children[0], os.WNOHANG) != (0, 0):
            sys.exit("a process ended too early")
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(f"left {len(list(killed.rglob('*.png')))}", flush=True)

    finish(
        start(
            sample.main, [*arguments, "--output_dir", str(killed), "--save_npz", f"{folder}/killed.npz"], NUM_PROCESSES
        )
    )
    finish(start(sample.main, [*arguments, "--output_dir", f"{folder}/one", "--save_npz", f"{folder}/one.npz"], 1))
