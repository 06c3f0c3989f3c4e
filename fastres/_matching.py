"""From a module to its plan: one trace of its own forward, and the parts in it that can be fused.

Only the module's own forward is traced (``torch.fx``); its children stay calls. What the trace would freeze is read
from the code before (:mod:`fastres._reading`). A forward that does anything that is not listed here is not understood.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastres._fusable import hooked
from fastres._norm import FusedNorm
from fastres._plan import ADD, METHODS, NAME_OF, Plan, Step, Value, drops_paths, plain_pool
from fastres._reading import NotUnderstood, constants_of

__all__ = ["make_plan", "reverted", "takes_norm"]


def takes_norm(norm: nn.Module) -> bool:
    """Whether a norm is fused, or is one that can be."""
    return isinstance(norm, FusedNorm) or type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or reverted(norm)


def reverted(norm: nn.Module) -> bool:
    """Whether a norm is what mmengine makes of a synchronised one for a run of one process."""
    return f"{type(norm).__module__}.{type(norm).__name__}" == "mmengine.model.utils._BatchNormXd"


# ---------------------------------------------------------------------------------------------------------- tracing


class _Proxy(fx.Proxy):
    """fx takes ``a += b`` for ``a = a + b``; here it stays what it is."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(module)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise NotUnderstood(f"its forward cannot be traced: {type(error).__name__}: {text}"[:160]) from None


def make_plan(module: nn.Module) -> Plan:
    """The plan of a module's forward, with at least one fused part in it.

    Raises:
        NotUnderstood: there is nothing to fuse in it, or the forward does more than call its children.
    """
    constants, looks_at_mode = constants_of(module)
    checkpointed = isinstance(constants.get("with_cp"), bool)
    before, with_cp = module.training, constants.pop("with_cp", None)
    try:
        if checkpointed:
            module.with_cp = False  # type: ignore[assignment]
        graph = _trace(module)
        if looks_at_mode:
            module.training = not before
            if str(_trace(module)) != str(graph):
                raise NotUnderstood("its forward does something else in training mode")
    finally:
        module.training = before
        if checkpointed:
            module.with_cp = with_cp
    matcher = _Matcher(module, graph)
    steps, result = matcher.match()
    text = ", ".join(_words(step) for step in steps if step.kind in ("norm", "end", "pool"))
    identities = tuple(sorted(matcher.identities))
    return Plan(
        steps, result, tuple(module._modules), tuple(constants.items()), identities, checkpointed, text
    )


def _words(step: Step) -> str:
    if step.kind == "norm":
        return "+".join(
            part for part in (step.conv, step.norm, step.relu or ("relu" if step.act else "")) if part
        )
    if step.kind == "end":
        return "+".join(part for part in (step.drop, "add", step.relu or "relu") if part)
    return step.name


