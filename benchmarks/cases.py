"""What is timed: operations, blocks and networks, each as modules that differ in their norm alone.

``alternatives`` turns a case into functions to time: eager PyTorch, torch.compile and fastres in a memory format each,
on a GPU also captured in a CUDA graph, and torchvision's and timm's networks where they are installed. A training call
is forward and backward with a random gradient; a network's is a whole step with cross entropy and SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.modules import BlockEnd, BnRelu, Conv3x3, MomentEnd, Shortcut, StemPool
from benchmarks.nets import network
from fastres import functional

__all__ = ["NAMES", "REFERENCE", "Alternative", "Case", "alternatives", "blocks", "by_cost", "net_case", "operations",
           "prepare", "wanted"]  # fmt: skip


class Case(NamedTuple):
    """Inputs of [N, C, H, W] and what to do with them; ``build`` takes the norm's name, ``BN`` or ``FusedBN``."""

    family: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[[str], nn.Module]
    network: bool = False


class Alternative(NamedTuple):
    """A way to run a case: which norm, in which memory format, how, and whether 3x3 convolutions are this package's."""

    norm: str
    channels_last: bool
    how: str = ""  # "", compile, compile-max
    graph: bool = False
    own3x3: bool = False


NAMES: dict[str, Alternative] = {
    "eager": Alternative("BN", False),
    "eager channels_last": Alternative("BN", True),
    "compile": Alternative("BN", False, "compile"),
    "compile channels_last": Alternative("BN", True, "compile"),
    "compile max-autotune": Alternative("BN", False, "compile-max"),
    "compile max-autotune channels_last": Alternative("BN", True, "compile-max"),
    "fastres": Alternative("FusedBN", False),
    "fastres channels_last": Alternative("FusedBN", True),
    "fastres own 3x3 channels_last": Alternative("FusedBN", True, own3x3=True),
    "fastres compiled channels_last": Alternative("FusedBN", True, "compile"),
    "eager graph": Alternative("BN", False, "", True),
    "eager graph channels_last": Alternative("BN", True, "", True),
    "compile graph": Alternative("BN", False, "compile", True),
    "compile graph channels_last": Alternative("BN", True, "compile", True),
    "compile max-autotune graph": Alternative("BN", False, "compile-max", True),
    "compile max-autotune graph channels_last": Alternative("BN", True, "compile-max", True),
    "fastres graph": Alternative("FusedBN", False, "", True),
    "fastres graph channels_last": Alternative("FusedBN", True, "", True),
    "fastres compiled graph channels_last": Alternative("FusedBN", True, "compile", True),
    "torchvision channels_last": Alternative("torchvision", True),
    "timm channels_last": Alternative("timm", True),
}
REFERENCE = "eager channels_last"  # timed in turn with every group of alternatives


