"""
Processes of their own that start at once: forked from a server that has imported the package, which takes most of the
time of processes as short as those of tests.

The server keeps what libraries read from the environment at import, such as the Hub's address, as it first was.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


SECONDS = 250  # more would be a hang
IMPORTED = [f"diffusers_pisdm.commands.{name}" for name in ("evaluate", "sample", "train")]


def _run(
    main: Callable[[list[str]], None], arguments: list[str], environment: dict[str, str], outputs: tuple[str, str]
) -> None:
    os.setsid()  # what it starts can be killed with it
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # as for the tests: bits depend on it
    for stream, path in zip((sys.stdout, sys.stderr), outputs):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    main(arguments)


class Process:
    """
    Runs a command in a session of its own, one thread, and with its output in files.

    Args:
        main (`Callable[[list[str]], None]`): The command, a function that can be imported.
        arguments (`Sequence[str]`): For `main`.
        environment (`Mapping[str, str]`, *optional*): Added to this process's.
    """

    def __init__(
        self,
        main: Callable[[list[str]], None],
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = tuple(str(Path(self._folder.name, name)) for name in ("stdout", "stderr"))
        environment = {**os.environ, **(environment or {})}
        self._process = context.Process(target=_run, args=(main, list(arguments), environment, self._outputs))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code; `None` if it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """Waits for the end and returns the exit code, negative after a signal."""
        self._process.join(SECONDS)
        assert self.poll() is not None, f"{self.pid} still runs: {self.said}"
        return self.poll()

    def wait_for(self, found: Callable[[], object]) -> None:
        """Waits until `found()` is true, and fails if the process ends before."""
        end = time.monotonic() + SECONDS
        while not found():
            assert self.poll() is None, self.said
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it and what it has started."""
        os.killpg(self.pid, 9)
        self.wait()

    def _read(self, output: str) -> str:
        return Path(output).read_text() if Path(output).exists() else ""

    @property
    def stdout(self) -> str:
        return self._read(self._outputs[0])

    @property
    def stderr(self) -> str:
        return self._read(self._outputs[1])

    @property
    def said(self) -> str:
        """All of its output."""
        return self.stdout + self.stderr


def start_ranks(main: Callable[[list[str]], None], arguments: Sequence[str], num_processes: int = 2) -> list[Process]:
    """The processes of a distributed command on the CPU, as `accelerate launch` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return [Process(main, arguments, place | rank) for rank in ranks]


def run_ranks(main: Callable[[list[str]], None], arguments: Sequence[str], num_processes: int = 2) -> list[Process]:
    """The same, ended without an error."""
    processes = start_ranks(main, arguments, num_processes)
    for process in processes:
        assert process.wait() == 0, process.said
    return processes
