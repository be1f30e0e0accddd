"""Draws the orders in which the model's layers read the tokens of an image.

The documentation's pictures:
    python examples/draw_scan_paths.py --output docs/images/scan_paths.png
    python examples/draw_scan_paths.py --snake --output docs/images/scan_paths_snake.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers_pisdm.ops import SCAN_DIRECTIONS, draw_scan_paths
from diffusers_pisdm.utils.arguments import COUNT, COUNT_OR_ZERO


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw scan paths.")
    parser.add_argument("--height", type=COUNT, default=5, help="rows of tokens")
    parser.add_argument("--width", type=COUNT, default=5, help="columns of tokens")
    parser.add_argument("--directions", nargs="+", choices=SCAN_DIRECTIONS, default=SCAN_DIRECTIONS, metavar="NAME")
    parser.add_argument("--snake", action="store_true", help="scan every second line backwards")
    parser.add_argument("--num_padding_tokens", type=COUNT_OR_ZERO, default=1, help="tokens at the end of every line")
    parser.add_argument("--cell_size", type=COUNT, default=24, help="side of a token in pixels")
    parser.add_argument("--output", type=Path, default=Path("scan_paths.png"), help="the picture to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    picture = draw_scan_paths(
        args.height, args.width, tuple(args.directions), args.snake, args.num_padding_tokens, args.cell_size
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output, optimize=True)
    print(f"Drew {len(args.directions)} scan paths of a {args.height} x {args.width} grid: {args.output}")


if __name__ == "__main__":
    main()
