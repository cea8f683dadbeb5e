"""From a command line, or a YAML recipe with overrides, to checked option objects.

    hf-efficient train recipe.yaml --max_steps 10 --model.mem_len 128

A recipe becomes flags in front of the typed ones, so both go through one parser and a typed flag wins. Settings of
the model are flags with a dot; they are collected apart because the architecture, not the parser, knows their names.
"""

import argparse
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .errors import CommandError, unknown_name
from .recipes import RECIPE_SUFFIXES, parse_value, read_recipe, recipe_to_flags

MODEL_PREFIX = "--model."
# argparse names a flag by all its spellings: --dry_run/--dry-run.
SPELLINGS = re.compile(r"^(--\w+)(?:/--[\w-]+)+")


@dataclass(frozen=True)
class Command:
    """One sub-command of `hf-efficient`.

    options: dataclasses whose fields become flags. The first is ours and shown whole by `--help`.
    shown: fields of the other dataclasses that `--help` shows too, with a text for newcomers; `--help-all` shows all.
    positionals: fields of the first dataclass that may be given without their flag, in this order.
    model_settings: what `--model.KEY VALUE` may set, for the help page: for each kind of model the names, with their
        meaning and default. None if the command takes no such flags.
    variant: from the arguments to the command that understands them, for a command whose flags depend on one of them.
    """

    name: str
    description: str
    usage: str
    examples: str
    options: tuple[type, ...]
    run: Callable[["Invocation"], None]
    shown: dict[str, str] = field(default_factory=dict)
    positionals: tuple[str, ...] = ()
    model_settings: Callable[[], dict[str, dict[str, tuple[str, Any]]]] | None = None
    variant: Callable[[Sequence[str]], "Command"] | None = None

    def for_arguments(self, arguments: Sequence[str]) -> "Command":
        """The command that understands `arguments`: this one, unless it says otherwise."""
        return self if self.variant is None else self.variant(arguments)


@dataclass(frozen=True)
class Invocation:
    """What the user asked for.

    options: one object per dataclass of the command. model_settings: the `--model.` flags, by name.
    given: every setting named in the recipe or on the command line, as it was read (the rest are defaults).
    command_line: what was typed.
    """

    options: tuple[Any, ...]
    model_settings: dict[str, Any]
    given: dict[str, Any]
    command_line: str


