"""The bytes that torch.compile's kernels really move, by Nsight Compute, beside the model of ``benchmarks.plans``.

    python -m benchmarks.inductor --out inductor.txt          on a GPU with ncu
    python -m benchmarks.inductor --out inductor.txt --dry    on a CPU: the counted side alone

Each operation (norm + ReLU, block end, stem) is compiled in eager norms, run forward and backward, and every generated
kernel of its last run is listed with the bytes read and written, in MB and as passes over the activation. The model's
total for the same operation stands beside it.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, operations, prepare
from benchmarks.counted import counted
from benchmarks.declared import METRICS

__all__ = ["generated", "main", "report"]

_ALTERNATIVE = "compile channels_last"
_REPEATS = 3  # of a call; the first compile and tune, the last is looked at


def _cases(dry: bool) -> list[Case]:
    found = operations(2, 8) if dry else operations(64)
    return [c for c in found if not c.name.startswith("1x1")]


def generated(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    """By name of a kernel, in order of its last run: bytes read and written, and how often it ran, from ncu's CSV."""
    launches: dict[str, dict[str, Any]] = {}
    for r in csv.DictReader(line for line in lines if line.startswith('"')):
        kernel = launches.setdefault(r["ID"], {"name": r["Kernel Name"]})
        scale = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}.get(r["Metric Unit"], 1.0)
        kernel[r["Metric Name"]] = float(r["Metric Value"].replace(",", "")) * scale
    found: dict[str, dict[str, float]] = {}
    for k in launches.values():
        runs = found.pop(k["name"], {"runs": 0.0})["runs"]
        found[k["name"]] = {
            "read": k.get(METRICS[0], 0.0),
            "written": k.get(METRICS[1], 0.0),
            "runs": runs + 1,
        }
    return found


def report(
    case: Case, kernels: dict[str, dict[str, float]] | None, dtype: str, device: torch.device
) -> Iterator[str]:
    """Lines on one operation; ``kernels`` None where nothing was measured."""
    size = torch.Size(case.shapes[0]).numel() * (4 if dtype == "fp32" else 2)
    model = counted(case, _ALTERNATIVE, dtype, True, device)
    yield (
        f"{case.name}: model {model['bytes'] / 1e6:.1f} MB, {model['bytes'] / size:.1f} passes over the activation, "
        f"{model['kernels']} kernels"
    )
    if kernels is None:
        yield "  kernels: not measured"
        return
    total = 0.0
    for name, k in kernels.items():
        moved = k["read"] + k["written"]
        total += moved
        yield f"  {name[:70]:<70} R {k['read'] / size:5.2f}  W {k['written'] / size:5.2f}  {moved / 1e6:9.1f} MB"
    yield f"  generated kernels together {total / 1e6:.1f} MB, {total / size:.1f} passes"


def _run(case: Case, dtype: str, device: torch.device) -> None:
    """Compile and run one operation: the program to profile."""
    call = prepare(case, _ALTERNATIVE, device, {"fp32": torch.float32}.get(dtype, torch.bfloat16), True)
    for i in range(_REPEATS):
        call(i)
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inductor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--dry", action="store_true", help="tiny shapes; nothing is run")
    parser.add_argument(
        "--case", type=int, help="run this operation and nothing else: the program that is profiled"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bf16" if device.type == "cuda" else "fp32"
    cases = _cases(args.dry)
    if args.case is not None:
        _run(cases[args.case], dtype, device)
        return 0
    if args.out is None:
        parser.error("wanted --out")
    measured = not args.dry and device.type == "cuda" and shutil.which("ncu") is not None
    if not (measured or args.dry):
        print("ncu is not on the PATH" if device.type == "cuda" else "there is no CUDA device")
    lines, bad = [], 0
    for i, case in enumerate(cases):
        kernels = None
        if measured:
            command = [
                "ncu",
                "--clock-control",
                "none",
                "--csv",
                "--kernel-name",
                "regex:triton_",
                "--metrics",
            ]
            command += [",".join(METRICS), sys.executable, "-m", "benchmarks.inductor", "--case", str(i)]
            done = subprocess.run(command, capture_output=True, text=True)
            bad += done.returncode != 0
            kernels = generated(done.stdout.splitlines()) if done.returncode == 0 else None
        lines += report(case, kernels, dtype, device)
        args.out.write_text("\n".join(lines) + "\n")  # after each: the next may be stopped
    print("\n".join(lines))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
