"""Opens a page in the browser to draw images on: a Gradio app."""

from __future__ import annotations

import sys

from ..utils.arguments import Bounds, CommandParser, bounded
from .drawing import MODEL_HELP


PORT = bounded(int, Bounds(minimum=1, maximum=65535))


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", help=f"{MODEL_HELP}. Default: $PISDM_MODEL, else the checkpoint.")
    add("--host", default="127.0.0.1", help="The address to serve; 0.0.0.0 lets other machines in.")
    add("--port", type=PORT, default=7860)
    add("--share", action="store_true", help="Also make a public link, through Gradio's servers.")
    args = parser.parse_args(arguments)

    from ..app import launch  # needs gradio

    try:
        launch(args.model, host=args.host, port=args.port, share=args.share)
    except (OSError, ValueError) as error:  # a busy port, a model that is none
        sys.exit(f"error: {error}")
