"""Trains an image classifier from an mmcls-style config.

    python examples/train.py configs/resnet18_digits.py --compare
    python examples/train.py configs/resnet18_small_images.py --data imagefolder:DIR --epochs 30
    torchrun --nproc-per-node 8 examples/train.py configs/resnet50_imagenet.py --amp bf16 --channels-last

DIR holds train/ and val/ with a folder of images for each class, or the class folders themselves. A run writes its
config, checkpoints, CSV logs and a picture into its work folder; --resume goes on where a killed run stopped.
"""

from __future__ import annotations

import argparse
import sys
import time

try:
    from fastres.config import ConfigError
except ModuleNotFoundError as e:
    sys.exit(f"error: {e.name} is not installed; in the repository's folder: pip install -e '.[train]'")

from training import compare, report
from training.errors import TrainingError
from training.loading import Data, load_data
from training.plots import learning_curves
from training.progress import Progress
from training.run import Run, Stopped
from training.runtime import Runtime, start
from training.settings import AMP, Settings, resolve


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config", help="a config file, see configs/")
    p.add_argument(
        "--data", metavar="KIND", help="digits, imagefolder:DIR or synthetic; default: the config's"
    )
    p.add_argument("--epochs", type=int, metavar="N", help="default: the config's")
    p.add_argument("--amp", choices=AMP, help="autocast to bf16, or to fp16 with loss scaling")
    p.add_argument("--channels-last", action="store_true", help="activations and weights in channels_last")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument(
        "--compare", action="store_true", help="train with BN and with FusedBN, side by side from one seed"
    )
    p.add_argument(
        "--min-accuracy",
        type=float,
        metavar="PERCENT",
        help="with --compare: exit code 1 below this test accuracy",
    )
    p.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE", help="go on from FILE, default WORK_DIR/last.pt"
    )
    p.add_argument("--overwrite", action="store_true", help="start over where WORK_DIR holds an earlier run")
    p.add_argument("--work-dir", metavar="DIR", help="where to write; default work_dirs/CONFIG")
    p.add_argument(
        "--seed", type=int, metavar="N", help="of weights, order and augmentation; default: the config's"
    )
    p.add_argument("--strict-data", action="store_true", help="stop at a broken image instead of skipping it")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument(
        "--cfg-options", nargs="+", metavar="KEY=VALUE", help="change the config: model.backbone.depth=50"
    )
    return p


def train(settings: Settings, runtime: Runtime, data: Data, progress: Progress) -> int:
    run = Run(settings, runtime, data, progress)
    model = run.trainer.model
    parameters = sum(p.numel() for p in model.parameters())
    progress.print(report.header(settings, runtime, data, report.describe_norms(model), parameters))
    begin = time.perf_counter()
    try:
        epochs = run.fit()
    except Stopped as e:
        progress.print(f"stopped by {e}; {run.last} holds the run, --resume goes on with it")
        return e.code
    if not runtime.is_main:
        return 0
    folder = settings.work_dir
    title = f"{settings.path.stem}, seed {settings.seed}"
    picture = learning_curves(folder / "curves.png", title, run.steps_log.rows(), epochs, progress)
    seconds = time.perf_counter() - begin
    progress.print(report.final_table(epochs, run.position.best_epoch, len(run.broken.lines), seconds))
    files = [run.last, run.best, folder / "config.py", run.steps_log.path, run.epochs_log.path, picture]
    progress.print(report.written(files))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0; 1 where a comparison fails; 2 for a fault in what was given; 128 + n after signal n."""
    args = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # rules and bars on a terminal without Unicode
    try:
        settings = resolve(args)
        if args.compare:
            compare.check(settings)
        with start(settings.device) as runtime:
            progress = Progress(runtime.is_main)
            report.make_folder(settings.work_dir)
            data = load_data(settings, runtime)
            if args.compare:
                return compare.compare(settings, runtime, data, progress)
            return train(settings, runtime, data, progress)
    except (ConfigError, TrainingError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
