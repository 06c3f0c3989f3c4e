"""Parity of every fused operation on this machine's device, without pytest.

Each operation is run forward and backward on random data and held against the same computation by PyTorch in float64;
it may be at most twice as far from that as eager PyTorch is in the dtype under test, plus a floor (the rule of the
tests). On a GPU the kernels are what is checked; on a CPU the plain-torch operators, or with TRITON_INTERPRET=1 the
kernels in Triton's interpreter. Convolutions with folded norms are run forward, by the route that inference takes here,
and held against convolution, norm, addition and ReLU one after the other; so are the forms by which a CPU trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastres import functional
from fastres.kernels._triton import INTERPRET

__all__ = [
    "FLOOR",
    "Case",
    "Result",
    "block_end",
    "bn_relu",
    "cases",
    "check",
    "inference_cases",
    "leaves",
    "stem_pool",
    "training_cases",
    "worst_ratio",
]

# Relative to the largest magnitude of the reference; the table of tests/tolerance.py, which says why.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Case(NamedTuple):
    """An operation on tensors by name; ``run`` returns its result, gradients are taken of all that require one, unless
    it is one of inference."""

    name: str
    tensors: dict[str, Tensor]
    run: Callable[[dict[str, Tensor]], Tensor]
    buffers: tuple[str, ...] = ()  # updated in place; compared as results
    inference: bool = False
    programs: bool = False  # run by a program in the end, which must give what came without one, to the bit


class Result(NamedTuple):
    case: str
    dtype: str
    layout: str
    route: str
    worst: float  # largest error as a part of what is allowed
    what: str  # the tensor it belongs to
    error: str  # the exception, where there was one

    @property
    def ok(self) -> bool:
        return not self.error and self.worst <= 1.0


def worst_ratio(ours: Tensor, eager: Tensor, ref: Tensor, dtype: torch.dtype) -> float:
    """|ours - ref| over 2 |eager - ref| + floor |ref|, in max norms; infinite where NaN or inf stand elsewhere."""
    got, other, ref = ours.detach().double().cpu(), eager.detach().double().cpu(), ref.detach().cpu()
    if got.shape != ref.shape or not torch.equal(got.isfinite(), ref.isfinite()):
        return float("inf")
    if not got.numel():
        return 0.0
    allowed = 2 * float((other - ref).abs().max()) + FLOOR[dtype] * max(float(ref.abs().max()), 1e-30)
    return float((got - ref).abs().max()) / allowed


def _norm(t: dict[str, Tensor], name: str, training: bool) -> functional.BatchNorm:
    return functional.BatchNorm(
        t[f"{name}.weight"], t[f"{name}.bias"], t[f"{name}.mean"], t[f"{name}.var"], None, 0.1, 1e-5, training
    )


def _pointwise(weight: Tensor) -> nn.Conv2d:
    """A 1x1 convolution with this very tensor as its weight, so that the cases stay functions of tensors."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False, device="meta")
    del conv.weight
    conv.weight = weight
    return conv


def _rand(
    g: torch.Generator, device: torch.device, *shape: int, scale: float = 1.0, shift: float = 0.0
) -> Tensor:
    return (torch.randn(shape, generator=g) * scale + shift).to(device)


def _norm_tensors(g: torch.Generator, device: torch.device, name: str, channels: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": _rand(g, device, channels, scale=0.3, shift=1.0),
        f"{name}.bias": _rand(g, device, channels, scale=0.3),
        f"{name}.mean": _rand(g, device, channels, scale=0.2),
        f"{name}.var": _rand(g, device, channels, scale=0.1).abs() + 0.8,
    }


