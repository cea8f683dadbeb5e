"""Reversible residual layers (Gomez et al. 2017, section 3.1; Kitaev et al. 2020, section 3) on saved-tensor hooks.

One step maps two streams (first, second) to (second, first + function(second)); a layer y1 = x1 + F(x2),
y2 = x2 + G(y1) is two of them. Given its outputs, a step's inputs follow:

    first = total - function(second),    where (second, total) are the outputs.

A chain of steps therefore needs to hold only the outputs of its last step. Forward runs every function under a hook
that puts a placeholder where autograd would save a tensor. The first placeholder of a step that the backward pass
asks for runs the function once more, fills in all of the step's tensors, and so uncovers the outputs of the step
below. The graph is ordinary autograd's: parameters get their gradients as always, through whatever wraps them.

Memory: two streams in all, and one step's saved tensors at a time, whatever the depth. Work: one more forward pass.

Nothing here refers in a circle (graph -> placeholder -> record -> steps, and steps know placeholders weakly): when
the graph goes, all of it goes.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Value = TypeVar("Value")

CHANGED = (
    "step {step} of a reversible chain, {name}, did something else in the backward pass than in the forward pass: "
    "{what}. Between the two, do not call train() or eval(), do not change requires_grad, and let every random choice "
    "come from torch's default generators or from `keep`"
)


class ReversibleChain:
    """A chain of reversible steps, as a context manager; see the head of this file.

    From Gomez et al. 2017, arXiv 1707.04585, and Kitaev et al. 2020, arXiv 2001.04451, section 3.

        with ReversibleChain() as chain:
            for layer in layers:
                first, second = chain.step(layer.attention, first, second)
                first, second = chain.step(layer.feed_forward, first, second)

    Backward must come after the `with` block. Without gradients, or with `enabled=False`, steps are ordinary autograd.
    Rebuilt streams of float32 differ from the first ones by a few roundings. With streams of float64 and functions
    that cast to float32 they do not, and gradients are ordinary autograd's to the bit. Half-precision streams lose
    too much: cast inside the functions instead.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._was_opened = False
        self._record: _Record | None = None

    def __enter__(self) -> "ReversibleChain":
        self._was_opened = True
        if self.enabled and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self._record = _Record()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        record, self._record = self._record, None
        if record is not None:
            record.close(failed=error_type is not None)

    def step(
        self, function: Callable[..., Tensor], first: Tensor, second: Tensor, *extras: Any
    ) -> tuple[Tensor, Tensor]:
        """Return `(second, first + function(second, *extras))`.

        Args:
            function: maps `second` to a tensor of `first`'s shape. It is called again in the backward pass and has to
                do the same then; it must not change `second` in place.
            first, second: streams of equal shape (...); from the second step on, the outputs of the step before,
                untouched.
            extras: handed on to `function`. Tensors among them may require gradient (cross-attention). Other objects
                are held until the backward pass; if one holds what this chain computes, the graph is never freed.

        Raises:
            ValueError: the streams are not the outputs of the step before, or `function` changes `second` or returns
                what cannot be added to `first` without changing its shape or dtype.
            RuntimeError: before the `with` block. (After it steps are ordinary autograd, for those that run a layer
                again on their own, such as checkpoints.)
        """
        if self.enabled and not self._was_opened:
            raise RuntimeError("take reversible steps inside `with ReversibleChain() as chain:`")
        if self._record is None or not torch.is_grad_enabled():
            return second, first + function(second, *extras)
        return self._record.step(function, first, second, *extras)


def reversible_sequence(
    functions: Sequence[Callable[[Tensor], Tensor]], first: Tensor, second: Tensor, *, enabled: bool = True
) -> tuple[Tensor, Tensor]:
    """Chain `(first, second) -> (second, first + function(second))` over `functions`; see `ReversibleChain.step`.

    From Gomez et al. 2017, arXiv 1707.04585, and Kitaev et al. 2020, arXiv 2001.04451, section 3.

    first, second: streams of equal shape (...), and so is what is returned.
    """
    with ReversibleChain(enabled) as chain:
        for function in functions:
            first, second = chain.step(function, first, second)
    return first, second


# --- what a function can ask about its run ---------------------------------------------------------------


