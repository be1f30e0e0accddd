"""The `pisdm` command; `pisdm_command.py` runs this file alone, so it imports the package only to run a command."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import re
import sys
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1]
# By name, with the extra that installs what a command needs beyond the package's own requirements.
COMMANDS = {
    "generate": None,
    "app": "gradio",
    "check-data": "train",
    "new-recipe": "train",
    "train": "train",
    "cache-latents": "train",
    "sample": None,
    "evaluate": "evaluate",
    "publish": None,
    "convert-dim": None,
    "env": None,
}


def summary(command: str) -> str:
    """The first line of a command's docstring, read without importing the command."""
    source = Path(__file__).with_name(f"{module_name(command)}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def module_name(command: str) -> str:
    return command.replace("-", "_")


def make_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="pisdm",
        usage="pisdm COMMAND ...",
        description="Draws, trains, evaluates and publishes PIS-DM cascades.",
        epilog="commands:\n"
        + "\n".join(f"  {command:<{width}}  {summary(command)}" for command in COMMANDS)
        + "\n\n`pisdm COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"))[1]
    parser.add_argument("--version", action="version", help="Print the version.", version=f"pisdm {version}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def check_command(parser: argparse.ArgumentParser, word: str) -> None:
    """Ends with a sentence for what is no command of ours, and with the help for the word "help"."""
    if word == "help":
        parser.print_help()
        sys.exit()
    if word in COMMANDS or word in parser._option_string_actions:
        return
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    parser.error(
        f"there is no {'option' if word.startswith('-') else 'command'} {word!r}."
        f"{f' Did you mean {near[0]}?' if near else ''} `pisdm --help` lists the commands."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        sys.exit(2)
    check_command(parser, (sys.argv[1:] if arguments is None else arguments)[0])
    parsed = parser.parse_args(arguments)
    command = parsed.command
    sys.argv = [f"pisdm {command}", *parsed.arguments]  # argparse takes a command's name from here
    try:
        importlib.import_module(f"{PACKAGE.name}.commands.{module_name(command)}").main()
    except ModuleNotFoundError as error:
        extra, module = COMMANDS[command], error.name or ""
        if extra is None or module.startswith(PACKAGE.name):
            raise
        install_command = importlib.import_module(f"{PACKAGE.name}.utils.shipped_files").install_command
        sys.exit(f"error: `pisdm {command}` needs {module}, which is not installed: {install_command(extra)}")
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports it


if __name__ == "__main__":
    main()
