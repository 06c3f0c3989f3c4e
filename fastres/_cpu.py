"""What a CPU does beside ATen's own operators and oneDNN's fused ones: the rules, as measured, and the switches.

In training ``auto`` takes ATen's operators on a CPU, except that 3x3 convolutions of stride 1 take Winograd's form, or
some of their three products do, where that is faster by the figures of docs/CPU.md. It needs channels_last, gradients
enabled, no autocast; ``auto`` takes it for float32 and batch statistics only, and on processors with AVX2 or AVX-512.
``backend("aten")`` turns it off, and ``winograd("on" | "off")`` or FASTRES_WINOGRAD says so alone. Folded
convolutions have a rule of their own.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastres import _routing
from fastres._convolution import plain_conv
from fastres.kernels import _native
from fastres.kernels._launch import channels_last
from fastres.kernels._switch import from_environment, switched
from fastres.kernels._triton import INTERPRET
from fastres.kernels.folded_conv import Geometry
from fastres.kernels.winograd_native import TILE
from fastres.kernels.winograd_products import products_serve

__all__ = ["WINOGRAD", "obstacle", "folded_tile", "looped", "measured", "rule", "winograd_tiles"]

WINOGRAD = ("auto", "on", "off")


class _Cost(NamedTuple):
    """What Winograd's form costs beside the direct form, whose multiplications count 1; fitted to measured times of
    ResNet's 3x3 convolutions (docs/CPU.md, docs/INFERENCE.md). By side of the tiles where it is a pair."""

    transforms: tuple[float, float]  # channels that make the products cost as much as the transforms do
    packing: tuple[float, float]  # of a weight, in tiles
    product: float = 1.0  # a multiplication
    calls: float = 0.0  # of operators, in multiplications


# By the processor's instructions; the form is not taken where nobody has measured it.
_FOLDED = {
    "AVX2": _Cost((130, 160), (25, 25)),
    "AVX512": _Cost((57, 106), (10, 12), product=1.12, calls=9e6),
}
_TRAINED = {
    "AVX2": _Cost((130, 160), (50, 150)),
    "AVX512": _Cost((57, 106), (150, 200), product=1.12, calls=9e6),
}
# The compiled loops have tiles of 4 alone; the figures hold with AVX2 and with AVX-512.
_NATIVE, _NATIVE_WEIGHTS = (_Cost((math.inf, 27), (0, packing), product=1.1) for packing in (80, 30))
_NATIVE_FOLDED = _Cost((math.inf, 27), (0, 8), product=1.3)
# The weight gradient's products are PyTorch's. With AVX-512 oneDNN's direct form is 2.5 times as fast as those.
_WEIGHTS = {"AVX2": _TRAINED["AVX2"]}
_TILES = (2, 4)
_NARROWEST = (1, 48)  # with fewer channels the direct form is too exact for tiles of 4
_DIRECT_WEIGHTS = 1.6  # a multiplication of the direct form's weight gradient
_LOOPED_WEIGHTS = {"AVX2": 0.9, "AVX512": 0.7}  # where that is made by the compiled loops
_LOOPED = {"AVX2": (3,), "AVX512": (1, 3)}  # kernels whose weight gradients the compiled loops make faster
_FEWEST = 1e7  # multiplications of a weight gradient that the compiled loops make


class _Setting:
    instructions: str = torch.backends.cpu.get_cpu_capability()
    winograd: str = from_environment("FASTRES_WINOGRAD", "auto", WINOGRAD)


def winograd(mode: str) -> AbstractContextManager[None]:
    """Whether 3x3 convolutions take Winograd's form on a CPU: ``on`` wherever it applies, ``off``, or
    ``auto``, where it was measured to be faster (process-wide). ValueError for another mode."""
    return switched(_Setting, "winograd", mode, WINOGRAD)


def obstacle(x: Tensor) -> str:
    """Why the form cannot take this activation; empty where it can."""
    if INTERPRET or x.device.type != "cpu" or _routing._Setting.assumed or _routing.get_backend() != "auto":
        return "not the CPU under backend 'auto'"
    if _routing.transformed():
        return "inside a transform of torch.func"
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "neither float32 nor float64, or under autocast"
    if not torch.is_grad_enabled():
        return "gradients are not enabled"
    if x.dim() != 4 or not x.numel() or not channels_last(x):
        return "input is not channels_last"
    return ""


def _cost(costs: dict[str, _Cost]) -> _Cost | None:
    """This processor's. ``winograd("on")`` asks for the best of the tiles where there are no figures, too."""
    return costs.get(_Setting.instructions, costs["AVX2"] if _Setting.winograd == "on" else None)


