"""`hf-efficient COMMAND ...`, also `python -m hf_efficient.cli COMMAND ...`."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .errors import USER_ERRORS, one_sentence, unknown_name

# Each is a module of this package that holds `COMMAND`; only the one asked for is imported.
COMMANDS = {
    "train": "Train a model on your text, or from a recipe.",
    "evaluate": "Measure a saved model on text: loss, perplexity, bits per byte, BLEU.",
    "generate": "Continue a prompt with a saved model, translate it, or talk.",
    "convert": "Turn a checkpoint of an earlier release into one that loads here.",
    "publish": "Upload a model with its card, and its code if you like, to the Hugging Face Hub.",
    "demo": "Train, evaluate, save, reload and generate, in a few minutes on a CPU.",
}

HELP = """\
hf-efficient: Transformers for long texts, from text to a model that generates.

Usage:
  hf-efficient COMMAND [RECIPE.yaml] [--flag value ...]

Commands:
{commands}

Start here:
  hf-efficient demo                                          see it all work, no download
  hf-efficient train --text my.txt --output_dir runs/mine    train on your own text
  hf-efficient generate runs/mine "Once upon a time"         and let it write

`hf-efficient COMMAND --help` explains a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0; 1 if what it prints is no longer read; 2 for a mistake that the user can mend, with one
    line on stderr that says how; 130 when interrupted. The environment variable HF_EFFICIENT_TRACEBACK=1 shows where
    an error came from instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get("HF_EFFICIENT_TRACEBACK") == "1":
        return run(arguments)
    try:
        code = run(arguments)
        sys.stdout.flush()  # a reader that has gone is noticed here, not when Python ends
        return code
    except BrokenPipeError:
        # Nobody reads on, as behind `| head`. What is still to be written would raise again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        print(f"hf-efficient: {one_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = (
            " The same command with --resume goes on from the last checkpoint." if arguments[:1] == ["train"] else ""
        )
        print(f"hf-efficient: interrupted.{hint}", file=sys.stderr)
        return 130


def run(arguments: list[str]) -> int:
    """`main` without the translation of errors into messages."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())), end="")
        return 0
    if name == "--version":
        print(f"hf-efficient {__version__}")
        return 0
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS, see="hf-efficient --help")

    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from .arguments import CommandParser

    disable_progress_bar()  # of weights that take a second to load; Trainer's own bar stays
    enable_progress_bars()  # of downloads, which the line above turns off too
    command = import_module(f".{name}", package=__package__).COMMAND
    parser = CommandParser(command.for_arguments(arguments[1:]))
    if {"-h", "--help", "--help-all"} & set(arguments[1:]):
        print(parser.format_help(everything="--help-all" in arguments), end="")
        return 0
    parser.command.run(parser.read(arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
