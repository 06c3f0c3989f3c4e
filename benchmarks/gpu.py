"""Everything worth half an hour of a GPU, in stages that each fit one call of at most eight minutes.

    python -m benchmarks.gpu --stage 0              what matters most, where there is time for one stage: selfcheck,
                                                    ResNet-50 against eager and torch.compile, the GPU tests
    python -m benchmarks.gpu --stage 1              environment, selfcheck, the GPU tests
    python -m benchmarks.gpu --stage 2              ceilings, ResNet-50 baselines, where their time goes
    python -m benchmarks.gpu --stage 3              tune; the table goes to --out
    python -m benchmarks.gpu --stage 4              fastres with that table: networks, blocks, operations, inference,
                                                    where its time goes; the report
    python -m benchmarks.gpu --stage 5              compute-sanitizer, bytes by Nsight Compute against the declared,
                                                    the host's overhead
    python -m benchmarks.gpu --stage all --dry      stages 1 to 5 at tiny sizes, on a CPU too

A step that is done for this commit, in an unchanged working tree, is not done again, so a stage that was cut off goes
on where it stopped (--again repeats). Steps that keep their own books (tests, rows, tuning table) are called again and
do what is left. A step that fails does not stop the others; the exit code is 1 if any did. A tool that is missing is
said to be and its step not run. Every stage writes its log, its state and at most six more files under --out. Where
there is no repository, FASTRES_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch

from benchmarks.rows import RESULTS, ROOT, commit
from fastres.commands.tune import seconds

__all__ = ["STAGES", "Step", "main", "run_stage", "stages"]


class Step(NamedTuple):
    """A command with the share of the stage's time that it may take, the program it needs beside Python, what it adds
    to the environment, and whether it goes on by itself where it was stopped, and so is called again."""

    name: str
    command: list[str]
    share: float = 1.0
    needs: str = ""
    env: tuple[tuple[str, str], ...] = ()
    resumes: bool = False


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
    small = ["--batch", "2", "--scale", "8", "--mode", "train"] if dry else ["--batch", "256"]
    budget = lambda share: ["--budget", f"{max(1.0, share * limit):.0f}s"]  # noqa: E731
    tuned = ["--model", "resnet50", "--batch", "256", *budget(0.85)]
    if dry:
        tuned = "--batch 1 --size 32 --dtype fp32 --rounds 1 --trial --infer --budget 60s --out".split()
        tuned.append(f"{text}/tuned.json")
    table = (("FASTRES_CACHE", text),)  # where stage 3 writes its table and stage 4 finds it
    trial = (*table, ("TRITON_INTERPRET", "1")) if dry else table
    last = "eager channels_last"
    first = [last] if dry else [last, "compile channels_last"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    ours = "fastres channels_last"
    # Not max-autotune: Inductor alone would take the stage's time.
    rivals = ["compile channels_last", "fastres graph channels_last"]
    inference = (
        [*tiny, "--budget", "1s"]
        if dry
        else ["--model", "resnet50", "--batch", "1", "256", "--budget", "10s"]
    )
    steps = "1" if dry else "5"
    check = _python("fastres", "selfcheck", "--small")
    shape = ["--shape", "2", "16", "8", "8"] if dry else []
    environment = Step("environment", _python("fastres", "env"), 0.1)
    selfcheck = Step("selfcheck", _python("fastres", "selfcheck"), 0.3)
    gpu_tests = Step("gpu tests", _python(
        "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "benchmarks.resume", "--passed",
        f"{text}/passed.txt", "--continue-on-collection-errors", *tests,
    ), 0.85, resumes=True)  # fmt: skip
    return {
        0: [
            environment,
            selfcheck,
            Step("networks", _python("benchmarks.run", "--suite", "networks", *network, *dtype, *rows, *quick, "--mode",
                                     "train", "--alternatives", last, ours, *([] if dry else rivals),
                                     *budget(0.3)), 0.4, resumes=True),
            Step("profile", _python("benchmarks.profile", *network, *dtype, "--results", text, "--steps", steps,
                                    "--alternatives", last, ours), 0.1),
            Step("inference", _python("benchmarks.inference", *inference, *dtype, *rows), 0.2),
            gpu_tests,
        ],
        1: [environment, selfcheck, gpu_tests],
        2: [
            Step("ceilings", _python("benchmarks.ceilings", *rows, *(["--small"] if dry else [])), 0.2),
            Step("profile", _python("benchmarks.profile", *network, *dtype, "--out", f"{text}/profile.txt",
                                    "--alternatives", *first, "--results", text), 0.3),
            Step("inductor bytes", _python("benchmarks.inductor", *(["--dry"] if dry else []),
                                           "--out", f"{text}/inductor.txt"), 0.3),
            Step("baselines", _python("benchmarks.run", "--suite", "networks", *network, *dtype, *rows, *quick,
                                      *every, "--mode", "train", *budget(0.5)), 0.8, resumes=True),
        ],
        3: [Step("tune", _python("fastres", "tune", *tuned), 0.95, env=trial, resumes=True)],
        4: [
            Step("networks", _python("benchmarks.run", "--suite", "networks", *network, *dtype, *rows, *quick,
                                     *every, "--mode", "train", "infer", *budget(0.35)), 0.45, "", table, True),
            Step("blocks and operations", _python("benchmarks.run", "--suite", "blocks", "operations", *small, *dtype,
                                                  *rows, *quick, *budget(0.2)), 0.25, "", table, True),
            Step("inference", _python("benchmarks.inference", *inference, *dtype, *rows), 0.25, env=table),
            Step("profile", _python("benchmarks.profile", *network, *dtype, "--results", text, "--steps", steps,
                                    "--alternatives", last, ours), 0.15, env=table),
            Step("loading", _python("benchmarks.loading", *(
                [*tiny, "--steps", "2", "--workers", "0"] if dry else ["--model", "resnet50", "--batch", "256"]
            ), *rows, *budget(0.1)), 0.12, env=table),
            Step("report", _python("benchmarks.report", "--results", text, *(
                ["--model", "resnet18", "--batch", "2", "--size", "64"] if dry else []
            )), 0.2),
        ],
        5: [
            Step("memcheck", [*sanitizer, "memcheck", *check], 0.4, "compute-sanitizer"),
            Step("racecheck", [*sanitizer, "racecheck", *check], 0.4, "compute-sanitizer"),
            Step("declared bytes", _python("benchmarks.declared", *shape), 0.2),
            Step("ncu bytes", _python("benchmarks.declared", *shape, "--ncu", f"{text}/ncu.csv"), 0.4, "ncu"),
            Step("host", _python("benchmarks.host", *rows, *(["--rounds", "2"] if dry else [])), 0.15),
        ],
    }  # fmt: skip


STAGES = (1, 2, 3, 4, 5)  # and 0, the short of them


def _path() -> str:
    """PATH with the folders that CUDA's tools lie in where nobody has put them there."""
    folders = [
        Path("/usr/local/cuda/bin"),
        *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True),
    ]
    return os.pathsep.join([os.environ.get("PATH", ""), *(str(f) for f in folders if f.is_dir())])