def _tile(shape: tuple[int, ...], inputs: int, outputs: int, cost: _Cost | None, direct: float = 1.0) -> int:
    """Side of the tiles by which a 3x3 convolution is expected to be fastest: 2, 4, or 0 for none.

    The expectation counts multiplications a pair of channels; a tile costs (tile + 2)^2, and as much again as its
    transforms take, which is the more the fewer channels share them.

    Args:
        shape: B, H, W of the result.
        inputs, outputs: channels.
        cost: of this processor, or None.
        direct: what a multiplication of the direct form costs.
    """
    if cost is None:
        return 0
    b, h, w = shape
    narrow = min(inputs, outputs)
    best, least = 0, 9 * b * h * w * direct
    for i, tile in enumerate(_TILES):
        tiles = b * (-(-h // tile)) * (-(-w // tile))
        units = tiles * (1 + cost.transforms[i] / narrow) + cost.packing[i]
        found = cost.product * (tile + 2) ** 2 * units + cost.calls / (inputs * outputs)
        if found < least and narrow >= _NARROWEST[i]:
            best, least = tile, found
    return best or (2 if _Setting.winograd == "on" else 0)


def folded_tile(weight: torch.Size, g: Geometry, out: tuple[int, ...], dtype: torch.dtype) -> int:
    """Side of the tiles by which a folded 3x3 convolution to a result of shape ``out`` takes Winograd's form, or 0.
    By figures in docs/INFERENCE.md."""
    if _Setting.winograd == "off" or dtype != torch.float32 or weight[2:] != (3, 3):
        return 0
    if g != ((1, 1), (1, 1), (1, 1), 1):
        return 0
    loops = _Setting.instructions in _FOLDED and _native.serves(dtype, weight[1], weight[0])
    cost = _NATIVE_FOLDED if loops else _cost(_FOLDED)
    return _tile((out[0], *out[2:]), weight[1], weight[0], cost)


def rule() -> tuple[str, ...]:
    """What ``folded_tile`` goes by beside the shapes."""
    return _Setting.winograd, _Setting.instructions, _native.native_obstacle()


def measured(conv: nn.Conv2d, x: Tensor, tile: int, weights: int) -> str:
    """The reason to give for Winograd's form of a convolution by these tiles (:func:`winograd_tiles`)."""
    loops = TILE in (tile, weights) and _native.serves(x.dtype, conv.in_channels, conv.out_channels)
    part = "; weight gradient only" if not tile else "; weight gradient direct" if not weights else ""
    return "cpu: measured" + ("; compiled loops" if loops else "") + part


def _plain(conv: nn.Module, x: Tensor, training: bool, wanted: bool) -> bool:
    """Whether a convolution, followed by a norm in training or not, is one that these forms may replace; ``wanted``:
    in any dtype and by any norm."""
    return (
        isinstance(conv, nn.Conv2d)
        and plain_conv(conv)
        and not obstacle(x)
        and x.shape[1] == conv.in_channels
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.weight.dtype == x.dtype
        and bool(x.requires_grad or conv.weight.requires_grad)
        and (wanted or training and x.dtype == torch.float32)
    )


def looped(conv: nn.Module, x: Tensor, training: bool) -> bool:
    """Whether the compiled loops make the weight gradient of a convolution, followed by a norm in training or not."""
    sides = _LOOPED.get(_Setting.instructions, ())
    if not sides or not _plain(conv, x, training, False):
        return False
    assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
    (side, *k), (stride, *s), (padding, *p) = conv.kernel_size, conv.stride, conv.padding
    if not conv.weight.requires_grad or side not in sides or (k, s, p) != ([side], [stride], [padding]):
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3] / stride**2
    many = pixels * conv.in_channels * conv.out_channels * side**2 >= _FEWEST
    return many and _native.serves(x.dtype, conv.in_channels, conv.out_channels)


def winograd_tiles(conv: nn.Module, x: Tensor, training: bool) -> tuple[int, int]:
    """Sides of the tiles by which a convolution, followed by a norm in training or not, takes Winograd's form: for
    forward and input gradient, and for the weight gradient; 0 where it does not."""
    mode = _Setting.winograd
    if mode == "off" or mode == "auto" and _Setting.instructions not in _TRAINED:
        return 0, 0
    if not _plain(conv, x, training, mode == "on"):
        return 0, 0
    assert isinstance(conv, nn.Conv2d)
    if (conv.kernel_size, conv.stride, conv.padding) != ((3, 3), (1, 1), (1, 1)):
        return 0, 0
    shape = (x.shape[0], *x.shape[2:])
    channels = conv.in_channels, conv.out_channels
    if _Setting.instructions in _TRAINED and _native.serves(x.dtype, *channels):
        direct = _LOOPED_WEIGHTS[_Setting.instructions]
        return _tile(shape, *channels, _NATIVE), _tile(shape, *channels, _NATIVE_WEIGHTS, direct)
    if mode != "on" and _Setting.instructions == "AVX512" and not products_serve(x.dtype):
        return 0, 0
    tile = _tile(shape, *channels, _cost(_TRAINED))
    if mode != "on" and _Setting.instructions not in _WEIGHTS:
        return tile, 0
    return tile, tile or _tile(shape, *channels, _cost(_WEIGHTS), _DIRECT_WEIGHTS)