class CommandParser(HfArgumentParser):
    """`HfArgumentParser` that raises `CommandError` with the mend, and whose help shows what a newcomer needs."""

    def __init__(self, command: Command):
        super().__init__(
            command.options,
            prog=f"hf-efficient {command.name}",
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.command = command
        for action in self._actions:
            action.type = OUR_TYPES.get(action.type, action.type)
            text = command.shown.get(action.dest, action.help or "")
            action.help = help_text(text, "" if action.nargs == 0 else action.default)
            action.default = argparse.SUPPRESS  # the dataclasses hold the defaults; a parse yields what was given

    @property
    def names(self) -> list[str]:
        """All settings, as flags and recipes spell them."""
        own = [field.name for options in self.command.options for field in fields(options) if field.init]
        kinds = self.command.model_settings() if self.command.model_settings else {}
        return own + [f"model.{name}" for settings in kinds.values() for name in settings]

    def read(self, arguments: Sequence[str]) -> Invocation:
        """Parse `arguments` (without the name of the command). Raises CommandError for anything the user got wrong."""
        command = self.command.for_arguments(arguments)
        if command is not self.command:
            return CommandParser(command).read(arguments)
        recipe, typed = self._split_positionals(list(arguments))
        recipe_flags = self._recipe_flags(recipe) if recipe else []
        flags, model_settings = self._split_model_settings(recipe_flags + typed)
        given = self._parse(flags)
        try:
            options = self.parse_dict(given)
        except (ValueError, TypeError) as error:  # a dataclass that checks itself
            raise CommandError(f"{error} (`{self.prog} --help-all` explains the flags).") from error
        return Invocation(options, model_settings, given, shlex.join([*self.prog.split(), *arguments]))

    def error(self, message: str) -> NoReturn:
        """What argparse calls when a value is wrong; `message` names the argument and the value."""
        message = SPELLINGS.sub(r"\1", message.removeprefix("argument "))
        raise CommandError(f"{message} (`{self.prog} --help` explains the flags).")

    def _split_positionals(self, arguments: list[str]) -> tuple[Path | None, list[str]]:
        """Take a leading recipe away and give the command's other leading words their flags."""
        count = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
        words, rest = arguments[:count], arguments[count:]
        recipe = Path(words.pop(0)) if words and words[0].endswith(RECIPE_SUFFIXES) else None
        if len(words) > len(self.command.positionals):
            extra = words[len(self.command.positionals)]
            raise CommandError(f"unexpected argument '{extra}'; the command reads `{self.command.usage}`.")
        return recipe, [f"--{name}={word}" for name, word in zip(self.command.positionals, words, strict=False)] + rest

    def _recipe_flags(self, path: Path) -> list[str]:
        """The recipe as flags, each checked, so that an error can name the file."""
        settings = read_recipe(path)
        known = [*self.names, "model"] if self.command.model_settings else self.names
        try:
            for name in settings:
                if name not in known:
                    raise unknown_name("recipe key", str(name), known, f"{self.prog} --help-all")
            if self.command.model_settings and not isinstance(settings.get("model", {}), dict):
                raise CommandError(
                    f"model is '{settings['model']}'; write a mapping such as `model: {{mem_len: 128}}`."
                )
            flags = recipe_to_flags(settings)
            self._parse(self._split_model_settings(flags)[0])
        except CommandError as error:
            raise CommandError(f"recipe '{path}': {error}") from error
        return flags

    def _split_model_settings(self, flags: list[str]) -> tuple[list[str], dict[str, Any]]:
        """Separate `--model.KEY VALUE` and `--model.KEY=VALUE` from the flags that the parser knows."""
        others, settings = [], {}
        words = iter(flags)
        for word in words:
            if not (word.startswith(MODEL_PREFIX) and self.command.model_settings):
                others.append(word)
                continue
            name, equals, behind = word.removeprefix(MODEL_PREFIX).partition("=")
            text = behind if equals else next(words, None)
            if text is None:
                raise CommandError(f"{word} has no value; write `{word} VALUE`.")
            settings[name.replace("-", "_")] = parse_value(text)
        return others, settings

    def _parse(self, flags: list[str]) -> dict[str, Any]:
        """The settings that `flags` give, by name. What argparse leaves over was misspelt."""
        namespace, unknown = self.parse_known_args(flags)
        for word in unknown:
            if word.startswith("--"):
                raise unknown_name("flag", word.partition("=")[0], self.names, f"{self.prog} --help-all")
            raise CommandError(f"unexpected argument '{word}'; the command reads `{self.command.usage}`.")
        return vars(namespace)

    def format_help(self, everything: bool = False) -> str:
        """The help page; `everything` adds the settings of transformers' Trainer that few runs need."""
        command = self.command
        by_name = {action.dest: action for action in reversed(self._actions)}
        others = [field.name for field in fields(command.options[0]) if field.name not in command.positionals]
        ours = [by_name.pop(name) for name in (*command.positionals, *others)]
        common = [by_name.pop(name) for name in command.shown]
        sections = {"Options": ours, "Options of the training": common}
        for kind, settings in (command.model_settings() if command.model_settings else {}).items():
            sections[f"Settings of a {kind} model"] = [
                argparse.Action([MODEL_PREFIX + name], name, help=help_text(text, default), metavar="VALUE")
                for name, (text, default) in settings.items()
            ]
        if everything:
            sections["Further options of transformers' Trainer"] = list(by_name.values())

        formatter = self._get_formatter()
        formatter.add_text(textwrap.fill(command.description, formatter.width))
        formatter.add_usage(command.usage, [], [], prefix="Usage:\n  ")
        formatter.add_text("Examples:\n" + command.examples)
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if by_name and not everything:
            formatter.add_text(f"{self.prog} --help-all also shows what few runs need ({len(by_name)} options).")
        return formatter.format_help()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling for each flag, types as placeholders, and a default only where it tells something."""

    PLACEHOLDERS = {"whole_number": "N", "number": "X", "truth": "true|false"}

    def __init__(self, prog: str):
        width = min(110, shutil.get_terminal_size((100, 24)).columns)
        super().__init__(prog, max_help_position=34, width=width)
        self.width = width

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[0]
        if action.nargs == 0 or action.const is True:
            return flag
        if action.choices is not None:
            return f"{flag} {{{','.join(map(str, action.choices))}}}"
        placeholder = action.metavar or self.PLACEHOLDERS.get(getattr(action.type, "__name__", ""), "TEXT")
        return f"{flag} {placeholder}{' ...' if action.nargs == '+' else ''}"


def help_text(text: str, default: Any) -> str:
    """`text` as a sentence, with the default where that tells something."""
    text = " ".join(text.split()).rstrip(".")
    if default not in (None, False, "", -1, "none", argparse.SUPPRESS, []):
        text += f" (default: {default})"
    return f"{text}.".replace("%%", "%").replace("%", "%%") if text else ""


def whole_number(text: str) -> int:
    """`int` for argparse, with a message that says what to write."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number; write one such as 10") from None


def number(text: str) -> float:
    """`float` for argparse, with a message that says what to write."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number; write one such as 0.1 or 1e-4") from None


def truth(text: str) -> bool:
    """A boolean for argparse. A word that is none stood behind the flag by accident, and the message says so."""
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither true nor false; write what belongs to no flag in front of all flags"
        ) from None


OUR_TYPES = {int: whole_number, float: number, string_to_bool: truth}
