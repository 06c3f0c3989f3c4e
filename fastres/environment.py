"""What a result depends on beside the code: versions, device, switches. For reports and for every measured row."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from fastres._version import __version__
from fastres.functional import get_backend
from fastres.kernels import _native, _tuned
from fastres.kernels._triton import HAS_TRITON, INTERPRET, TRITON_ERROR

__all__ = ["environment", "gpu_state"]

OPTIONAL = (
    "torchvision",
    "timm",
    "mmengine",
    "mmpretrain",
    "pytest",
    "pytest-benchmark",
    "matplotlib",
    "tqdm",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def gpu_state(index: int = 0) -> dict[str, str]:
    """Driver, clocks, power limit and temperature as nvidia-smi tells them now; empty where it does not."""
    fields = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "power.limit",
        "temperature.gpu",
        "utilization.gpu",
    )
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={index}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = [v.strip() for v in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def environment() -> dict[str, Any]:
    """Versions, processor, GPU, backend and tuning table; plain values, in the order to print them."""
    found: dict[str, Any] = {
        "fastres": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton") if HAS_TRITON else f"not usable: {TRITON_ERROR}",
        "cuda": torch.version.cuda or "",
        "cudnn": torch.backends.cudnn.version() or "" if torch.cuda.is_available() else "",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # the rules of a CPU go by them
        "compiled_loops": _native.native_obstacle() or str(_native.built_at()),
        "threads": torch.get_num_threads(),
        "gpu": "",
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
            **gpu_state(),
        }
    found |= {
        "backend": get_backend(),
        "interpreter": INTERPRET,
        "tuning_table": _tuned.active().source,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "variables": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("FASTRES_")),
    }
    return found | {name: v for name in OPTIONAL if (v := _version(name))}
