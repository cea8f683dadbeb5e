"""Reads pickles without running anything in them.

A pickle is a program: its REDUCE instruction calls any function it names. Here `pickletools.genops` splits
the file into instructions, which runs none of them, and the small stack machine below carries them out on
lists, dicts and inert records. It imports nothing, and it calls nothing but functions that its caller lists.
"""

import pickletools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import IO, Any


class MalformedPickle(ValueError):
    """The bytes are no pickle of plain data; the message says what was met and where."""


@dataclass(frozen=True)
class GlobalName:
    """Name of a class or function, `module.name`, as a pickle mentions it. It is never imported."""

    name: str


@dataclass(eq=False, repr=False)
class InertRecord:
    """What a pickle says about an object that is not plain data: its class's name and what it holds.

    Attributes:
        class_name: `module.name` of the class, or of the function whose call would have made the object.
        arguments: The arguments of that call.
        state: What would have gone into the object's `__dict__` (or `__setstate__`).
        items: What would have been appended, where the object is a kind of list or set.
        entries: What would have been assigned, where the object is a kind of dict.
    """

    class_name: str
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)
    entries: dict = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """The object's attributes; empty where its state is not a `__dict__`."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state if isinstance(state, dict) else {}


def read_pickle(
    stream: IO[bytes] | mmap,
    rebuild: Mapping[str, Callable[..., Any]] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read the pickle that starts at the stream's position, and leave the stream behind it.

    Args:
        stream: `BytesIO` or `mmap`, which allocate nothing for a read beyond their end.
        rebuild: Further functions that may be called, by the name under which pickles mention them. They get
            the pickle's arguments unchecked.
        persistent: Called with each persistent id. Without it a persistent id is refused.

    Returns:
        Numbers, strings, bytes, None, lists, tuples, dicts, sets, and what `rebuild` and `persistent` return.
        `OrderedDict` and `Counter` come as `dict`, every other object as an `InertRecord`, every class or
        function that is itself a value as a `GlobalName`.

    Raises:
        MalformedPickle: truncated, no pickle at all, or made of what plain data never needs.
    """
    machine = _StackMachine({**_CONTAINERS, **(rebuild or {})}, persistent)
    position: int | None = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # an escape sequence that no string has
            # A mapped file reads as any other, though it is not declared so; the position is named in errors.
            for opcode, argument, position in pickletools.genops(stream):  # type: ignore[arg-type]  # noqa: B007
                machine.execute(opcode.name, argument)
        return machine.pop()
    except MalformedPickle as error:
        raise MalformedPickle(f"{error} (instruction at byte {position})") from None
    except (ValueError, IndexError, OverflowError, DeprecationWarning) as error:  # pickletools met no instruction
        raise MalformedPickle(f"no pickle instruction after byte {position} ({error})") from None


