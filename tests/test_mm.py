"""Through mmengine's own Runner and mmpretrain's own classifier: configs, AMP, EMA, checkpoints, resume, norms."""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastres
from tests.peers import peer


def model_config(kind: str) -> dict[str, Any]:
    """mmpretrain's classifier with: our backbone, our norm in its backbone, both, or neither."""
    backbone: dict[str, Any] = dict(
        type="ResNet", depth=18, base_channels=8, stem_channels=8, norm_cfg=dict(type="BN")
    )
    if kind in ("backbone", "both"):
        backbone["type"] = "fastres.ResNet"
    if kind in ("norm", "both"):
        backbone["norm_cfg"] = dict(type="fastres.FusedBN", requires_grad=True)
    return dict(
        type="mmpretrain.ImageClassifier",
        backbone=backbone,
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=4, in_channels=64, loss=dict(type="CrossEntropyLoss")),
    )


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = peer("mmpretrain.structures").DataSample().set_gt_label(i % 4)
        return dict(
            inputs=torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), data_samples=sample
        )


def amp_wrapper() -> str:
    """mmengine's AmpOptimWrapper refuses the CPU; there its one line, an autocast around the step, is added here."""
    if torch.cuda.is_available():
        return "AmpOptimWrapper"
    base: Any = peer("mmengine.optim").OptimWrapper

    class CpuAmpOptimWrapper(base):
        def __init__(self, dtype: str, **options: Any) -> None:
            super().__init__(**options)
            self.dtype = getattr(torch, dtype)

        @contextmanager
        def optim_context(self, model: nn.Module):
            with super().optim_context(model), torch.autocast("cpu", self.dtype):
                yield

    peer("mmengine.registry").OPTIM_WRAPPERS.register_module(module=CpuAmpOptimWrapper, force=True)
    return CpuAmpOptimWrapper.__name__


def run(folder: Path, model: dict[str, Any], epochs: int = 1, **options: Any) -> Any:
    peer("mmpretrain.models")
    peer("mmpretrain.engine")
    mmengine = peer("mmengine")
    runner = peer("mmengine.runner").Runner
    scope = peer("mmengine.registry").DefaultScope
    peer("mmengine.registry").DATASETS.register_module(name="Pictures", module=Pictures, force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = f"{folder.name}-{len(scope._instance_dict)}"
        config = dict(
            model=copy.deepcopy(model),
            work_dir=str(folder),
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                dataset=dict(type="Pictures"),
                sampler=dict(type="DefaultSampler", shuffle=False),
                collate_fn=dict(type="pseudo_collate"),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(
                type=amp_wrapper(), dtype="bfloat16",
                optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-4),
                paramwise_cfg=dict(norm_decay_mult=0.0),
            ),
            default_scope="mmpretrain",
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", interval=1), logger=dict(type="LoggerHook", interval=1)
            ),
            experiment_name=name,
            log_level="INFO",
        )  # fmt: skip
        built = runner.from_cfg(mmengine.Config(config | options))
        built.train()
    return built


@pytest.fixture
def unsafe_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine 0.10 loads its own training checkpoints with a plain torch.load."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def inner(model: nn.Module) -> nn.Module:
    return model.module if hasattr(model, "module") else model


@pytest.mark.parametrize("kind", ["backbone", "norm", "both"])
def test_configs_resolve_and_train(tmp_path, kind):
    runner = run(tmp_path, model_config(kind))
    model = inner(runner.model)
    package = type(model.backbone).__module__.partition(".")[0]
    assert package == ("mmpretrain" if kind == "norm" else "fastres")
    norms = {type(m) for m in model.modules() if isinstance(m, _BatchNorm)}
    assert norms == {nn.BatchNorm2d if kind == "backbone" else fastres.FusedBatchNorm2d}
    assert int(model.backbone.bn1.num_batches_tracked) == 2
    text = next(tmp_path.glob("*/*.log")).read_text()
    assert "Epoch(train) [1][2/2]" in text and "loss:" in text
    assert (tmp_path / "epoch_1.pth").is_file()


def test_ema_checkpoint_and_resume(tmp_path, unsafe_load):
    hooks = [dict(type="EMAHook", momentum=0.1, update_buffers=True)]
    straight = run(tmp_path / "a", model_config("both"), 2, custom_hooks=hooks, randomness=dict(seed=3))
    run(tmp_path / "b", model_config("both"), 1, custom_hooks=hooks, randomness=dict(seed=3))
    resumed = run(
        tmp_path / "b", model_config("both"), 2, custom_hooks=hooks, randomness=dict(seed=3),
        resume=True, load_from=str(tmp_path / "b" / "epoch_1.pth"),
    )  # fmt: skip
    a, b = inner(straight.model).state_dict(), inner(resumed.model).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    saved = torch.load(tmp_path / "b" / "epoch_2.pth", weights_only=False)
    report = fastres.load_checkpoint(fastres.ResNet(18, base_channels=8, stem_channels=8), saved)
    assert report.format == "mmpretrain" and report.fits
    assert "ema_state_dict" in saved


def test_the_hook_fuses_mmpretrains_own(tmp_path):
    runner = run(
        tmp_path, model_config("neither"), custom_hooks=[dict(type="fastres.FuseHook", channels_last=True)]
    )
    model = inner(runner.model)
    assert type(model.backbone).__name__ == "FusedResNet" and not model.backbone.layer1[0].fused_obstacle()
    assert model.backbone.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert "12 modules fused, 0 left, 20 norms replaced" in next(tmp_path.glob("*/*.log")).read_text()
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
    assert "backbone.layer1.0.bn1.weight" in saved


@pytest.mark.parametrize("scope", ["mmpretrain", "mmdet", None])
def test_every_default_scope(scope):
    registry = peer("mmengine.registry")
    with registry.DefaultScope.overwrite_default_scope(scope), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            net = registry.MODELS.build(dict(type="fastres.ResNet", depth=18, norm_cfg=dict(type="FusedBN")))
        finally:
            logging.disable(logging.NOTSET)
    assert type(net) is fastres.ResNet


def test_tools_that_change_norms():
    """revert_sync_batchnorm, fuse_conv_bn and PreciseBN look at types; a net goes on being right after them."""
    wrappers, precise = peer("mmengine.model"), peer("mmengine.hooks")
    assert precise
    net = fastres.ResNet(18, base_channels=8, stem_channels=8, norm_cfg=dict(type="FusedSyncBN")).eval()
    x = torch.randn(2, 3, 32, 32)
    want = net(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reverted = wrappers.revert_sync_batchnorm(copy.deepcopy(net))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules())
    torch.testing.assert_close(reverted(x)[0], want)
    fused = peer("mmcv.cnn").fuse_conv_bn(fastres.ResNet(18, base_channels=8, stem_channels=8).eval())
    assert isinstance(fused.bn1, nn.Identity)
    assert fused(x)[0].isfinite().all()
