"""
Many people on the page at once: how long they wait, how many are refused, and whether memory grows.

    python benchmarks/app_load.py --clients 20 --seconds 120
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from gradio_client import Client


PATIENCE = 120  # seconds for the page to start


@contextmanager
def serve(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """The page of a model in a process of its own, at a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "diffusers_pisdm.commands.pisdm_cli",
        "app",
        "--model",
        model,
        "--port",
        str(port),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and server.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            else:
                raise TimeoutError(f"The page did not start: {' '.join(command)}")
            yield f"http://127.0.0.1:{port}", psutil.Process(server.pid)
        finally:
            server.terminate()


def visit(url: str, number: int, end: float, steps: list[int], waits: list[float], errors: list[str]) -> None:
    """Draws one picture after another until the time is up, as a visitor of its own."""
    try:
        client = Client(url, verbose=False)
        labels = client.predict("", api_name="/classes")
        while time.monotonic() < end:
            start = time.monotonic()
            seed = len(waits)
            (file,) = client.predict(
                [labels[number % len(labels)]], 1, seed, num_inference_steps=steps, api_name="/generate"
            )
            if not file.endswith(".png"):
                raise ValueError(f"got {file}")
            waits.append(time.monotonic() - start)
    except Exception as error:  # whatever a visitor may see is what is counted
        errors.append(f"{type(error).__name__}: {error}")


def measure(model: str, num_clients: int, seconds: float, steps_per_stage: int) -> dict[str, float | int | list]:
    """Lets clients draw for some time; returns what they saw, and the server's memory in MB at each quarter."""
    waits: list[float] = []
    errors: list[str] = []
    memory = []
    with serve(model) as (url, server):
        steps = [steps_per_stage] * len(Client(url, verbose=False).predict(api_name="/stages"))
        end = time.monotonic() + seconds
        arguments = [(url, number, end, steps, waits, errors) for number in range(num_clients)]
        threads = [threading.Thread(target=visit, args=values) for values in arguments]
        for thread in threads:
            thread.start()
        for _ in range(4):
            time.sleep(seconds / 4)
            memory.append(round(server.memory_info().rss / 1e6))
        for thread in threads:
            thread.join()
    waits.sort()
    return {
        "clients": num_clients,
        "seconds": seconds,
        "drawn": len(waits),
        "errors": errors,
        "median_wait_s": round(statistics.median(waits), 2) if waits else None,
        "longest_wait_s": round(waits[-1], 2) if waits else None,
        "memory_mb": memory,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", default="pisdm-emoji128")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--steps_per_stage", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Also write the figures into this file.")
    args = parser.parse_args(arguments)
    result = measure(args.model, args.clients, args.seconds, args.steps_per_stage)
    print(json.dumps(result, indent=2))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if result["errors"] or not result["drawn"]:
        sys.exit("error: some clients were refused" if result["errors"] else "error: nothing was drawn")


if __name__ == "__main__":
    main()