class _StackMachine:
    """Carries out pickle instructions on plain containers and inert records."""

    def __init__(self, rebuild: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None):
        self.rebuild = rebuild
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[Any, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        """Carry out one instruction; `name` is pickletools' name of it."""
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _PUSH_CONSTANT:
            self.stack.append(_PUSH_CONSTANT[name])
        elif name in _PUSH_NEW:
            self.stack.append(_PUSH_NEW[name]())
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        elif name not in _NO_EFFECT:
            raise MalformedPickle(f"the instruction {name}, which plain data never needs")

    # --- the stack -----------------------------------------------------------------------------------------

    def pop(self) -> Any:
        """Take the topmost value, which must lie above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise MalformedPickle("an instruction that lacks its operand")
        return self.stack.pop()

    def top(self) -> Any:
        """The topmost value, left where it is."""
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        if not self.marks:
            raise MalformedPickle("an instruction that lacks its mark")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_or_unmark(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def recall(self, index: Any) -> None:
        if index not in self.memo:
            raise MalformedPickle(f"a reference to value {index}, which was never stored")
        self.stack.append(self.memo[index])

    def store(self, index: Any) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    # --- containers ----------------------------------------------------------------------------------------

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(_hashable, values))
        elif isinstance(target, InertRecord):
            target.items.extend(values)
        else:
            raise MalformedPickle(f"an attempt to append to a {type(target).__name__}")

    def assign(self, values: list[Any]) -> None:
        target = self.top()
        entries = _pairs(values)
        if isinstance(target, dict):
            target.update(entries)
        elif isinstance(target, InertRecord):
            target.entries.update(entries)
        else:
            raise MalformedPickle(f"an attempt to assign into a {type(target).__name__}")

    def push_tuple(self, length: int) -> None:
        values = [self.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(values)))

    # --- objects -------------------------------------------------------------------------------------------

    def push_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise MalformedPickle("a class whose name is not a string")
        self.stack.append(GlobalName(f"{module}.{name}"))

    def call(self, target: Any, arguments: Any) -> None:
        """What a pickle asks to call or to instantiate: rebuilt if it is on the list, else recorded."""
        if not isinstance(arguments, tuple):
            raise MalformedPickle(f"arguments that are a {type(arguments).__name__}, not a tuple")
        name = target.name if isinstance(target, GlobalName) else f"({type(target).__name__})"
        function = self.rebuild.get(name)
        self.stack.append(InertRecord(name, arguments) if function is None else function(*arguments))

    def call_with_keywords(self, _: Any) -> None:
        self.pop()  # only unlisted classes are made with keywords, and of those nothing is used
        self.call_top(None)

    def call_top(self, _: Any) -> None:
        arguments, target = self.pop(), self.pop()
        self.call(target, arguments)

    def call_marked(self, _: Any) -> None:
        target, *arguments = self.pop_to_mark() or [None]
        self.call(target, tuple(arguments))

    def set_state(self, _: Any) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, InertRecord):
            target.state = state
        # Containers and tensors keep nothing that is used in their attributes.

    def push_persistent(self, identifier: Any) -> None:
        if self.persistent is None:
            raise MalformedPickle("a reference to data outside the pickle")
        self.stack.append(self.persistent(identifier))


def _hashable(key: Any) -> Any:
    """Dict keys and set members are plain; hashing a nested tuple would recurse as deep as the file says."""
    plain = (str, int, float, bytes, type(None), InertRecord, GlobalName)
    if isinstance(key, plain) or (isinstance(key, tuple) and all(isinstance(part, plain) for part in key)):
        return key
    raise MalformedPickle(f"a {type(key).__name__} as dict key or set member")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise MalformedPickle("a dict key without its value")
    return {_hashable(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _rebuild_dict(content: Any = (), *_: Any) -> dict[Any, Any]:
    """A dict from a dict or a list of pairs."""
    if isinstance(content, dict):
        return dict(content)
    pairs: Sequence[Any] = content if isinstance(content, list | tuple) else [None]
    if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        return _pairs([value for pair in pairs for value in pair])
    raise MalformedPickle(f"a dict made from a {type(content).__name__}")


def _rebuild_set(content: Any = (), *_: Any) -> set[Any]:
    if not isinstance(content, list | tuple | set):
        raise MalformedPickle(f"a set made from a {type(content).__name__}")
    return {_hashable(value) for value in content}


_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _rebuild_dict,
    "collections.Counter": _rebuild_dict,
    "builtins.set": _rebuild_set,
    "__builtin__.set": _rebuild_set,
}

# fmt: off
_PUSH_ARGUMENT = frozenset([
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
])
# fmt: on
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUSH_NEW = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_NO_EFFECT = frozenset(["PROTO", "FRAME", "STOP"])

_INSTRUCTIONS: dict[str, Callable[[_StackMachine, Any], None]] = {
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": _StackMachine.pop_or_unmark,
    "POP_MARK": lambda machine, _: machine.pop_to_mark().clear(),
    "DUP": lambda machine, _: machine.stack.append(machine.top()),
    "GET": _StackMachine.recall,
    "BINGET": _StackMachine.recall,
    "LONG_BINGET": _StackMachine.recall,
    "PUT": _StackMachine.store,
    "BINPUT": _StackMachine.store,
    "LONG_BINPUT": _StackMachine.store,
    "MEMOIZE": _StackMachine.store,
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "DICT": lambda machine, _: machine.stack.append(_pairs(machine.pop_to_mark())),
    "FROZENSET": lambda machine, _: machine.stack.append(_rebuild_set(machine.pop_to_mark())),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.assign([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.assign(machine.pop_to_mark()),
    "GLOBAL": lambda machine, names: machine.stack.append(GlobalName(names.replace(" ", ".", 1))),
    "STACK_GLOBAL": _StackMachine.push_global,
    "REDUCE": _StackMachine.call_top,
    "NEWOBJ": _StackMachine.call_top,
    "NEWOBJ_EX": _StackMachine.call_with_keywords,
    "OBJ": _StackMachine.call_marked,
    "INST": lambda machine, names: machine.call(GlobalName(names.replace(" ", ".", 1)), tuple(machine.pop_to_mark())),
    "BUILD": _StackMachine.set_state,
    "PERSID": _StackMachine.push_persistent,
    "BINPERSID": lambda machine, _: machine.push_persistent(machine.pop()),
}
