"""Bytes of plans that nobody runs here: torch.compile's kernels, modelled, and the least that is known to suffice.

``compiled`` regroups an eager trace the way torch.compile's code generator does, by rules that favour it:

    inline      an elementwise result is recomputed in each of its consumers instead of stored, unless a convolution or
                another kernel of its own reads it, the backward keeps it, or it has several consumers and more than
                four operands (``torch._inductor.config.realize_reads_threshold``)
    vertical    a stored elementwise result that a reduction over it needs is made in that reduction's kernel
    horizontal  kernels over equally many values that read a common value and do not depend on each other are one
    pooling     keeps one byte a window where eager keeps an int64

Rounding between eager kernels, split reductions' workspaces and missed fusions are left out. It is a model: no figure
of it was measured.

``ideal`` prices every convolution with its norm, ReLU and sum as one kernel, forward and backward: a raw output is
written once and read once by the next convolution. In a Bottleneck the last convolution and the downsample follow the
moment form, which never stores their output, and the block's output feeds the next convolution while it is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.meter import Pass
from benchmarks.passes import EXTERN, POINTWISE, REDUCTION

__all__ = ["Convolution", "compiled", "convolutions", "ideal"]

_THRESHOLD = 4  # realize_reads_threshold
_WINDOW = 12  # how many earlier kernels a kernel may join


# --------------------------------------------------------------------------------------------------- torch.compile


class _Kernel:
    """A kernel being put together: the values it reads and writes, by number, with their bytes."""

    def __init__(self, p: Pass, reads: dict[int, int]) -> None:
        self.first, self.kind, self.names = p, p.kind, [p.kernel]
        self.reads, self.writes = dict(reads), dict(p.writes)
        self.size = max([b for _, b in (*p.reads, *p.writes)], default=0)

    def joined(self) -> Pass:
        reads = {v: b for v, b in self.reads.items() if v not in self.writes}
        name = "+".join(dict.fromkeys(self.names))
        return self.first._replace(kernel=name, reads=tuple(reads.items()), writes=tuple(self.writes.items()))


def _consumers(passes: list[Pass]) -> dict[int, list[Pass]]:
    users: dict[int, list[Pass]] = {}
    for p in passes:
        for v, _ in p.reads:
            users.setdefault(v, []).append(p)
    return users


def _stored(p: Pass, users: list[Pass], operands: int) -> bool:
    if not users or len(users) > 1 and operands > _THRESHOLD:
        return True
    return any(u.kind == EXTERN or u.phase != p.phase for u in users)


def _small_indices(p: Pass, taps: set[int]) -> Pass:
    """Pooling with one byte a window; ``taps`` remembers the values that are indices."""
    if p.kernel == "max_pool2d_with_indices" and len(p.writes) > 1:
        (out, bytes_), (index, wide) = p.writes[:2]
        taps.add(index)
        return p._replace(writes=((out, bytes_), (index, wide // 8)))
    return p._replace(reads=tuple((v, b // 8 if v in taps else b) for v, b in p.reads))


def _join(kernels: list[_Kernel], new: _Kernel) -> bool:
    """Put ``new`` into an earlier kernel if the rules allow; True if it was."""
    made: dict[int, int] = {}  # value -> index of the kernel in the window that writes it
    window = kernels[-_WINDOW:]
    for i, k in enumerate(window):
        made.update(dict.fromkeys(k.writes, i))
    blocked: set[int] = set()  # kernels that ``new`` depends on: it may only join one vertically
    todo = [made[v] for v in new.reads if v in made]
    while todo:
        i = todo.pop()
        if i not in blocked:
            blocked.add(i)
            todo += [made[v] for v in window[i].reads if v in made and made[v] != i]
    direct = {made[v] for v in new.reads if v in made}
    for i in range(len(window) - 1, -1, -1):
        k = window[i]
        if EXTERN in (k.kind, new.kind) or k.first.phase != new.first.phase or k.size != new.size:
            continue
        vertical = i in direct and new.kind == REDUCTION  # what k writes in full is elementwise
        between = any(j in direct for j in range(i + 1, len(window)))
        sideways = i not in blocked and k.kind == new.kind and not between
        large = {v for v, b in new.reads.items() if b == new.size}
        if (vertical and not between) or (sideways and large & set(k.reads)):
            k.reads.update({v: b for v, b in new.reads.items() if v not in k.writes})
            k.writes.update(new.writes)
            k.names += new.names
            k.kind = REDUCTION if REDUCTION in (k.kind, new.kind) else k.kind
            return True
    return False


def compiled(passes: list[Pass]) -> list[Pass]:
    """An eager trace regrouped by the rules above."""
    taps: set[int] = set()
    passes = [_small_indices(p, taps) for p in passes]
    users = _consumers(passes)
    inlined: dict[int, dict[int, int]] = {}
    kernels: list[_Kernel] = []
    for p in passes:
        reads: dict[int, int] = {}
        for v, b in p.reads:
            reads.update(inlined.get(v, {v: b}))
        large = sum(b == max(reads.values()) for b in reads.values()) if reads else 0
        if p.kind == POINTWISE and len(p.writes) == 1:
            (value, _) = p.writes[0]
            if not _stored(p, users.get(value, []), large):
                inlined[value] = reads
                continue
        kernel = _Kernel(p, reads)
        if not _join(kernels, kernel):
            kernels.append(kernel)
    return [k.joined() for k in kernels]


# ----------------------------------------------------------------------------------------------------------- ideal


class Convolution(NamedTuple):
    """A convolution of a trace; bytes of its input as far as it is read, of its weight and of its output."""

    layer: str
    x: int
    w: int
    y: int
    flops: int
    widens: bool  # 1x1 with more outputs than inputs


def convolutions(passes: Iterable[Pass]) -> list[Convolution]:
    """The forward convolutions of a trace, in order."""
    found = []
    for p in passes:
        if p.phase == "forward" and p.kernel == "convolution":
            (_, x), (_, w) = p.reads[:2]
            y = p.writes[0][1]
            # A dense 1x1 moves e M Cin, e Cin Cout and e M Cout bytes for 2 M Cin Cout flops, so that this is e.
            element = (x * w * y) ** (1 / 3) / max(p.flops / 2, 1) ** (2 / 3)
            widens = y > x and any(abs(element - e) < 1e-6 for e in (2, 4))
            found.append(Convolution(p.layer, x, w, y, p.flops, widens))
    return found


def _row(layer: str, phase: str, kernel: str, reads: int, writes: int, flops: int = 0) -> Pass:
    return Pass(layer, phase, kernel, EXTERN, ((-1, reads),), ((-2, writes),), flops, 0)


def _gram_flops(c: Convolution, element: int) -> int:
    """Of the second moments of its input: 2 M Cin^2."""
    cin = round(c.flops / 2 / (c.y / element))  # flops = 2 M Cin Cout, y = e M Cout
    return 2 * (c.x // element) * cin


def _bottleneck(convs: dict[str, Convolution], first: bool, element: int, train: bool) -> list[Pass]:
    c1, c2, c3, ds = convs["conv1"], convs["conv2"], convs["conv3"], convs.get("downsample")
    u, o = c1.x, c3.y
    e = element
    grams = _gram_flops(c3, e)
    rows = [
        _row(c1.layer, "forward", "conv1", (u if first else 0) + c1.w, c1.y, c1.flops),
        _row(c2.layer, "forward", "conv2", c1.y + c2.w, c2.y, c2.flops),
        _row(c3.layer, "forward", "moments", c2.y, 0, grams),
    ]
    if ds:
        rows.append(_row(ds.layer, "forward", "moments", ds.x, 0, _gram_flops(ds, e)))
    other = ds.x + ds.w if ds else o
    flops = c3.flops + (ds.flops if ds else 0)
    rows.append(_row(c3.layer, "forward", "block end", c2.y + c3.w + other, o + o // e // 8, flops))
    if not train:
        return rows
    dw = 4 // e
    rows += [
        _row(
            c3.layer,
            "backward",
            "P",
            o + c2.y + (ds.x if ds else 0),
            dw * (c3.w + (ds.w if ds else 0)),
            flops,
        ),
        _row(c3.layer, "backward", "dgrad", o + c2.y + c3.w, c2.y, c3.flops + grams),
        _row(c2.layer, "backward", "dgrad", 2 * c2.y + c1.y + c2.w, c2.y + c1.y, c2.flops),
        _row(c2.layer, "backward", "wgrad", c2.y + c1.y, dw * c2.w, c2.flops),
    ]
    if ds:
        rows.append(_row(ds.layer, "backward", "dgrad", o + ds.x + ds.w, ds.x, ds.flops + _gram_flops(ds, e)))
    side = ds.x if ds else u
    bits = 0 if first else u // e // 8
    rows += [
        _row(c1.layer, "backward", "dgrad", 2 * c1.y + c1.w + side + bits, c1.y + u, c1.flops),
        _row(c1.layer, "backward", "wgrad", c1.y + u, dw * c1.w, c1.flops),
    ]
    return rows


def _plain(c: Convolution, element: int, train: bool, end: int = 0, stem: bool = False) -> list[Pass]:
    """A convolution with norm and ReLU; ``end``: bytes of the identity where a block ends here."""
    out = end + end // element // 8 if end else 0
    rows = [_row(c.layer, "forward", "conv", c.x + c.w, c.y, c.flops)]
    if end:
        rows.append(_row(c.layer, "forward", "block end", c.y + end, out))
    if train:
        dw = 4 // element * c.w
        if stem:  # no gradient of the image; dy is made once, for the weight's gradient
            rows.append(_row(c.layer, "backward", "wgrad", c.y + c.x, dw, c.flops))
        else:
            rows.append(_row(c.layer, "backward", "dgrad", 2 * c.y + c.w + c.x + end, c.y + c.x, c.flops))
            rows.append(_row(c.layer, "backward", "wgrad", c.y + c.x, dw, c.flops))
    return rows


def _stem(c: Convolution, element: int, train: bool) -> list[Pass]:
    pooled, taps = c.y // 4, c.y // 4 // element
    rows = _plain(c, element, train, stem=True)
    rows.append(_row("bn1", "forward", "statistics", c.y, 0))
    rows.append(_row("bn1", "forward", "bn+relu+pool", c.y, pooled + (taps if train else 0)))
    if train:
        rows.append(_row("bn1", "backward", "pool+bn reduce", c.y + pooled + taps, 0))
        rows.append(_row("bn1", "backward", "pool+bn apply", c.y + pooled + taps, c.y))
    return rows


def _folded(convs: list[Convolution], blocks: dict[str, dict[str, Convolution]]) -> list[Pass]:
    """Inference: norms are in the weights, sum and ReLU in epilogues, a Bottleneck's downsample in its last product."""
    extra: dict[str, int] = {}  # bytes that a block's last convolution reads beside its own operands
    more: dict[str, int] = {}  # flops of the downsample's that is in its product
    joined = set()
    for block in blocks.values():
        last, ds = block[max(k for k in block if k.startswith("conv"))], block.get("downsample")
        if last.widens and ds:
            extra[last.layer], more[last.layer] = ds.x + ds.w, ds.flops
            joined.add(ds.layer)
        else:
            extra[last.layer] = last.y
    rows = []
    for c in convs:
        if c.layer not in joined:
            flops = c.flops + more.get(c.layer, 0)
            rows.append(_row(c.layer, "forward", "conv", c.x + c.w + extra.get(c.layer, 0), c.y, flops))
        if c.layer == "conv1":
            rows.append(_row("bn1", "forward", "pool", c.y, c.y // 4))
    return rows


def ideal(eager: list[Pass], element: int, train: bool) -> list[Pass]:
    """The plan of the module's docstring for the network of an eager trace; ``element``: bytes of an activation."""
    convs = convolutions(eager)
    blocks: dict[str, dict[str, Convolution]] = {}
    for c in convs:
        parts = c.layer.split(".")
        if parts[0].startswith("layer") and len(parts) > 2:
            blocks.setdefault(".".join(parts[:2]), {})[parts[2]] = c
    rest = [p for p in eager if p.phase == "optimizer" or p.layer in ("fc", "other")]
    if not train:
        return [*_folded(convs, blocks), *rest]
    rows: list[Pass] = []
    for c in convs:
        if not c.layer.startswith("layer"):
            rows += _stem(c, element, train) if c.layer == "conv1" else _plain(c, element, train)
    for i, block in enumerate(blocks.values()):
        if "conv3" in block and block["conv3"].widens:
            rows += _bottleneck(block, i == 0, element, train)
        else:
            last = max(k for k in block if k.startswith("conv"))
            for k, c in block.items():
                rows += _plain(c, element, train, c.y if k == last else 0)
    return [*rows, *rest]