def _run(step: Step, log: IO[str], timeout: float) -> str:
    """Run a step's command with all that it starts; what came of it."""
    begun = time.perf_counter()
    done = subprocess.Popen(
        step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PATH": _path(), **dict(step.env)},
    )  # fmt: skip
    try:
        code = done.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"stopped after {time.perf_counter() - begun:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGKILL)  # what is left of it would hold the GPU
        done.wait()
    # pytest's 5: nothing was selected, as on a machine where no test is marked for its device.
    return "ok" if code == 0 or (code == 5 and "pytest" in step.command) else f"failed with {code}"


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
        known = before.get("commit") == at and not at.endswith("+")
        if known and before.get("result") == "ok" and not step.resumes:
            say(f"stage {number} {step.name}: done before")
            continue
        left = limit - (time.perf_counter() - start)
        begun = time.perf_counter()
        absent = step.needs and shutil.which(step.needs, path=_path()) is None
        if absent:
            result = f"not run: {step.needs} is not on the PATH"
        elif left < 1:
            result = "not run: the stage's time is spent"
        else:
            with log_path.open("a") as log:
                log.write(f"\n===== {step.name} at {at}: {' '.join(step.command)}\n")
                log.flush()
                result = _run(step, log, min(left, step.share * limit))
        good = good and (result == "ok" or bool(absent))
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
    parser.add_argument("--stage", default="all", choices=["0", *map(str, STAGES), "all"])
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
