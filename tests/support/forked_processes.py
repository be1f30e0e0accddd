"""Scripts in several processes, as `accelerate launch` starts them, but forked: importing takes most of the time."""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def start(main: Callable[[list[str]], None], arguments: list[str], num_processes: int = 2) -> list[int]:
    """Forks processes that run a script, in a group of their own if there are several, and returns their ids."""
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
                main(arguments)
                code = 0
            except SystemExit as stop:  # as Python ends a process
                if isinstance(stop.code, str):
                    print(stop.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def finish(children: list[int]) -> None:
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        sys.exit(f"processes ended with statuses {statuses}")