def cases(
    device: torch.device, small: bool = False, shape: tuple[int, int, int, int] | None = None
) -> Iterator[Case]:
    """Every operation, in float32 on ``device``; ``small`` shapes suit the interpreter, ``shape`` sets another."""
    g = torch.Generator().manual_seed(0)
    n, c, h, w = shape or ((2, 8, 5, 6) if small else (4, 48, 13, 14))
    rand, norm = partial(_rand, g, device), partial(_norm_tensors, g, device)
    y = rand(n, c, h, w, scale=1.5, shift=0.5)
    other = rand(n, c, h, w)
    both = {**norm("bn", c), **norm("bn2", c)}
    running = ("bn.mean", "bn.var")
    for training in (True, False):
        tag, kept = ("", running) if training else (", running statistics", ())
        one = {**norm("bn", c), "y": y}
        for name, run_, tensors in (
            ("batch norm", _plain, one),
            ("batch norm + ReLU", _relu, one),
            ("block end", _end, {**one, "identity": other}),
            ("stem pool", _pool, one),
            ("block end with downsample", _pair_end, {**both, "y": y, "x": other}),
        ):
            yield Case(f"{name}{tag}", tensors, partial(run_, training=training), kept)
    factor = torch.tensor([0.0, 1.25] * n)[:n].to(device)
    dropped = {**norm("bn", c), "y": y, "identity": other, "keep": factor}
    yield Case("block end with drop path", dropped, _end, running)
    yield Case("add + ReLU", {"a": y, "b": other}, lambda t: functional.add_relu(t["a"], t["b"]))
    wide = 2 * c
    fused = {
        **norm("bn", c), **norm("bn2", wide), "y": y, "identity": rand(n, wide, h, w),
        "weight": rand(wide, c, 1, 1, scale=c**-0.5),
    }  # fmt: skip
    yield Case("1x1 convolution to block end", fused, _widening, ("bn2.mean", "bn2.var"))
    blocks = {
        **norm("bn", c), **norm("bn2", c), **norm("bn3", wide), **norm("bn4", wide),
        "y": rand(n, wide, 2 * h + 1, 2 * w),
        "weight": rand(c, wide, 1, 1, scale=wide**-0.5), "weight3": rand(wide, c, 1, 1, scale=c**-0.5),
        "weight4": rand(wide, wide, 1, 1, scale=wide**-0.5),
    }  # fmt: skip
    yield Case("two bottlenecks, linked", blocks, _linked)
    square = dict(scale=(9 * c) ** -0.5)
    whole = {
        **{k: v for k, v in blocks.items() if k != "y"}, "y": rand(n, wide, 4 * h, 4 * w),
        "weight2": rand(c, c, 3, 3, **square),
    }  # fmt: skip
    yield Case("bottleneck by a program", whole, _bottleneck, programs=True)
    basic = {
        **norm("bn", c), **norm("bn2", c), **norm("bn3", c), "y": rand(n, c, 4 * h, 4 * w),
        "weight": rand(c, c, 3, 3, **square), "weight2": rand(c, c, 3, 3, **square),
        "weight3": rand(c, c, 1, 1, scale=c**-0.5),
    }  # fmt: skip
    yield Case("block of 3x3 convolutions by a program", basic, _basic_block, programs=True)


def inference_cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    """Every form of a convolution with its norm folded in, in float32 on ``device``."""
    g = torch.Generator().manual_seed(0)
    n, c, h, w = (2, 8, 5, 6) if small else (4, 48, 13, 14)
    rand, norm = partial(_rand, g, device), partial(_norm_tensors, g, device)
    square = {**norm("bn", c), "y": rand(n, c, h, w), "weight": rand(c, c, 3, 3, scale=(9 * c) ** -0.5)}
    yield Case("folded 3x3 + ReLU", square, _folded, inference=True)
    yield Case("folded 3x3 + ReLU, Winograd's form on a CPU", square, _folded_winograd, inference=True)
    end = {**square, "weight": rand(c, c, 1, 1, scale=c**-0.5), "identity": rand(n, c, h, w)}
    yield Case("folded 1x1 + add + ReLU", end, _folded, inference=True)
    yield Case("folded 3x3 + add + ReLU", {**end, "weight": square["weight"]}, _folded, inference=True)
    wide = 2 * c
    pair = {
        **norm("bn", wide), **norm("bn2", wide), "y": rand(n, c, h, w), "x": rand(n, wide, 2 * h - 1, 2 * w),
        "weight": rand(wide, c, 1, 1, scale=c**-0.5), "weight2": rand(wide, wide, 1, 1, scale=wide**-0.5),
    }  # fmt: skip
    yield Case("folded block end with downsample", pair, _folded_pair, inference=True)
    stem = {**norm("bn", c), "y": rand(n, 3, 2 * h, 2 * w), "weight": rand(c, 3, 7, 7, scale=147**-0.5)}
    yield Case("folded stem + pool", stem, _folded_stem, inference=True)


