"""What a function of tensors launched, written down as a function that launches it again.

The launchers choose tiles, grids and workspaces from shapes, and the functions around them decide what to call: Python
that says the same thing at every step of a training. A tape notes what came of it: tensors that were made, operators of
PyTorch that were called, kernels that were launched, in their order. A program is the straight line of those, as a
Python function of the same tensors: the same calls with the same arguments, hence the same bits.

It holds for tensors of the same shapes, strides, dtypes and device under the same settings; whoever keeps a program
answers for that. What PyTorch's operators give is asked for its strides, since its settings may choose another library.
There is no program where something cannot be written down: a tensor that was neither given nor made here, a number
read from a tensor. Where no tape is running, nothing is noted and ``launch`` costs one look.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastres.kernels._launch import on
from fastres.kernels._switch import from_environment, switched
from fastres.kernels._triton import HAS_TRITON, INTERPRET, triton

__all__ = ["MODES", "Kept", "Program", "launch", "noting", "programs", "record", "writing"]


MODES = ("auto", "off")


class _Setting:
    programs: str = from_environment("FASTRES_PROGRAMS", "auto", MODES)


def programs(mode: str) -> AbstractContextManager[None]:
    """Whether what a block launches is written down at its second step and launched from there at the ones after
    (``auto``), or decided anew at every step (``off``); process-wide. The results are the same, bit for bit."""
    return switched(_Setting, "programs", mode, MODES)


def writing() -> bool:
    """Whether programs are wanted."""
    return _Setting.programs == "auto"


def noting() -> int:
    """How many of this thread's modes of PyTorch's dispatcher are tapes."""
    return int(_running.tape is not None)


class _Unwritable(Exception):
    pass


class _Running(threading.local):
    tape: _Tape | None = None


_running = _Running()

_aten = torch.ops.aten
# What makes a tensor of unset values; written as one call that says its size and strides.
_EMPTY = frozenset(
    (_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default,
     _aten.new_empty_strided.default)
)  # fmt: skip
# Operators that have a binding of their own, which is quicker called; the same arguments.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: torch.convolution,
    _aten.unbind.int: torch.unbind,
    _aten.view.default: Tensor.view,
    _aten.as_strided.default: torch.as_strided,
}
_LITERALS = (type(None), bool, int, str)


def _quick_empty(device: torch.device) -> Callable[..., Tensor] | None:
    """``torch.empty_strided`` on the current device of this type without the parsing of its arguments, which inductor's
    code calls; not where PyTorch was asked to fill what it leaves unset."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, f"_empty_strided_{device.type}", None)