class _Run:
    """One call of a step's function, for `keep` and `is_rebuilding`."""

    __slots__ = ("step", "rebuilding", "num_kept", "outer")
    present = threading.local()

    def __init__(self, step: "_Step", rebuilding: bool):
        self.step = step
        self.rebuilding = rebuilding
        self.num_kept = 0

    def __enter__(self) -> None:
        self.outer = getattr(_Run.present, "run", None)
        _Run.present.run = self

    def __exit__(self, *error) -> None:
        _Run.present.run = self.outer

    def take_kept(self) -> Any:
        """The next value that `keep` decided in the first run; random states are then as they were after it."""
        if self.num_kept == len(self.step.kept):
            self.step.raise_changed(f"`keep` was called {self.num_kept} times and now more often")
        value, random_state = self.step.kept[self.num_kept]
        self.num_kept += 1
        random_state.restore()
        return value


@torch.compiler.disable
def is_rebuilding() -> bool:
    """True inside a step's function while the backward pass runs it again: side effects happen in the first run."""
    run = getattr(_Run.present, "run", None)
    while run is not None and not run.rebuilding:
        run = run.outer
    return run is not None


@torch.compiler.disable
def keep(make: Callable[[], Value]) -> Value:
    """Value of `make()`, decided in the forward pass and handed back when the step's function runs again.

    For choices that rounding must not change, such as buckets. The value gets no gradient and is held until the
    backward pass, so it should be small. `make` may draw random numbers; what is drawn after it is the same again.
    A `torch.utils.checkpoint` inside the step runs `make` again.
    """
    return _decide(getattr(_Run.present, "run", None), make)


def _decide(run: _Run | None, make: Callable[[], Value]) -> Value:
    """A chain inside a step has two runs going on: the outer one decides, or remembers."""
    if run is None:
        with torch.no_grad():
            return make()
    if run.rebuilding:
        return run.take_kept()
    value = _decide(run.outer, make)
    run.step.kept.append((value, _RandomState(run.step.device, run.step.cpu_states)))
    return value


# --- the surroundings of a run ---------------------------------------------------------------------------


class _RandomState:
    """State of the CPU's generator and of a device's, as it is now."""

    __slots__ = ("device", "cpu_state", "device_state")

    def __init__(self, device: torch.device, cpu_states: "_StateStore | None" = None):
        self.device = device
        self.cpu_state = torch.get_rng_state() if cpu_states is None else cpu_states.add(torch.get_rng_state())
        is_other = device.type not in ("cpu", "meta")
        self.device_state = torch.get_device_module(device).get_rng_state(device) if is_other else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu_state.clone())  # the generator reads from the beginning of the block
        if self.device_state is not None:
            torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)


class _StateStore:
    """Generator states of a chain, 5 KB each, in blocks of their own.

    Allocated one by one between the tensors of the steps, they would keep the memory that those leave behind from
    being used again.
    """

    BLOCK = 64

    def __init__(self):
        self.free: list[Tensor] = []
        self.last: Tensor | None = None

    def add(self, state: Tensor) -> Tensor:
        """A copy of `state`; the last one if nothing was drawn since."""
        if self.last is None or not torch.equal(state, self.last):
            if not self.free:
                self.free = list(state.new_empty(self.BLOCK, len(state)).unbind())
            self.last = self.free.pop().copy_(state)
        return self.last


def _autocast_state(device_type: str) -> list[tuple[str, torch.dtype, bool, bool]]:
    """Arguments of `torch.autocast` that bring back what holds now, for the CPU and the device."""
    types = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
    is_cached = torch.is_autocast_cache_enabled()
    return [
        (name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name), is_cached)
        for name in types
        if torch.amp.is_autocast_available(name)
    ]


# --- the record of a forward pass ------------------------------------------------------------------------


class _Placeholder:
    """Stands in the graph for a tensor that the step at `position` saved; holds it from its rebuilding to its use."""

    __slots__ = ("record", "position", "shape", "dtype", "tensor", "__weakref__")

    def __init__(self, record: "_Record", position: int, tensor: Tensor):
        self.record = record
        self.position = position
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.tensor: Tensor | None = None


def _unpack(packed: _Placeholder | Tensor) -> Tensor:
    """Hook that autograd calls for each tensor it saved, once as a rule."""
    if not isinstance(packed, _Placeholder):
        return packed
    tensor, packed.tensor = packed.tensor, None
    return packed.record.rebuild(packed) if tensor is None else tensor