def training_cases(device: torch.device) -> Iterator[Case]:
    """Convolutions that ``auto`` trains on a CPU by a form of its own, where it does: none on other devices."""
    if device.type != "cpu" or INTERPRET:
        return
    g = torch.Generator().manual_seed(0)
    for name, side, stride, results in (("3x3", 3, 1, 64), ("strided 3x3", 3, 2, 64), ("1x1", 1, 1, 128)):
        tensors = {
            **_norm_tensors(g, device, "bn", results), "y": _rand(g, device, 2, 64, 28, 28),
            "weight": _rand(g, device, results, 64, side, side, scale=1 / (8 * side)),
        }  # fmt: skip
        run_ = partial(_convolution, stride=stride)
        yield Case(f"{name} convolution + batch norm + ReLU", tensors, run_, ("bn.mean", "bn.var"))


def _convolution(t: dict[str, Tensor], stride: int) -> Tensor:
    return functional.conv_bn_relu(t["y"], _given(t["weight"], stride), _norm(t, "bn", True)).tensor()


def _counted(t: dict[str, Tensor], name: str) -> functional.BatchNorm:
    """A norm on running statistics that may be folded."""
    return _norm(t, name, False)._replace(num_batches_tracked=torch.zeros((), dtype=torch.int64))


def _conv(weight: Tensor, stride: int = 1) -> nn.Conv2d:
    """A convolution with this weight as its parameter, which leaves the image's size to the stride."""
    n, c, k, _ = weight.shape
    conv = nn.Conv2d(c, n, k, stride, k // 2, bias=False, device="meta")
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return conv


def _folded(t: dict[str, Tensor]) -> Tensor:
    conv, bn = _conv(t["weight"]), _counted(t, "bn")
    if "identity" in t:
        return functional.add_relu(functional.conv_bn(t["y"], conv, bn), t["identity"])
    return functional.conv_bn_relu(t["y"], conv, bn).tensor()


def _folded_winograd(t: dict[str, Tensor]) -> Tensor:
    with functional.winograd("on"):
        return _folded(t)


def _folded_pair(t: dict[str, Tensor]) -> Tensor:
    branch = functional.conv_bn(t["y"], _conv(t["weight"]), _counted(t, "bn"))
    return functional.add_relu(branch, functional.conv_bn(t["x"], _conv(t["weight2"], 2), _counted(t, "bn2")))


def _folded_stem(t: dict[str, Tensor]) -> Tensor:
    return functional.max_pool(functional.conv_bn_relu(t["y"], _conv(t["weight"], 2), _counted(t, "bn")))


def _plain(t: dict[str, Tensor], training: bool = True) -> Tensor:
    return functional.batch_norm(t["y"], _norm(t, "bn", training))


def _relu(t: dict[str, Tensor], training: bool = True) -> Tensor:
    return functional.batch_norm(t["y"], _norm(t, "bn", training), relu=True)


def _end(t: dict[str, Tensor], training: bool = True) -> Tensor:
    branch = functional.conv_bn(t["y"], nn.Identity(), _norm(t, "bn", training))
    return functional.add_relu(branch, t["identity"], t.get("keep"))


def _pair_end(t: dict[str, Tensor], training: bool = True) -> Tensor:
    branch = functional.conv_bn(t["y"], nn.Identity(), _norm(t, "bn", training))
    return functional.add_relu(branch, functional.conv_bn(t["x"], nn.Identity(), _norm(t, "bn2", training)))


def _pool(t: dict[str, Tensor], training: bool = True) -> Tensor:
    return functional.max_pool(functional.conv_bn_relu(t["y"], nn.Identity(), _norm(t, "bn", training)))


def _widening(t: dict[str, Tensor]) -> Tensor:
    z = functional.conv_bn_relu(t["y"], nn.Identity(), _norm(t, "bn", True))
    branch = functional.conv_bn(z, _pointwise(t["weight"]), _norm(t, "bn2", True))
    return functional.add_relu(branch, t["identity"])


def _linked(t: dict[str, Tensor]) -> Tensor:
    """A block with a strided downsample and one without, with the same weights and nothing for a 3x3."""
    x: Tensor | functional.Linked = t["y"]
    for downsample in (True, False):
        z = functional.conv_bn_relu(x, _pointwise(t["weight"]), _norm(t, "bn", True))
        z = functional.conv_bn_relu(
            z, nn.MaxPool2d(1, 2) if downsample else nn.Identity(), _norm(t, "bn2", True)
        )
        branch = functional.conv_bn(z, _pointwise(t["weight3"]), _norm(t, "bn3", True))
        if not downsample:
            return functional.add_relu(branch, x)
        shortcut = _pointwise(t["weight4"])
        shortcut.stride = (2, 2)
        x = functional.add_relu_linked(branch, functional.conv_bn(x, shortcut, _norm(t, "bn4", True)))
    raise AssertionError


def _given(weight: Tensor, stride: int = 1) -> nn.Conv2d:
    """A convolution with this weight, of which a gradient is wanted."""
    n, c, k, _ = weight.shape
    conv = nn.Conv2d(c, n, k, stride, k // 2, bias=False, device="meta")
    conv._parameters["weight"] = weight  # type: ignore[assignment]
    return conv


def _bottleneck(t: dict[str, Tensor]) -> Tensor:
    """A whole one with a strided downsample."""
    z = functional.conv_bn_relu(t["y"], _given(t["weight"]), _norm(t, "bn", True))
    z = functional.conv_bn_relu(z, _given(t["weight2"], 2), _norm(t, "bn2", True))
    shortcut = functional.conv_bn(t["y"], _given(t["weight4"], 2), _norm(t, "bn4", True))
    return functional.add_relu(functional.conv_bn(z, _given(t["weight3"]), _norm(t, "bn3", True)), shortcut)


def _basic_block(t: dict[str, Tensor]) -> Tensor:
    """A whole one with a strided downsample."""
    z = functional.conv_bn_relu(t["y"], _given(t["weight"], 2), _norm(t, "bn", True))
    shortcut = functional.conv_bn(t["y"], _given(t["weight3"], 2), _norm(t, "bn3", True))
    return functional.add_relu(functional.conv_bn(z, _given(t["weight2"]), _norm(t, "bn2", True)), shortcut)


def bn_relu(tensors: dict[str, Tensor]) -> Case:
    """Batch norm with batch statistics and ReLU of ``y``."""
    return Case("batch norm + ReLU", tensors, _relu)


def block_end(tensors: dict[str, Tensor]) -> Case:
    """The block end of ``y`` and ``identity`` with batch statistics."""
    return Case("block end", tensors, _end)


def stem_pool(tensors: dict[str, Tensor]) -> Case:
    """Batch norm, ReLU and pooling of ``y`` with batch statistics."""
    return Case("stem pool", tensors, _pool)


def leaves(case: Case, dtype: torch.dtype, memory: torch.memory_format) -> dict[str, Tensor]:
    """Copies of a case's inputs in ``dtype`` and layout, with gradients wanted."""
    return _cast(case.tensors, dtype, memory, False)


def _cast(
    tensors: dict[str, Tensor], dtype: torch.dtype, memory: torch.memory_format, wide: bool
) -> dict[str, Tensor]:
    """Inputs of one run: activations and weights rounded to ``dtype`` (then held in float64 if ``wide``)."""
    out = {}
    for name, t in tensors.items():
        v = t.to(dtype) if t.dim() == 4 else t.clone()
        v = v.double() if wide else v
        if v.dim() == 4:
            v = v.clone().contiguous(memory_format=memory)
        leaf = name != "keep" and not name.endswith((".mean", ".var"))
        out[name] = v.detach().requires_grad_(leaf)
    return out


def _outcome(case: Case, tensors: dict[str, Tensor], dz: Tensor) -> dict[str, Tensor]:
    if case.inference:
        with torch.no_grad():
            return {"result": case.run(tensors)}
    result = case.run(tensors)
    leaves = {k: t for k, t in tensors.items() if t.requires_grad}
    grads = torch.autograd.grad(result, list(leaves.values()), dz.to(result.dtype))
    found = {"result": result, **{f"gradient of {k}": v for k, v in zip(leaves, grads, strict=True)}}
    return {**found, **{k: tensors[k] for k in case.buffers}}


def check(
    case: Case, dtype: torch.dtype, memory: torch.memory_format, route: str, device: torch.device
) -> Result:
    """Run one case on ``route`` (a backend's name) and on PyTorch in ``dtype`` and float64."""
    layout = "channels_last" if memory == torch.channels_last else "NCHW"
    used, worst, what, error = route, 0.0, "", ""
    exact = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = exact or case.programs
    try:
        with functional.backend("aten"), functional.folding("off"):
            # The gradient that comes in is rounded as the kernels will see it.
            with torch.no_grad():
                shape = case.run(_cast(case.tensors, dtype, memory, False)).shape
            dz = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            dz = dz.contiguous(memory_format=memory)
            eager = _outcome(case, _cast(case.tensors, dtype, memory, False), dz)
            ref = _outcome(case, _cast(case.tensors, dtype, memory, True), dz.double())
        with functional.backend(route), functional.record_routes() as log:
            ours = _outcome(case, _cast(case.tensors, dtype, memory, False), dz)
            before = ours
            for _ in range(3 if case.programs else 0):  # the second step is written down
                ours = _outcome(case, _cast(case.tensors, dtype, memory, False), dz)
        used = "+".join(dict.fromkeys(c.route for c in log)) or route
        for name in ref:
            precision = dtype if ours[name].dtype.itemsize >= dtype.itemsize else ours[name].dtype
            ratio = worst_ratio(ours[name], eager[name], ref[name], precision)
            if case.programs:  # whose parts are held against float64 by themselves
                ratio = 0.0 if torch.equal(ours[name], before[name]) else float("inf")
            if ratio >= worst:
                worst, what = ratio, name
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    finally:
        torch.backends.cudnn.deterministic = exact
    return Result(case.name, str(dtype)[6:], layout, used, worst, what, error)


def run(device: torch.device, small: bool = INTERPRET) -> Iterator[Result]:
    """Every case in every dtype and layout that this device's route serves."""
    gpu = device.type == "cuda"
    route, inference = ("triton", "triton") if gpu or INTERPRET else ("reference", "auto")
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if gpu else [torch.float32, torch.bfloat16]
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # fp32 is checked as fp32
    try:
        found = [(case, route) for case in cases(device, small=small)]
        found += [(case, inference) for case in inference_cases(device, small=small)]
        found += [(case, "auto") for case in training_cases(device)]
        for case, asked in found:
            for dtype in dtypes:
                for memory in (torch.contiguous_format, torch.channels_last):
                    yield check(case, dtype, memory, asked, device)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