class Program(NamedTuple):
    """``run`` takes the tensors that the function took, in their order, and returns what it returned. ``direct``: it
    launches what Triton compiled for them, without asking Triton whether that fits."""

    run: Callable[..., tuple[Tensor | None, ...]]
    source: str
    direct: bool


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, noted where a tape is running: how every launcher launches."""
    tape = _running.tape
    return kernel[grid] if tape is None else tape.launching(kernel, grid)


class _Line(NamedTuple):
    """Of a program: its text, the names that it binds and those that it reads. ``kind``: a call; something made or
    viewed, which is left out where nobody reads it; or a check, which is left out where no later call reads it."""

    text: str
    made: tuple[str, ...]
    read: tuple[str, ...]
    kind: str = "call"


class _Tape(TorchDispatchMode):
    """Runs everything as it would have run; ``lines`` is None from where something could not be written down."""

    def __init__(self, tensors: Sequence[Tensor | None], constants: bool) -> None:
        super().__init__()
        self.constants = constants
        self.lines: list[_Line] | None = []
        self.direct = False
        self.arguments = [f"t{i}" for i in range(len(tensors))]
        self._space: dict[str, Any] = {"empty": torch.empty_strided, "changed": _changed}
        self._values: dict[Any, str] = {}  # names in that space, by what stands for their values
        self._names: dict[int, str] = {}  # names of tensors, by identity
        self._held: list[Tensor] = []  # for an identity is a tensor's own only as long as that lives
        for name, tensor in zip(self.arguments, tensors, strict=True):
            if tensor is None:
                continue
            if id(tensor) in self._names:  # another time it may be two
                self.lines = None
            self._names[id(tensor)] = name
            self._held.append(tensor)

    # ------------------------------------------------------------------------------------------------- noting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._note(self._called, func, args, kwargs or {}, out)
        return out

    def launching(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        run = kernel[grid]

        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():  # Triton's interpreter is written in operators of PyTorch
                compiled = run(*args, **kwargs)
            self._note(self._launched, kernel, grid, run, compiled, args, kwargs)
            return compiled

        return call

    def _note(self, write: Callable[..., list[_Line]], *what: Any) -> None:
        if self.lines is None:
            return
        try:
            self.lines += write(*what)
        except (_Unwritable, AttributeError, KeyError):  # the latter two of a Triton that does it otherwise
            self.lines = None

    def _launched(
        self, kernel: Any, grid: tuple[int, ...], run: Any, compiled: Any, args: Any, kwargs: Any
    ) -> list[_Line]:  # fmt: skip
        # For AMD's GPUs Triton also looks at the size of what a tensor lies in.
        if compiled is None or kernel.pre_run_hooks or torch.version.hip:
            name = self._value(run, (id(kernel), grid))
            self._value(kernel)
            text, reads = self._call(name, args, kwargs)
            return [_Line(text, (), reads)]
        # What JITFunction.run ends in: every parameter in its place, constants too, and nobody listening.
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        read: list[str] = []
        self.direct = True
        words = [str(n) for n in (*grid, 1, 1)[:3]]
        words += ["stream", self._value(compiled.function), self._value(compiled.packed_metadata)]
        words += ["None"] * 3 + [self._word(given[name], read) for name in kernel.arg_names]
        return [_Line(f"{self._value(compiled.run)}({', '.join(words)})", (), tuple(read))]

    def _called(self, func: Any, args: Any, kwargs: Any, out: Any) -> list[_Line]:
        if func in _EMPTY:
            size, kind, name = f"{tuple(out.shape)}, {out.stride()}", self._value(out.dtype), self._new(out)
            quick = _quick_empty(out.device)
            if quick is not None:
                return [_Line(f"{name} = {self._value(quick)}({size}, {kind})", (name,), (), "made")]
            device = self._value(out.device)
            return [_Line(f"{name} = empty({size}, dtype={kind}, device={device})", (name,), (), "made")]
        if func is _aten.detach.default and self._names.get(id(args[0]), "")[:1] == "v":
            # Gradients are off, and torch.empty calls it.
            self._names[id(out)] = self._names[id(args[0])]
            self._held.append(out)
            return []
        text, read = self._call(self._value(_BINDINGS.get(func, func)), args, kwargs)
        several = isinstance(out, tuple | list)
        outputs = out if several else (out,)
        if any(o is not None and not isinstance(o, Tensor) for o in outputs):
            raise _Unwritable
        made = tuple("_" if o is None else self._new(o) for o in outputs)
        kind = "made" if func.is_view else "call"
        lines = [_Line(f"{', '.join(made)}{',' if several else ''} = {text}", made, read, kind)]
        if not func.is_view:
            lines += [
                _Line(f"if {n}.stride() != {o.stride()}: changed({str(func)!r})", (), (n,), "check")
                for n, o in zip(made, outputs, strict=True)
                if o is not None
            ]
        return lines

    def _call(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        read: list[str] = []
        words = [self._word(a, read) for a in args]
        words += [f"{key}={self._word(a, read)}" for key, a in kwargs.items()]
        return f"{name}({', '.join(words)})", tuple(read)

    def _word(self, a: Any, read: list[str]) -> str:
        if isinstance(a, Tensor):
            name = self._names.get(id(a))
            if name is None:
                if self.constants:
                    return self._value(a)
                raise _Unwritable
            read.append(name)
            return name
        if isinstance(a, tuple | list):
            words = "".join(f"{self._word(one, read)}, " for one in a)
            return f"[{words}]" if isinstance(a, list) else f"({words})"
        return repr(a) if isinstance(a, _LITERALS) else self._value(a)

    def _value(self, value: Any, key: Any = None) -> str:
        """The name under which the program finds what is no tensor; the space holds it, so an identity may stand for
        it."""
        if key is None:
            key = repr(value) if isinstance(value, float | torch.device) else id(value)
        name = self._values.setdefault(key, f"c{len(self._values)}")
        self._space.setdefault(name, value)
        return name

    def _new(self, tensor: Tensor) -> str:
        name = self._names.get(id(tensor))
        if name is None:
            name = self._names[id(tensor)] = f"v{len(self._held)}"
            self._held.append(tensor)
        return name

    # ------------------------------------------------------------------------------------------------- writing

    def _needed(self, result: Sequence[str]) -> list[_Line]:
        """The lines that a program of this result needs."""
        wanted, kept, called = set(result), [], set[str]()
        for line in reversed(self.lines or []):
            if line.kind == "made" and wanted.isdisjoint(line.made):
                continue
            if line.kind == "check" and called.isdisjoint(line.read):
                continue
            wanted.update(line.read)
            called.update(line.read)
            kept.append(line)
        return kept[::-1]

    def program(self, result: Sequence[Tensor | None]) -> Program | None:
        """The program of a function that returned this."""
        read: list[str] = []
        try:
            words = self._word(tuple(result), read)
        except _Unwritable:
            return None
        if self.lines is None:
            return None
        lines = self._needed(read)
        last = {name: i for i, line in enumerate(lines) for name in (*line.made, *line.read)}
        last.update(dict.fromkeys(read, len(lines)))
        text = [f"def program({', '.join(self.arguments)}):"]
        if self.direct:
            text.append("    stream = current_stream()")
            self._space["current_stream"] = _current_stream
        for i, line in enumerate(lines):
            text.append(f"    {line.text}")
            names = dict.fromkeys((*line.made, *line.read))
            done = [n for n in names if n[0] == "v" and last[n] == i]
            if done:  # memory is given back where its last reader has been called
                text.append(f"    del {', '.join(done)}")
        text.append(f"    return {words}")
        source = "\n".join(text) + "\n"
        exec(compile(source, "<fastres program>", "exec"), self._space)
        return Program(self._space.pop("program"), source, self.direct)


def _current_stream() -> int:
    driver = triton.runtime.driver.active
    return int(driver.get_current_stream(driver.get_current_device()))


def _direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what Triton compiled for other tensors of the same kind may be launched on these as it is: nobody is to
    hear of launches, and all lie as evenly as those did. Of what a tensor is, Triton looks at dtype and address."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return False
    for t in tensors:  # no generator: every step comes here
        if t is not None and t.data_ptr() % 16:
            return False
    return True


def _changed(operator: str) -> None:
    raise RuntimeError(
        f"fastres: {operator} gave a tensor of other strides than before on the same input, so a setting of PyTorch's "
        "must have changed that fastres does not know of; FASTRES_PROGRAMS=off in the environment does without programs"
    )


def record(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], constants: bool = False
) -> tuple[Any, Program | None]:  # fmt: skip
    """Call ``function(*tensors)``; what it returned, and the program of it or None.

    Args:
        function: gives a sequence of tensors and None; or None, which has no program. Gradients are off.
        tensors: all that it reads, or None in place of one.
        constants: tensors that it reads besides are the same ones at every call, and the program holds them.
    """
    tape = _Tape(tensors, constants)
    before, _running.tape = _running.tape, tape
    try:
        with tape:
            result = function(*tensors)
    finally:
        _running.tape = before
    return result, None if result is None else tape.program(result)


class Kept:
    """The programs of functions of tensors, by what they hold for. One is written at the second call with a key: sizes
    that are seen once cost nothing."""

    __slots__ = ("_found", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._found: dict[Any, Program | bool] = {}  # True: seen once; False: cannot be written

    def __call__(
        self, key: Any, function: Callable[..., Any], tensors: Sequence[Any], given: int,
        constants: bool = False,
    ) -> Any:  # fmt: skip
        """``function(*tensors)``, or its program, on the device of the first tensor. Gradients are off.

        Args:
            key: all that the program depends on; hashable.
            function, constants: as in ``record``.
            tensors: what it reads; the first is no None.
            given: the tensors from here on were made by functions called with the same key as at other steps, so they
                lie as evenly.
        """
        if _Setting.programs == "off" or _running.tape is not None:  # which could not see into a program
            return function(*tensors)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= self.size:
                self._found.pop(next(iter(self._found)), None)
            self._found[key] = True
        elif found is True:
            if not HAS_TRITON or INTERPRET or _direct(tensors[:given]):
                result, program = record(function, tensors, constants)
                self._found[key] = False if program is None else program
                return result
        elif found is not False and (not found.direct or _direct(tensors[:given])):
            with on(tensors[0]):
                return found.run(*tensors)
        return function(*tensors)
