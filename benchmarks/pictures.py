"""The report's pictures, as PNG bytes; matplotlib is needed."""

from __future__ import annotations

import io
from typing import Any

from benchmarks.bytes import COLUMNS, Count, block_of, totals
from benchmarks.cases import NAMES

__all__ = ["NOT_MEASURED", "bars", "bounds", "images", "kinds", "layers", "memory", "rate", "roofline", "speed",
           "waterfall"]  # fmt: skip

NOT_MEASURED = "not measured"
COLORS = {
    "eager": "#8c8c8c",
    "compile": "#3b78b5",
    "fastres": "#c8553d",
    "ideal": "#5b9a5b",
    "timm": "#9467bd",
}

Row = dict[str, Any]


def rate(value: float, unit: str) -> str:
    """A rate a second with the prefix that leaves one to three digits before the point."""
    factor, prefix = next(((f, p) for f, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= f), (1.0, ""))
    return f"{value / factor:.3g} {prefix}{unit}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _color(name: str) -> str:
    return next((c for start, c in COLORS.items() if name.startswith(start)), "#b0a030")


def _figure(width: float, height: float, panels: int = 0) -> Any:
    """A figure and its axes; with ``panels`` that many beside each other as a list, which share their axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shared = dict(ncols=panels, sharex=True, sharey=True, squeeze=False) if panels else {}
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **shared)
    return figure, (list(axes[0]) if panels else axes)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _label(what: tuple[Any, ...]) -> str:
    _, _, case, batch, _, dtype, mode = what
    return f"{case}\n{mode} {dtype} batch {batch}"


def bars(
    data: dict[tuple[Any, ...], dict[str, Row]], value: Any, xlabel: str, title: str, gaps: bool = True
) -> bytes:
    """Horizontal bars, a group for each case; ``value(row, group)`` or None. With ``gaps`` an alternative that another
    case has is shown as not measured where it is missing."""
    shown = {n for g in data.values() for n in g if value(g[n], g) is not None}
    names = [*(n for n in NAMES if n in shown), *sorted(shown - set(NAMES))]
    groups = [[n for n in names if gaps or n in g] for g in data.values()]
    figure, axes = _figure(9, max(2.5, 0.9 + sum(0.2 * len(g) + 0.25 for g in groups)))
    at, ticks = 0.0, []
    for group, here in zip(data.values(), groups, strict=True):
        ticks.append(at - (len(here) - 1) / 2)
        for n in here:
            v = value(group[n], group) if n in group else None
            if v is None:
                axes.text(0, at, f" {n}: {NOT_MEASURED}", va="center", fontsize=7, color="#777777")
            else:
                axes.barh(at, v, 0.85, color=_color(n), alpha=0.55 if "channels_last" not in n else 1.0)
                axes.text(v, at, f" {_number(v)}  {n}", va="center", fontsize=7)
            at -= 1
        at -= 1.2
    axes.set_yticks(ticks, [_label(w) for w in data], fontsize=8)
    axes.set_ylim(at + 1.5, 1)
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.28)
    axes.set_xlim(left=0)
    return _png(figure)


def speed(row: Row, group: dict[str, Row]) -> float | None:
    """Against eager channels_last as timed in turn with this row; rows without it are not compared."""
    base = row.get("reference_s")
    return base / row["median_s"] if base else None


def memory(row: Row, group: dict[str, Row]) -> float | None:
    return row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None


def images(row: Row, group: dict[str, Row]) -> float | None:
    return row["images_per_s"]


def waterfall(count: Count, bandwidth: float, peak: float, title: str) -> bytes:
    """Where the milliseconds of a step must go: the bound of each block in each column, from the first layer on."""
    ms: dict[str, dict[str, float]] = {}
    for c in COLUMNS:
        ms[c] = {}
        for p in count.passes[c]:
            block = block_of(p.layer)
            ms[c][block] = ms[c].get(block, 0.0) + p.seconds(bandwidth, peak) * 1e3
    names = _in_order(ms)
    figure, panels = _figure(10.5, 1.4 + 0.21 * len(names), len(ms))
    for axes, (column, group) in zip(panels, ms.items(), strict=True):
        left = 0.0
        for y, n in enumerate(names):
            axes.barh(-y, group.get(n, 0.0), 0.8, left=left, fill=False, ec=_color(column), hatch="////")
            left += group.get(n, 0.0)
            axes.text(left, -y, f" {_number(group.get(n, 0.0))}", va="center", fontsize=7)
        model = " (model)" if column in ("compile", "ideal") else ""
        size = totals(count.passes[column], bandwidth, peak)["GB"]
        axes.set_title(f"{column}{model}\n{left:.1f} ms, {size:.1f} GB", loc="left", fontsize=9)
        axes.set_xlabel("ms at the least, not measured", fontsize=8)
    return _cascade(figure, panels, names, ms, title)


def layers(
    times: dict[str, dict[str, dict[str, float]]], least: dict[str, dict[str, float]], limits: str, title: str
) -> bytes:
    """Waterfall of a step as measured: a row for each block in the order of the network, its bar beginning where the
    one before ended, forward and backward; the block's bound as an outline where there is one.

    Args:
        times: alternative -> layer -> phase -> milliseconds.
        least: alternative -> block -> milliseconds of the bound; empty where the limits are not known.
        limits: what the bounds were made of, for the legend.
        title: above the picture.
    """
    blocks: dict[str, dict[str, dict[str, float]]] = {}
    for alternative, found in times.items():
        for layer, phases in found.items():
            sums = blocks.setdefault(alternative, {}).setdefault(block_of(layer), {})
            for phase, ms in phases.items():
                sums[phase] = sums.get(phase, 0.0) + ms
    whole = {a: {n: sum(p.values()) for n, p in g.items()} for a, g in blocks.items()}
    names = _in_order(whole)
    figure, panels = _figure(9.5, 1.5 + 0.21 * len(names), len(blocks))
    for axes, (alternative, group) in zip(panels, blocks.items(), strict=True):
        left, bound = 0.0, least.get(alternative, {})
        for y, n in enumerate(names):
            start = left
            for phase, alpha in (("forward", 1.0), ("backward", 0.5), ("optimizer", 0.5)):
                width = group.get(n, {}).get(phase, 0.0)
                axes.barh(-y, width, 0.8, left=left, color=_color(alternative), alpha=alpha)
                left += width
            if n in bound:
                axes.barh(-y, bound[n], 0.8, left=start, fill=False, ec="black", lw=0.9)
            right = max(left, start + bound.get(n, 0.0))
            axes.text(right, -y, f" {_number(left - start)}", va="center", fontsize=7)
        total = f", bound {_number(sum(bound.values()))} ms" if bound else f", bound {NOT_MEASURED}"
        axes.set_title(f"{alternative}\n{_number(left)} ms measured{total}", loc="left", fontsize=9)
        axes.set_xlabel("ms, measured", fontsize=8)
    shades = [("forward", dict(color="#777777")), ("backward, optimizer", dict(color="#777777", alpha=0.5))]
    shades += [(f"bound: {limits}", dict(fill=False, ec="black"))] if any(least.values()) else []
    handles = [panels[0].barh(0, 0, label=label, **style) for label, style in shades]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=7, frameon=False)
    return _cascade(figure, panels, names, whole, title)


def _in_order(ms: dict[str, dict[str, float]]) -> list[str]:
    """Blocks in the order of the network, as the first alternative that has them met them."""
    names, last = dict.fromkeys(n for g in ms.values() for n in g), ("fc", "other", "optimizer")
    return [*(n for n in names if n not in last), *(n for n in last if n in names)]


def _cascade(
    figure: Any, panels: list[Any], names: list[str], ms: dict[str, dict[str, float]], title: str
) -> bytes:
    widest = max(sum(g.values()) for g in ms.values())
    for axes in panels:
        axes.set_xlim(0, widest * 1.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks([-y for y in range(len(names))], names, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return _png(figure)


def kinds(rows: dict[str, Row], title: str) -> bytes:
    """Where the milliseconds of a profiled step went, by kind of kernel."""
    from matplotlib import colormaps

    ms = {n: r["kinds_ms"] for n, r in rows.items()}
    names = sorted(
        {k for g in ms.values() for k in g}, key=lambda k: -max(g.get(k, 0.0) for g in ms.values())
    )
    labels = {n: f"{sum(g.values()):.1f} ms" for n, g in ms.items()}
    ticks = [n.replace(" channels_last", "\nchannels_last") for n in ms]
    figure, axes = _figure(9.5, 1.9 + 0.6 * len(ms))
    widest = max((sum(g.values()) for g in ms.values()), default=1.0)
    for y, (column, parts) in enumerate(ms.items()):
        left = 0.0
        for i, n in enumerate(names):
            width = parts.get(n, 0.0)
            shade = i / max(len(names) - 1, 1)
            color, label = colormaps["viridis"](shade), n if y == 0 else None
            axes.barh(-y, width, 0.7, left=left, color=color, ec="white", lw=0.4, label=label)
            if width > 0.05 * widest:
                dark = "black" if shade > 0.7 else "white"
                axes.text(
                    left + width / 2, -y, _number(width), ha="center", va="center", fontsize=7, color=dark
                )
            left += width
        axes.text(left, -y, f"  {labels[column]}", va="center", fontsize=9)
    axes.set_yticks([-y for y in range(len(ms))], ticks, fontsize=8)
    figure.legend(loc="outside lower left", ncols=8, fontsize=7, frameon=False)
    axes.set_xlabel("ms a step, profiled")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(0, widest * 1.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def roofline(rows: list[Row], bandwidth: float | None, peak: float | None, source: str, title: str) -> bytes:
    """Measured calls by counted bytes and time, with the line that bytes alone allow; hollow where flops allow less."""
    figure, axes = _figure(9, 5)
    seen: set[str] = set()
    for r in rows:
        x, y, n = r["bytes"] / 1e6, r["median_s"] * 1e6, r["alternative"]
        bound = bandwidth and peak and r["flops"] / peak > r["bytes"] / bandwidth
        marker = {"operations": "o", "blocks": "s"}.get(r["suite"], "*")
        axes.scatter(
            [x], [y], s=70 if marker == "*" else 28, marker=marker, color=_color(n),
            facecolors="none" if bound else _color(n), alpha=0.55 if "channels_last" not in n else 0.95,
            label=None if _short(n) in seen else _short(n),
        )  # fmt: skip
        seen.add(_short(n))
    if bandwidth:
        low, high = min(r["bytes"] for r in rows) / 2e6, max(r["bytes"] for r in rows) / 0.5e6
        line = [v * 1e12 / bandwidth for v in (low, high)]
        axes.plot([low, high], line, color="black", lw=1, label=f"{rate(bandwidth, 'B/s')}, {source}")
    else:
        axes.text(0.98, 0.03, "bandwidth: not measured", transform=axes.transAxes, fontsize=9, ha="right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(
        "MB moved by a call, counted (circles operations, squares blocks, stars networks; pale: NCHW; hollow: flops)"
    )
    axes.set_ylabel("us, measured (median)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=7, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _short(name: str) -> str:
    return name.split(" ")[0]


def bounds(count: Count, rows: dict[str, Row], bandwidth: float, peak: float, title: str) -> bytes:
    """Every kernel of eager and fastres by bytes and least time, with the bandwidth line; measured steps as stars."""
    figure, axes = _figure(9, 5)
    for c in ("eager", "fastres"):
        kernels = [p for p in count.passes[c] if p.bytes > 1e5]
        x = [p.bytes / 1e6 for p in kernels]
        y = [p.seconds(bandwidth, peak) * 1e6 for p in kernels]
        axes.scatter(x, y, s=14, alpha=0.5, color=_color(c), label=f"{c}: kernels, least time (counted)")
    low, high = 0.1, 4e5
    axes.plot(
        [low, high], [v * 1e6 / bandwidth * 1e6 for v in (low, high)], color="black", lw=1, label="bandwidth"
    )
    marked = False
    for n, r in rows.items():
        column = "fastres" if n.startswith("fastres") else "eager" if n.startswith("eager") else None
        if column:
            x_mb = totals(count.passes[column], bandwidth, peak)["GB"] * 1e3
            axes.scatter(
                [x_mb],
                [r["median_s"] * 1e6],
                marker="*",
                s=140,
                color=_color(n),
                label=f"{n}: step, measured",
            )
            marked = True
    if not marked:
        axes.text(
            0.02, 0.94, f"whole steps: {NOT_MEASURED}", transform=axes.transAxes, fontsize=9, color="#777777"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB moved, counted")
    axes.set_ylabel("us: of kernels at the least, of steps measured")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=7, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
