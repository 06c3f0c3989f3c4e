"""The report's pictures, as PNG bytes; matplotlib is needed."""

from __future__ import annotations

import io
from typing import Any

from benchmarks.bytes import COLUMNS, Count, block_of, totals
from benchmarks.cases import NAMES

__all__ = ["NOT_MEASURED", "bars", "bounds", "kinds", "memory", "roofline", "speed", "waterfall"]

NOT_MEASURED = "not measured"
COLORS = {
    "eager": "#8c8c8c",
    "compile": "#3b78b5",
    "fastres": "#c8553d",
    "ideal": "#5b9a5b",
    "timm": "#9467bd",
}

Row = dict[str, Any]


def _color(name: str) -> str:
    return next((c for start, c in COLORS.items() if name.startswith(start)), "#b0a030")


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _label(what: tuple[Any, ...]) -> str:
    _, _, case, batch, _, dtype, mode = what
    return f"{case}\n{mode} {dtype} batch {batch}"


def bars(data: dict[tuple[Any, ...], dict[str, Row]], value: Any, xlabel: str, title: str) -> bytes:
    """Horizontal bars, a group for each case; ``value(row, group)`` or None."""
    names = [n for n in NAMES if any(value(g[n], g) is not None for g in data.values() if n in g)]
    height = max(2.5, 0.6 + sum(0.2 * len(names) + 0.25 for _ in data))
    figure, axes = _figure(9, height)
    step = len(names) + 1.2
    for i, group in enumerate(data.values()):
        for j, n in enumerate(names):
            v = value(group[n], group) if n in group else None
            at = -(i * step + j)
            if v is None:
                axes.text(0, at, f" {n}: {NOT_MEASURED}", va="center", fontsize=7, color="#777777")
                continue
            shade = 0.55 if "channels_last" not in n else 1.0
            axes.barh(at, v, 0.85, color=_color(n), alpha=shade)
            axes.text(v, at, f" {v:.2f}  {n}", va="center", fontsize=7)
    axes.set_yticks(
        [-(i * step + (len(names) - 1) / 2) for i in range(len(data))], [_label(w) for w in data], fontsize=8
    )
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


def waterfall(count: Count, bandwidth: float, peak: float, title: str) -> bytes:
    """Where the milliseconds of a step must go: the bound of each block in each column, from the first layer on."""
    ms: dict[str, dict[str, float]] = {}
    for c in COLUMNS:
        ms[c] = {}
        for p in count.passes[c]:
            block = block_of(p.layer)
            ms[c][block] = ms[c].get(block, 0.0) + p.seconds(bandwidth, peak) * 1e3
    names = sorted({n for g in ms.values() for n in g}, key=lambda n: (n.startswith("layer"), n))
    names = [n for n in names if n not in ("fc", "other", "optimizer")] + ["fc", "other", "optimizer"]
    labels = {
        c: f"{sum(ms[c].values()):.1f} ms, {totals(count.passes[c], bandwidth, peak)['GB']:.1f} GB"
        for c in COLUMNS
    }
    ticks = ["eager", "torch.compile\n(model)", "fastres", "ideal\n(model)"]
    return _stacked(
        ms, names, ticks, labels, "ms a step at the least: bytes or flops, whichever takes longer", title
    )


def kinds(rows: dict[str, Row], title: str) -> bytes:
    """Where the milliseconds of a profiled step went, by kind of kernel."""
    ms = {n: r["kinds_ms"] for n, r in rows.items()}
    names = sorted(
        {k for g in ms.values() for k in g}, key=lambda k: -max(g.get(k, 0.0) for g in ms.values())
    )
    labels = {n: f"{sum(g.values()):.1f} ms" for n, g in ms.items()}
    ticks = [n.replace(" channels_last", "\nchannels_last") for n in ms]
    return _stacked(ms, names, ticks, labels, "ms a step, profiled", title)


def _stacked(
    ms: dict[str, dict[str, float]], names: list[str], ticks: list[str], labels: dict[str, str], xlabel: str, title: str
) -> bytes:  # fmt: skip
    from matplotlib import colormaps

    figure, axes = _figure(9.5, 1.6 + 0.8 * len(ms))
    widest = max((sum(g.values()) for g in ms.values()), default=1.0)
    for y, (column, parts) in enumerate(ms.items()):
        left = 0.0
        for i, n in enumerate(names):
            width = parts.get(n, 0.0)
            shade = i / max(len(names) - 1, 1)
            axes.barh(-y, width, 0.7, left=left, color=colormaps["viridis"](shade), ec="white", lw=0.4)
            if width > 0.028 * widest:
                dark = "black" if shade > 0.7 else "white"
                axes.text(
                    left + width / 2, -y, n, ha="center", va="center", fontsize=6, color=dark, rotation=90
                )
            left += width
        axes.text(left, -y, f"  {labels[column]}", va="center", fontsize=9)
    axes.set_yticks([-y for y in range(len(ms))], ticks, fontsize=8)
    axes.set_xlabel(xlabel)
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
        axes.plot([low, high], line, color="black", lw=1, label=f"{bandwidth / 1e12:.2f} TB/s, {source}")
    else:
        axes.text(0.98, 0.03, "bandwidth: not measured", transform=axes.transAxes, fontsize=9, ha="right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB moved by a call, counted (circles operations, squares blocks, stars networks)")
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
    axes.set_xlabel("MB moved")
    axes.set_ylabel("us")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=7, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