class _Matcher:
    """Turns a graph into steps."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        (self.output,) = (node for node in graph.nodes if node.op == "output")
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise NotUnderstood(f"its forward has {len(inputs)} arguments")
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.identities: set[str] = set()
        for node in self.nodes:
            self._check(node)

    # What a graph may contain.

    def _check(self, node: fx.Node) -> None:
        if node.op == "call_module":
            if node.target not in self.module._modules:
                raise NotUnderstood(f"its forward calls {node.target}, inside a child")
        elif node.op == "call_function":
            if node.target not in NAME_OF:
                raise NotUnderstood(f"its forward calls {getattr(node.target, '__name__', node.target)}")
        elif node.op == "call_method":
            if node.target not in METHODS:
                raise NotUnderstood(f"its forward calls the method {node.target}")
        elif node.op != "placeholder":
            raise NotUnderstood(f"its forward reads {node.target}")
        if self._mutates(node):
            self._check_mutated(node)

    def _mutates(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._child(node), "inplace", False))
        name = NAME_OF.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
        in_place = node.kwargs.get("inplace", len(node.args) > 1 and name == "relu" and node.args[1])
        return name == "iadd" or bool(in_place)

    def _check_mutated(self, node: fx.Node) -> None:
        """What is changed in place must be nobody else's: no other user may see the old or the new values."""
        source: Any = node.args[0]
        while isinstance(source, fx.Node):
            alias = source.op == "call_module" and type(self._child(source)) is nn.Identity
            # A chain x -> ReLU(inplace) is fine wherever x is used no more; the user's own tensor may be.
            if len(source.users) > 1:
                raise NotUnderstood("its forward changes in place what is used again")
            if not alias:
                break
            source = source.args[0]
        called = isinstance(source, fx.Node) and source.op == "call_module"
        summed = isinstance(source, fx.Node) and self._function(source) in ADD
        if not called and not summed:
            raise NotUnderstood("its forward changes its input or a view in place")

    # What is fused.

    @staticmethod
    def _function(node: fx.Node) -> str:
        """Name of the function that a node calls, or nothing."""
        return NAME_OF.get(node.target, "") if node.op == "call_function" else ""  # type: ignore[arg-type]

    def _child(self, node: fx.Node) -> nn.Module:
        return self.module._modules[node.target]  # type: ignore[index, return-value]

    def _is(self, node: Any, test: Callable[[nn.Module], bool]) -> bool:
        return isinstance(node, fx.Node) and node.op == "call_module" and test(self._child(node))

    def _idle(self, node: Any) -> bool:
        """An identity that is passed over."""
        if not self._is(node, lambda m: type(m) is nn.Identity and not hooked(m)):
            return False
        self.identities.add(node.target)
        return True

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        """The one user, past identities."""
        while len(node.users) == 1:
            (user,) = node.users
            if not self._idle(user):
                return user
            node = user
        return None

    def _source(self, node: Any) -> Any:
        """Where a value comes from, past identities that are used once."""
        while self._idle(node) and len(node.users) == 1:
            node = node.args[0]
        return node

    def _relu_after(self, node: fx.Node) -> fx.Node | None:
        user = self._only_user(node)
        if user is None:
            return None
        if self._is(user, lambda m: type(m) is nn.ReLU):
            return user
        if self._function(user) in ("relu", "torch.relu"):
            return user
        return user if user.op == "call_method" and user.target == "relu" else None

    def match(self) -> tuple[tuple[Step, ...], Any]:
        self.fused: dict[fx.Node, Step] = {}  # the last node of each fused part
        for node in self.nodes:
            if self._is(node, takes_norm) and not hooked(self._child(node)):
                self._match_norm(node)
        for node in self.nodes:
            if self._function(node) in ADD:
                self._match_end(node)
            elif self._is(node, plain_pool):
                self._match_pool(node)
        if not self.fused:
            norms = [m for m in self.module.children() if isinstance(m, _BatchNorm) and not takes_norm(m)]
            others = ", ".join(sorted({type(norm).__name__ for norm in norms}))
            plain = "no norm in it follows a convolution or precedes a ReLU"
            raise NotUnderstood(f"no norm in it but {others}" if others else plain)
        result = self._argument(self.output.args[0])
        wanted = self._wanted()
        steps = [self._step(node) for node in self.nodes if node in wanted]
        return tuple(steps), result

    def _match_norm(self, node: fx.Node) -> None:
        source = node.args[0]
        alone = isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1
        conv = alone and isinstance(self._child(source), nn.Module) and _convolves(self._child(source))  # type: ignore[arg-type]
        relu = self._relu_after(node)
        if not conv and relu is None:
            return
        last = relu or node
        self.fused[last] = Step(
            "norm",
            self.index[last],
            args=(Value(self.index[source.args[0] if conv else source]),),  # type: ignore[union-attr]
            conv=str(source.target) if conv else "",  # type: ignore[union-attr]
            norm=str(node.target),
            relu=str(relu.target) if relu is not None and relu.op == "call_module" else "",
            act=relu is not None,
        )

    def _match_end(self, node: fx.Node) -> None:
        relu = self._relu_after(node)
        if relu is None or len(node.args) != 2 or node.kwargs:
            return
        operands = [self._source(arg) for arg in node.args]
        drop: Any = next((o for o in operands if self._is(o, drops_paths) and len(o.users) == 1), None)
        if drop is not None:
            operands[operands.index(drop)] = branch = self._source(drop.args[0])
            operands.sort(key=lambda operand: operand is not branch)
        elif not self._is_branch(operands[0]):
            operands.reverse()
        if not self._is_branch(operands[0]) or not isinstance(operands[1], fx.Node):
            return
        other = operands[1]
        if (
            other.op == "call_module"
            and isinstance(self._child(other), nn.Sequential)
            and len(other.users) == 1
        ):
            self.fused[other] = Step("shortcut", self.index[other], str(other.target), self._values(other))
        self.fused[relu] = Step(
            "end",
            self.index[relu],
            args=tuple(Value(self.index[operand]) for operand in operands),
            relu=str(relu.target) if relu.op == "call_module" else "",
            drop="" if drop is None else str(drop.target),
            act=True,
        )

    def _is_branch(self, node: Any) -> bool:
        step = self.fused.get(node)
        return (
            step is not None
            and step.kind == "norm"
            and not step.act
            and bool(step.conv)
            and len(node.users) == 1
        )

    def _match_pool(self, node: fx.Node) -> None:
        source = self._source(node.args[0])
        step = self.fused.get(source)
        if step is not None and step.kind == "norm" and step.conv and step.act and len(source.users) == 1:
            self.fused[node] = Step("pool", self.index[node], str(node.target), (Value(self.index[source]),))

    # Steps.

    def _values(self, node: fx.Node) -> tuple[Any, ...]:
        return tuple(self._argument(arg) for arg in node.args)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Value(self.index[value])
        if isinstance(value, tuple | list):
            return type(value)(self._argument(one) for one in value)
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            return value
        raise NotUnderstood(f"its forward passes a {type(value).__name__}")

    def _step(self, node: fx.Node) -> Step:
        if node in self.fused:
            return self.fused[node]
        i, args = self.index[node], self._values(node)
        kwargs = tuple((key, self._argument(value)) for key, value in node.kwargs.items())
        if node.op == "placeholder":
            return Step("input", i)
        if node.op == "call_module":
            return Step("call", i, str(node.target), args, kwargs)
        if node.op == "call_function":
            return Step("function", i, NAME_OF[node.target], args, kwargs)  # type: ignore[index]
        return Step("method", i, str(node.target), args, kwargs)

    def _wanted(self) -> set[fx.Node]:
        """The nodes whose values somebody reads: the inner nodes of fused parts are not among them."""
        found: set[fx.Node] = set()
        todo: list[Any] = [self.output.args[0]]
        while todo:
            one = todo.pop()
            if isinstance(one, tuple | list):
                todo += one
            elif isinstance(one, fx.Node) and one not in found:
                found.add(one)
                step = self.fused.get(one)
                if step is None:
                    todo += [*one.args, *one.kwargs.values()]
                else:
                    todo += [self.nodes[value.at] for value in step.args]
        unread = [n for n in self.nodes if n.op == "call_module" and n not in found and not n.users]
        if unread:
            raise NotUnderstood(f"its forward calls {unread[0].target} and drops the result")
        return found | {node for node in self.nodes if node.op == "placeholder"}


def _convolves(module: nn.Module) -> bool:
    """A convolution, or a sequence that ends in one (timm's deep stem)."""
    if isinstance(module, nn.Sequential) and len(module):
        return _convolves(module[-1])
    return isinstance(module, nn.Conv2d)
