"""The talk behind `hf-efficient generate MODEL --interactive`: a line from the user, a line from the model."""

import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..generation import Conversation
from .errors import CommandError

COMMANDS = {"/reset": "forgets what was said", "/quit": "ends the talk"}
GREETING = "Write a line; " + ", ".join(f"{name} {meaning}" for name, meaning in COMMANDS.items()) + "."

# What Meena decodes with (Adiwardana et al. 2020), where the user says nothing else.
SAMPLING = {"temperature": 0.88, "top_k": 0, "top_p": 1.0, "max_new_tokens": 64}


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Any, depth: dict[str, Any]) -> None:
    """Answer each line of the standard input until it ends or says /quit.

    options: the flags of `hf-efficient generate`. depth: further arguments of every call of the model.

    A terminal gets a prompt and line editing; from a pipe each line is read as it stands, and the answers alone are
    printed. Ctrl-C while the model answers takes the line back, at the prompt it ends the talk.
    Raises CommandError for flags that mean nothing in a talk.
    """
    check_options(options)
    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    conversation = Conversation(
        model,
        tokenizer,
        max_turns=options.max_turns,
        num_samples=options.num_samples,
        **SAMPLING | given,
        **depth,
    )
    set_seed(options.seed)
    if sys.stdin.isatty():
        print(GREETING)
    for line in read_lines():
        if line.startswith("/"):
            if line == "/quit":
                return
            print(obey(line, conversation))
        elif line:
            print(answer(line, conversation), flush=True)


def check_options(options: Any) -> None:
    """Raises CommandError for flags that contradict a talk."""
    for name in ("prompt", "greedy"):
        if getattr(options, name):
            raise CommandError(f"--{name} and --interactive contradict each other; leave one out.")
    if options.num_texts != 1:
        raise CommandError(f"--num_texts {options.num_texts} is not for --interactive, which gives one answer a line.")


def read_lines() -> Iterator[str]:
    """What the user writes, line by line, until the end of the input or Ctrl-C at the prompt."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line and not sys.stdin.isatty():
            return
        yield line.strip()


def obey(command: str, conversation: Conversation) -> str:
    """Carry out a line that begins with a slash; returns what to print."""
    if command != "/reset":
        return f"There is no '{command}'. {GREETING}"
    conversation.reset()
    return "Forgotten."


def answer(line: str, conversation: Conversation) -> str:
    """The model's answer, or why there is none."""
    try:
        return conversation.reply(line) or "(no words)"
    except KeyboardInterrupt:
        return "Stopped; your line was taken back."
    except ValueError as error:
        return f"No answer: {error}"