def operations(batch: int, scale: int = 1) -> list[Case]:
    """Operations at the shapes of ResNet-50's first and third stage; ``scale`` divides the pixels along a side."""
    cases = []
    for c, side in ((64, 56), (1024, 14)):
        s = max(side // scale, 4)
        shape = (batch, c, s, s)
        cases.append(Case("operation", f"bn+relu {c}x{s}", (shape,), lambda k, c=c: BnRelu(c, k)))
        cases.append(Case("operation", f"block end {c}x{s}", (shape, shape), lambda k, c=c: BlockEnd(c, k)))
    for c, side in ((64, 56), (256, 14)):
        s = max(side // scale, 4)
        cases.append(Case("operation", f"3x3 {c}x{s}", ((batch, c, s, s),), lambda k, c=c: Conv3x3(c, k)))
    # A bottleneck's end from the raw output of its 3x3 convolution: stages 1 and 3, plain and with a downsample branch.
    for c, side, down, stride in ((64, 56, 0, 1), (256, 14, 0, 1), (128, 28, 256, 2)):
        s, wide = max(side // scale, 4), 4 * c
        shapes = ((batch, c, s, s), (batch, down, s * stride, s * stride) if down else (batch, wide, s, s))
        name = f"1x1 to {'pair' if down else 'block'} end {c}->{wide} {s}"
        cases.append(Case("operation", name, shapes, lambda k, a=(c, wide, down, stride): MomentEnd(*a, k)))
    s = max(112 // scale, 8)
    cases.append(Case("operation", f"stem pool 64x{s}", ((batch, 64, s, s),), lambda k: StemPool(64, k)))
    return cases


def blocks(batch: int, scale: int = 1) -> list[Case]:
    """Blocks of ResNet-18 and ResNet-50."""
    cases = []
    for name, cin, cout, side, stride in (
        ("BasicBlock", 64, 64, 56, 1), ("BasicBlock", 128, 256, 28, 2),
        ("Bottleneck", 256, 256, 56, 1), ("Bottleneck", 512, 1024, 28, 2),
    ):  # fmt: skip
        s = max(side // scale, 4)

        def build(
            k: str, name: str = name, cin: int = cin, cout: int = cout, stride: int = stride
        ) -> nn.Module:
            return Shortcut(name, cin, cout, stride, k)

        label = f"{name} {cin}->{cout} {s} stride {stride}"
        cases.append(Case("block", label, ((batch, cin, s, s),), build))
    return cases


def _foreign(package: str, name: str) -> nn.Module:
    if package == "torchvision":
        import torchvision

        return getattr(torchvision.models, name)()
    import timm

    return timm.create_model(name, pretrained=False)


def net_case(name: str, batch: int, size: int = 224) -> Case:
    """A network of ``benchmarks.nets``; as ``torchvision`` or ``timm``, that package's."""

    def build(kind: str) -> nn.Module:
        return _foreign(kind, name) if kind in ("torchvision", "timm") else network(name, kind)

    return Case("network", name, ((batch, 3, size, size),), build, network=True)


# ---------------------------------------------------------------------------------------------------------- running


def wanted(case: Case, device: torch.device, compiled: bool, full: bool) -> list[str]:
    """Names of the alternatives to time; ``full`` adds graphs, max-autotune and other packages' networks. NCHW is left
    out where it would be captured or autotuned for long; it can be asked for by name."""
    names = ["eager", "eager channels_last", "fastres", "fastres channels_last"]
    if compiled:
        names.append("compile channels_last")
    if full:
        graphs = case.network and device.type == "cuda"
        for n, a in NAMES.items():
            foreign = a.norm in ("torchvision", "timm")
            costly = not a.channels_last and (a.how == "compile-max" or a.how and a.graph)
            idle = a.own3x3 and (
                device.type != "cuda" or case.family == "operation" and "3x3" not in case.name
            )
            left_out = foreign or costly or idle or (a.how and not compiled) or (a.graph and not graphs)
            if n not in names and not left_out:
                names.append(n)
        plain = case.network and case.name.removeprefix("resnet").isdigit()
        names += [f"{p} channels_last" for p in ("torchvision", "timm") if plain and find_spec(p) is not None]
    return names


def by_cost(names: list[str]) -> list[list[str]]:
    """The same names in groups, the cheap ones first: what is not compiled, compiled, compiled with autotuning. A group
    is made and timed before the next is begun, so a run that is stopped has the rows of those before."""
    hows = [[n for n in names if NAMES[n].how == how] for how in ("", "compile", "compile-max")]
    return [g for g in hows if g]


def _sets(case: Case, device: torch.device, dtype: torch.dtype) -> int:
    if device.type != "cuda":
        return 1
    bytes_ = 0
    for shape in case.shapes:
        n = dtype.itemsize
        for d in shape:
            n *= d
        bytes_ += n
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(8, -(-2 * cache // max(bytes_, 1))))


def _operation_call(
    model: nn.Module,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    memory: torch.memory_format,
    train: bool,
) -> Callable[[int], object]:
    sets = []
    for i in range(_sets(case, device, dtype)):
        g = torch.Generator(device).manual_seed(i)
        xs = [
            torch.randn(s, generator=g, device=device)
            .to(dtype)
            .contiguous(memory_format=memory)
            .requires_grad_(train)
            for s in case.shapes
        ]
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(*xs)
            dz = torch.randn(out.shape, generator=g, device=device).to(out.dtype) if train else None
            dz = dz.contiguous(memory_format=memory) if dz is not None else None
        sets.append((xs, dz))
    parameters = [p for p in model.parameters() if p.requires_grad]
    reduced = dtype != torch.float32

    def call(i: int) -> object:
        xs, dz = sets[i % len(sets)]
        with torch.autocast(device.type, dtype if reduced else None, enabled=reduced):
            if not train:
                with torch.no_grad():
                    return model(*xs)
            out = model(*xs)
        return torch.autograd.grad(out, [*xs, *parameters], dz)

    return call


class _Pool:
    handle: Any = None


def _network_call(
    model: nn.Module, case: Case, device: torch.device, dtype: torch.dtype, memory: torch.memory_format, train: bool,
    graph: bool,
) -> Callable[[int], object]:  # fmt: skip
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.shapes[0], generator=g, device=device).contiguous(memory_format=memory)
    target = torch.randint(1000, (case.shapes[0][0],), generator=g, device=device)
    reduced = dtype != torch.float32
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(i: int) -> object:
        with torch.autocast(
            device.type, dtype if reduced else None, enabled=reduced, cache_enabled=not graph
        ):
            if not train:
                with torch.no_grad():
                    return model(x)
            loss = nn.functional.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graph)
        return loss

    if not graph:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            step(i)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    # One pool for all graphs of the process: each replay writes its temporaries anew, and none reads another's.
    _Pool.handle = _Pool.handle or torch.cuda.graph_pool_handle()
    with torch.cuda.graph(captured, pool=_Pool.handle):
        step(0)

    def replay(i: int) -> object:
        return captured.replay()

    replay.uncaptured = step  # type: ignore[attr-defined]  # for the peak of memory, which a replay does not show
    return replay


def prepare(
    case: Case, name: str, device: torch.device, dtype: torch.dtype, train: bool
) -> Callable[[int], object]:
    """One alternative, ready to be called with the number of the call."""
    a = NAMES[name]
    memory = torch.channels_last if a.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    model: Any = case.build(a.norm).to(device).to(memory_format=memory).train(train)
    if a.how:
        model = torch.compile(model, mode="max-autotune-no-cudagraphs" if a.how == "compile-max" else None)
    if case.network:
        call = _network_call(model, case, device, dtype, memory, train, a.graph)
    else:
        call = _operation_call(model, case, device, dtype, memory, train)
    if not a.own3x3:
        return call

    def own(i: int) -> object:
        with functional.conv3x3("triton"):
            return call(i)

    return own


def alternatives(
    case: Case, names: list[str], device: torch.device, dtype: torch.dtype, train: bool
) -> tuple[dict[str, Callable[[int], object]], dict[str, str]]:
    """Every named alternative that could be made, and of the others why not.

    What was compiled before is forgotten: the networks share their code, of which the compiler keeps a few versions,
    and it would run others uncompiled without a word; here it raises.
    """
    ready, failed = {}, {}
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2 * len(NAMES)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for name in names:
        try:
            ready[name] = prepare(case, name, device, dtype, train)
        except Exception as error:  # a missing compiler or too little memory must not cost the other rows
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return ready, failed
