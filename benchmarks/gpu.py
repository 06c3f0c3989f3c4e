"""Everything worth half an hour of a GPU, in stages that each fit one call of at most eight minutes.

    python -m benchmarks.gpu --stage 1              environment, selfcheck, the GPU tests
    python -m benchmarks.gpu --stage 2              ceilings, ResNet-50 baselines, where their time goes
    python -m benchmarks.gpu --stage 3              tune; the table goes to --out
    python -m benchmarks.gpu --stage 4              fastres with that table: networks, blocks, operations; the report
    python -m benchmarks.gpu --stage 5              compute-sanitizer, bytes by Nsight Compute against the declared
    python -m benchmarks.gpu --stage all --dry      all of it at tiny sizes, on a CPU too

A step that is done for this commit, in an unchanged working tree, is not done again, so a stage that was cut off goes
on where it stopped (--again repeats). A step that fails does not stop the others; the exit code is 1 if any did. Every
stage writes its log, its state and at most six more files under --out. Where there is no repository, FASTRES_COMMIT
names the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.rows import RESULTS, ROOT, commit
from fastres.commands.tune import seconds

__all__ = ["STAGES", "Step", "main", "run_stage", "stages"]


class Step(NamedTuple):
    """A command with the share of the stage's time that it may take, the program it needs beside Python, and what it
    adds to the environment."""

    name: str
    command: list[str]
    share: float = 1.0
    needs: str = ""
    env: tuple[tuple[str, str], ...] = ()


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def stages(out: Path, dry: bool, limit: float) -> dict[int, list[Step]]:
    """The steps of every stage; ``limit`` seconds a stage."""
    text = str(out)
    tests = ["tests/test_cli.py"] if dry else ["tests"]
    rows = ["--out", text]
    tiny = ["--model", "resnet18", "--batch", "2", "--size", "32"]
    network = tiny if dry else ["--model", "resnet50", "--batch", "256", "--size", "224"]
    dtype = ["--dtype", "fp32" if dry else "bf16"]
    quick = ["--rounds", "2", "--region", "0.01s"] if dry else ["--rounds", "15"]
    every = [] if dry else ["--full"]
    small = ["--batch", "2", "--scale", "8"] if dry else ["--batch", "256"]
    budget = lambda share: ["--budget", f"{max(1.0, share * limit):.0f}s"]  # noqa: E731
    tuned = ["--model", "resnet50", "--batch", "256", *budget(0.85)]
    if dry:
        tuned = "--batch 1 --size 32 --dtype fp32 --rounds 1 --trial --budget 30s --out".split()
        tuned.append(f"{text}/tuned.json")
    table = (("FASTRES_CACHE", text),)  # where stage 3 writes its table and stage 4 finds it
    trial = (*table, ("TRITON_INTERPRET", "1")) if dry else table
    profiled = ["eager channels_last"] + ([] if dry else ["compile channels_last", "fastres channels_last"])
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1"]
    return {
        1: [
            Step("environment", _python("fastres", "env"), 0.1),
            Step("selfcheck", _python("fastres", "selfcheck"), 0.3),
            Step("gpu tests", _python("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests), 0.8),
        ],
        2: [
            Step("ceilings", _python("benchmarks.ceilings", *rows, *(["--small"] if dry else [])), 0.2),
            Step("baselines", _python("benchmarks.run", "--suite", "networks", *network, *dtype, *rows, *quick,
                                      *every, "--mode", "train", *budget(0.5)), 0.65),
            Step("profile", _python("benchmarks.profile", *network, *dtype, "--out", f"{text}/profile.txt",
                                    "--alternatives", *profiled, "--results", text), 0.4),
            Step("inductor bytes", _python("benchmarks.inductor", *(["--dry"] if dry else []),
                                           "--out", f"{text}/inductor.txt"), 0.3),
        ],
        3: [Step("tune", _python("fastres", "tune", *tuned), 0.95, env=trial)],
        4: [
            Step("networks", _python("benchmarks.run", "--suite", "networks", *network, *dtype, *rows, *quick,
                                     *every, "--mode", "train", "infer", *budget(0.4)), 0.5, env=table),
            Step("blocks", _python("benchmarks.run", "--suite", "blocks", *small, *dtype, *rows, *quick,
                                   *budget(0.2)), 0.25, env=table),
            Step("operations", _python("benchmarks.run", "--suite", "operations", *small, *dtype, *rows, *quick,
                                       *budget(0.15)), 0.2, env=table),
            Step("loading", _python("benchmarks.loading", *(
                [*tiny, "--steps", "2", "--workers", "1"] if dry else ["--model", "resnet50", "--batch", "256"]
            ), *rows, *budget(0.15)), 0.15, env=table),
            Step("host", _python("benchmarks.host", *rows, *(["--rounds", "2"] if dry else [])), 0.1),
            Step("report", _python("benchmarks.report", "--results", text, *(
                ["--model", "resnet18", "--batch", "2", "--size", "64"] if dry else []
            )), 0.2),
        ],
        5: [
            Step("memcheck", [*sanitizer, "--tool", "memcheck", *_python("fastres", "selfcheck", "--small")], 0.45,
                 "compute-sanitizer"),
            Step("racecheck", [*sanitizer, "--tool", "racecheck", *_python("fastres", "selfcheck", "--small")], 0.45,
                 "compute-sanitizer"),
            Step("declared bytes", _python("benchmarks.declared", *(["--shape", "2", "16", "8", "8"] if dry else []),
                                           *([] if dry else ["--ncu", f"{text}/ncu.csv"])), 0.4),
        ],
    }  # fmt: skip


STAGES = (1, 2, 3, 4, 5)


def run_stage(
    number: int, steps: list[Step], out: Path, limit: float, again: bool, say: Callable[[str], None]
) -> bool:
    """Run a stage's steps within ``limit`` seconds; True if none failed."""
    out.mkdir(parents=True, exist_ok=True)
    state_path, log_path = out / f"stage{number}.json", out / f"stage{number}.log"
    state: dict[str, dict[str, object]] = {}
    if state_path.exists() and not again:
        state = json.loads(state_path.read_text())
    start, at, good = time.perf_counter(), commit(), True
    for step in steps:
        before = state.get(step.name, {})
        if before.get("commit") == at and not at.endswith("+") and before.get("result") == "ok":
            say(f"stage {number} {step.name}: done before")
            continue
        left = limit - (time.perf_counter() - start)
        begun = time.perf_counter()
        if step.needs and shutil.which(step.needs) is None:
            result = f"not run: {step.needs} is not on the PATH"
        elif left < 1:
            result = "not run: the stage's time is spent"
        else:
            with log_path.open("a") as log:
                log.write(f"\n===== {step.name} at {at}: {' '.join(step.command)}\n")
                log.flush()
                try:
                    code = subprocess.run(
                        step.command,
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        timeout=min(left, step.share * limit),
                        env={**os.environ, **dict(step.env)},
                    ).returncode
                    # pytest's 5: nothing was selected, as on a machine where no test is marked for its device.
                    result = (
                        "ok"
                        if code == 0 or (code == 5 and "pytest" in step.command)
                        else f"failed with {code}"
                    )
                except subprocess.TimeoutExpired:
                    result = f"stopped after {time.perf_counter() - begun:.0f} s"
        good = good and (result == "ok" or result.startswith("not run: " + (step.needs or "-")))
        took = time.perf_counter() - begun
        state[step.name] = dict(result=result, seconds=round(took, 1), commit=at)
        state_path.write_text(json.dumps(state, indent=1) + "\n")
        say(f"stage {number} {step.name}: {result}, {took:.0f} s")
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", default="all", choices=[*map(str, STAGES), "all"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=seconds, default=480.0, help="time of a stage (default 8m)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on whatever device is there")
    parser.add_argument("--again", action="store_true", help="repeat steps that are done")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        print("there is no CUDA device; --dry runs the stages at tiny sizes on the CPU", file=sys.stderr)
        return 1
    if args.dry and args.out == RESULTS:
        print("--dry wants --out: its rows are no results", file=sys.stderr)
        return 1
    out = args.out.resolve()
    todo = stages(out, args.dry, args.limit)
    chosen = STAGES if args.stage == "all" else (int(args.stage),)
    good = True
    for number in chosen:
        good = (
            run_stage(number, todo[number], out, args.limit, args.again, lambda s: print(s, flush=True))
            and good
        )
    print(f"files in {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
