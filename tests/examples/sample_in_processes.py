"""examples/sample.py in several processes, as `accelerate launch` starts them: killed, run again, and in one process.

sample_in_processes.py MODEL FOLDER

One interpreter imports everything and forks, since importing takes longer than all else.
"""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from examples import sample


NUM_PROCESSES = 2


def start(arguments: list[str], num_processes: int) -> list[int]:
    """Forks processes that run the script, in a group of their own if there are several, and returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if num_processes > 1:
                    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in places.items()})
                    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(num_processes))
                sample.main(arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def finish(children: list[int]) -> None:
    for child in children:
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"a process ended with status {status}")


if __name__ == "__main__":
    model, folder = sys.argv[1:]
    arguments = ["--model", model, "--num_samples", "20", "--batch_size", "2", "--num_inference_steps", "2"]
    killed = Path(folder, "killed")

    children = start([*arguments, "--output_dir", str(killed)], NUM_PROCESSES)
    while len(list(killed.rglob("*.png"))) < 5:
        if os.waitpid(children[0], os.WNOHANG) != (0, 0):
            sys.exit("a process ended too early")
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(f"left {len(list(killed.rglob('*.png')))}", flush=True)

    finish(start([*arguments, "--output_dir", str(killed), "--save_npz", f"{folder}/killed.npz"], NUM_PROCESSES))
    finish(start([*arguments, "--output_dir", f"{folder}/one", "--save_npz", f"{folder}/one.npz"], 1))