class _Step:
    """All that is needed to run a step's function again, but for its input.

    `placeholders` are what autograd got for the tensors it saved, in order; None for `parameters`, which are held
    with their versions. `kept` are the values that `keep` decided, each with the random state after it.
    """

    def __init__(
        self, position: int, function: Callable[..., Tensor], second: Tensor, extras: tuple, cpu_states: _StateStore
    ):
        self.position = position
        self.function = function
        self.needs_grad = second.requires_grad
        self.extras = [_Extra(extra) if isinstance(extra, Tensor) else extra for extra in extras]
        self.device = second.device
        self.cpu_states = cpu_states
        self.random_state = _RandomState(second.device, cpu_states)
        self.autocast = _autocast_state(second.device.type)
        self.kept: list[tuple[Any, _RandomState]] = []
        self.placeholders: list[weakref.ref[_Placeholder] | None] = []
        self.parameters: list[tuple[nn.Parameter, int]] = []

    def run_first(self, record: "_Record", second: Tensor, extras: tuple) -> Tensor:
        """The function's output; placeholders go where autograd would save tensors, but for parameters."""
        placeholders = self.placeholders

        def pack(tensor: Tensor) -> _Placeholder | Tensor:
            root = tensor if tensor._base is None else tensor._base
            if root.is_leaf and isinstance(root, nn.Parameter):
                self.parameters.append((root, root._version))
                placeholders.append(None)
                return tensor
            placeholder = _Placeholder(record, self.position, tensor)
            placeholders.append(weakref.ref(placeholder))
            return placeholder

        with saved_tensors_hooks(pack, _unpack), _Run(self, rebuilding=False):
            return self.function(second, *extras)

    def run_again(self, second: Tensor, is_wanted: Callable[[_Placeholder], bool]) -> Tensor:
        """The same output; placeholders that are wanted, and still in a graph, get their tensors."""
        placeholders, num_saved = self.placeholders, 0

        def pack(tensor: Tensor) -> None:
            nonlocal num_saved
            num_saved += 1
            if num_saved > len(placeholders):
                self.raise_changed(f"autograd saved {len(placeholders)} tensors and now more")
            reference = placeholders[num_saved - 1]
            placeholder = None if reference is None else reference()
            if placeholder is None:
                return
            if placeholder.shape != tensor.shape or placeholder.dtype != tensor.dtype:
                self.raise_changed(
                    f"tensor {num_saved} that autograd saved was {tuple(placeholder.shape)} {placeholder.dtype} and "
                    f"is {tuple(tensor.shape)} {tensor.dtype}"
                )
            if is_wanted(placeholder):
                placeholder.tensor = tensor.detach() if tensor.requires_grad else tensor

        self._check_parameters()
        second = second.detach().requires_grad_(self.needs_grad)
        extras = [extra.again() if isinstance(extra, _Extra) else extra for extra in self.extras]
        with self._surroundings(), saved_tensors_hooks(pack, _unpack), _Run(self, rebuilding=True):
            output = self.function(second, *extras)
        if num_saved != len(placeholders):
            self.raise_changed(f"autograd saved {len(placeholders)} tensors and now {num_saved}")
        return output.detach()

    @contextlib.contextmanager
    def _surroundings(self):
        """Gradients on, and autocast and random states as they were; afterwards the random states of now."""
        present = _RandomState(self.device)
        self.random_state.restore()
        try:
            with torch.enable_grad(), contextlib.ExitStack() as stack:
                if self.autocast != _autocast_state(self.device.type):
                    for arguments in self.autocast:
                        stack.enter_context(torch.autocast(*arguments))
                yield
        finally:
            present.restore()

    def _check_parameters(self) -> None:
        for parameter, version in self.parameters:
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} was changed in place after the forward pass of "
                    f"reversible step {self.position} and before its backward pass; call optimizer.step() later"
                )

    def raise_changed(self, what: str) -> NoReturn:
        """Say that the second run differs from the first."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        raise RuntimeError(CHANGED.format(step=self.position, name=name, what=what))


class _Extra:
    """A tensor among a step's extras, without its graph."""

    __slots__ = ("tensor", "needs_grad", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.needs_grad, self.version = tensor.detach(), tensor.requires_grad, tensor._version

    def again(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"an extra argument of shape {tuple(self.tensor.shape)} of a reversible step was changed in place "
                "between forward and backward; give the step a copy"
            )
        return self.tensor.detach().requires_grad_(self.needs_grad)


class _Stream:
    """A step's output without its graph, and how to recognise it: FSDP2 hands on a new object with the same memory."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor.detach(), tensor._version

    @property
    def is_untouched(self) -> bool:
        return self.tensor._version == self.version

    def is_same(self, other: Tensor) -> bool:
        own = self.tensor
        return (
            own.data_ptr() == other.data_ptr()
            and own.dtype == other.dtype
            and own.shape == other.shape
            and own._version == self.version
        )


class _Record:
    """What a chain remembers of its forward pass: its steps, and the outputs of the last one."""

    def __init__(self):
        self.steps: list[_Step] = []
        self.cpu_states = _StateStore()
        self.outputs: tuple[_Stream, _Stream] | None = None
        self.is_closed = False
        self.lock = threading.RLock()
        self.replay: _Replay | None = None

    @torch.compiler.disable
    def step(
        self, function: Callable[..., Tensor], first: Tensor, second: Tensor, *extras: Any
    ) -> tuple[Tensor, Tensor]:
        """See `ReversibleChain.step`."""
        self._check_streams(first, second)
        version = second._version
        step = _Step(len(self.steps), function, second, extras, self.cpu_states)
        change = step.run_first(self, second, extras)
        total = first + change
        if second._version != version:
            raise ValueError(f"the function of reversible step {step.position} changes its input in place")
        if total.shape != first.shape or total.dtype != first.dtype:
            raise ValueError(
                f"the function of reversible step {step.position} returned {tuple(change.shape)} {change.dtype}; its "
                f"stream is {tuple(first.shape)} {first.dtype}, and the sum has to be that too"
            )
        self.steps.append(step)
        self.outputs = (_Stream(second) if self.outputs is None else self.outputs[1], _Stream(total))
        return second, total

    def _check_streams(self, first: Tensor, second: Tensor) -> None:
        if self.outputs is None or (self.outputs[0].is_same(first) and self.outputs[1].is_same(second)):
            return
        raise ValueError(
            f"the streams given to reversible step {len(self.steps)}, {tuple(first.shape)} {first.dtype} and "
            f"{tuple(second.shape)} {second.dtype}, are not the untouched outputs of the step before, "
            f"{self.outputs[1].tensor.dtype}; change them inside a step's function, or start another chain. With "
            "FSDP2, wrap with MixedPrecisionPolicy(cast_forward_inputs=False)"
        )

    def close(self, failed: bool) -> None:
        """End of the forward pass; a failed one cannot be run backward."""
        self.is_closed = True
        if failed:
            self.outputs = None

    def rebuild(self, placeholder: _Placeholder) -> Tensor:
        """The placeholder's tensor; the others of its step are filled on the way."""
        task = torch._C._current_graph_task_id()  # -1 outside of a backward pass
        with self.lock:
            replay = self.replay
            if replay is None or replay.task != task or replay.position < placeholder.position:
                self._start_replay(task)
            try:
                self.replay.rebuild(self.steps, placeholder)
                tensor, placeholder.tensor = placeholder.tensor, None
                return tensor
            except BaseException:
                self.replay = None
                raise
            finally:
                if task == -1:
                    self.replay = None

    def _start_replay(self, task: int) -> None:
        if not self.is_closed or self.outputs is None:
            raise RuntimeError(
                "backward of a reversible chain has to come after its `with` block, which must not fail"
            )
        if not all(stream.is_untouched for stream in self.outputs):
            raise RuntimeError("an output of a reversible chain was changed in place before its backward pass")
        self.replay = _Replay(task, len(self.steps), self.outputs)
        if task != -1:
            weak_self = weakref.ref(self)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _end_replay(weak_self(), task))


def _end_replay(record: _Record | None, task: int) -> None:
    """Called when a backward pass is over; the record may be gone with its graph."""
    if record is not None and record.replay is not None and record.replay.task == task:
        record.replay = None


class _Replay:
    """One backward pass through a record: how far down the streams are rebuilt."""

    def __init__(self, task: int, num_steps: int, outputs: tuple[_Stream, _Stream]):
        self.task = task
        self.position = num_steps
        self.streams = tuple(stream.tensor for stream in outputs)

    def rebuild(self, steps: list[_Step], placeholder: _Placeholder) -> None:
        """Go down to the placeholder's step, which must not be above the present one, and fill its placeholders."""
        position = placeholder.position
        if position == self.position:
            # A tensor is asked for a second time; the step's input is at hand.
            steps[position].run_again(self.streams[1], lambda other: other is placeholder)
        while self.position > position:
            second, total = self.streams
            change = steps[self.position - 1].run_again(second, lambda other: other.position == position)
            with torch.no_grad():
                self.streams = (total - change, second)
            self.position -= 1


__all__ = ["ReversibleChain", "is_rebuilding", "keep", "reversible_sequence"]
