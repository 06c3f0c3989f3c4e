"""Timing of alternatives in turn, on the CPU by the clock and on a GPU by events.

Alternatives are interleaved, so that a drift of the machine meets all of them, and each call gets the number of its
round, so that it can rotate among input sets larger than the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Sample", "interleaved", "seconds_a_call", "summary", "synchronize"]


class Sample(NamedTuple):
    """Seconds a call: quantiles over rounds."""

    median: float
    low: float  # 25th percentile
    high: float  # 75th percentile
    least: float
    rounds: int
    calls: int  # calls a round

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(f: Callable[[int], object], start: int, calls: int, device: torch.device) -> float:
    """Time of one region of ``calls`` calls, numbered from ``start``; on a GPU between two events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(calls):
            f(start + i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    t = time.perf_counter()
    for i in range(calls):
        f(start + i)
    return (time.perf_counter() - t) / calls


def summary(seconds: list[float], calls: int) -> Sample:
    """Quantiles of the rounds."""
    if len(seconds) == 1:
        s = seconds[0]
        return Sample(s, s, s, s, 1, calls)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Sample(median, low, high, min(seconds), len(seconds), calls)


def interleaved(
    alternatives: Mapping[str, Callable[[int], object]],
    device: torch.device,
    rounds: int = 15,
    region: float = 0.02,
    warmup: int = 3,
    budget: float = float("inf"),
) -> dict[str, Sample]:
    """Time each alternative ``rounds`` times in turn.

    Args:
        alternatives: name to a function of the call's number.
        device: where they run.
        rounds: timed regions of each, at least one.
        region: seconds that one timed region should last at least; calls are repeated to reach it.
        warmup: untimed calls of each first.
        budget: seconds after which no further round begins; one round is always made.
    """
    stop = time.perf_counter() + budget
    calls = {}
    for name, f in alternatives.items():
        for i in range(warmup):
            f(i)
        synchronize(device)
        calls[name] = max(1, min(1000, int(region / max(seconds_a_call(f, 0, 1, device), 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for r in range(max(1, rounds)):
        if r and time.perf_counter() > stop:
            break
        for name, f in alternatives.items():
            seconds[name].append(seconds_a_call(f, r * calls[name], calls[name], device))
    return {name: summary(s, calls[name]) for name, s in seconds.items()}
