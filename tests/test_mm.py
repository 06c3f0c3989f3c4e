"""Through mmengine's own Runner and mmpretrain's own classifier: configs, AMP, EMA, checkpoints, resume, norms."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastres
from tests.peers import peer

pytestmark = pytest.mark.peers


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


@pytest.fixture(autouse=True)
def amp(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's AmpOptimWrapper asks for a GPU and then works without one: here it is told that there is one, and its
    loss scaler is torch's for the CPU."""
    if not torch.cuda.is_available():
        peer("mmengine.optim")
        module = peer("mmengine.optim.optimizer.amp_optimizer_wrapper")
        monkeypatch.setattr(module, "is_cuda_available", lambda: True)
        monkeypatch.setattr(module, "GradScaler", partial(torch.amp.GradScaler, "cpu"))


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
                type="AmpOptimWrapper", dtype="bfloat16",
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
    assert type(runner.optim_wrapper).__name__ == "AmpOptimWrapper"
    assert runner.optim_wrapper.loss_scaler.get_scale() == 65536, "losses were scaled, and no step skipped"
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


@pytest.mark.parametrize("backbone", ["fastres.ResNet", "ResNet"])
def test_synchronised_norms_in_a_run_of_one_process(tmp_path, backbone):
    """mmengine takes them back to a norm of its own; the hook fuses that."""
    model = model_config("norm")
    model["backbone"] |= dict(type=backbone, norm_cfg=dict(type="fastres.FusedSyncBN"))
    hooks = [dict(type="fastres.FuseHook")]
    net = inner(run(tmp_path, model, custom_hooks=hooks).model)
    norms = {type(m) for m in net.modules() if isinstance(m, _BatchNorm)}
    assert norms == {fastres.FusedBatchNorm2d} and net.backbone.layer1[0].fused_obstacle() == ""
    fastres.unfuse_(net)
    assert type(net.backbone.bn1).__name__ == "_BatchNormXd"


def test_validation_with_averaged_weights_leaves_nothing_behind(tmp_path):
    """EMAHook swaps weights through ``.data`` around a validation: what was folded there must not serve later."""
    loader = dict(
        batch_size=4, num_workers=0, dataset=dict(type="Pictures"),
        sampler=dict(type="DefaultSampler", shuffle=False), collate_fn=dict(type="pseudo_collate"),
    )  # fmt: skip
    net = inner(run(
        tmp_path, model_config("both"), custom_hooks=[dict(type="EMAHook", momentum=0.1, update_buffers=True)],
        val_dataloader=loader, val_cfg=dict(), val_evaluator=dict(type="Accuracy"),
    ).model)  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = net.eval().backbone(x)[0]
        fastres.forget_folded()
        torch.testing.assert_close(got, net.backbone(x)[0])
    assert "accuracy/top1" in next(tmp_path.glob("*/*.log")).read_text()


@pytest.mark.parametrize("scope", [None, "mmdet"])
def test_the_runner_under_another_default_scope(tmp_path, scope):
    model = model_config("both")
    model["neck"]["type"], model["head"]["type"] = (
        "mmpretrain.GlobalAveragePooling",
        "mmpretrain.LinearClsHead",
    )
    model["head"]["loss"]["type"] = "mmpretrain.CrossEntropyLoss"
    net = inner(run(tmp_path, model, default_scope=scope).model)
    assert type(net.backbone) is fastres.ResNet and int(net.backbone.bn1.num_batches_tracked) == 2


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


def test_precise_bn_and_the_same_numbers_with_one_string_changed(tmp_path):
    """The statistics that mmpretrain's PreciseBNHook measures after training, ours beside mmpretrain's own."""
    states = {}
    for kind in ("both", "neither"):
        runner = run(
            tmp_path / kind, model_config(kind), custom_hooks=[dict(type="PreciseBNHook", num_samples=8)],
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9)), randomness=dict(seed=3),
        )  # fmt: skip
        assert "20 BN found, run 2 iters" in next((tmp_path / kind).glob("*/*.log")).read_text()
        model = inner(runner.model)
        states[kind] = model.state_dict()
        assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, _BatchNorm))
    ours, theirs = states["both"], states["neither"]
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_what_only_mmdet_and_mmseg_have(scope):
    """Their backbone configs with the one string changed; what is not supported is refused by name."""
    registry = peer("mmengine.registry")
    common = dict(type="fastres.ResNet", depth=50, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3))
    common |= dict(norm_cfg=dict(type="fastres.FusedBN", requires_grad=True), norm_eval=True, style="pytorch")
    common |= dict(frozen_stages=1, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"))
    dilated = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True, multi_grid=(1, 2, 4))
    with registry.DefaultScope.overwrite_default_scope(scope), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            net = registry.MODELS.build(common)
            strided = registry.MODELS.build(common | dilated)
            for option in (dict(dcn=dict(type="DCN")), dict(plugins=[dict(cfg=dict(type="GCB"))])):
                with pytest.raises(ValueError, match=f"{next(iter(option))} is .*not supported"):
                    registry.MODELS.build(common | option)
        finally:
            logging.disable(logging.NOTSET)
    x = torch.randn(2, 3, 64, 64)
    assert [y.shape[2] for y in net.train()(x)] == [16, 8, 4, 2]
    assert [y.shape[2] for y in strided(x)] == [16, 8, 8, 8]
    assert not net.bn1.training and not net.layer1[0].conv1.weight.requires_grad
    assert [block.conv2.dilation[0] for block in strided.layer4] == [1, 2, 4]


def test_the_configs_of_the_documentation():
    """Before and after, from the page: the same keys; mm's own class before where it is installed, ours after."""
    page = Path(__file__).parent.parent / "docs" / "openmmlab.md"
    blocks = re.findall(r"^```python\n# (before|after)\n(.*?)^```", page.read_text(), re.M | re.S)
    configs: dict[str, list[dict[str, Any]]] = dict(before=[], after=[])
    for when, code in blocks:
        space: dict[str, Any] = {}
        exec(code, space)
        configs[when].append(space["model"]["backbone"] if "model" in space else space["backbone"])
        assert "custom_hooks" not in space or space["custom_hooks"][0]["type"] == "fastres.FuseHook"
    peer("mmpretrain.models")
    registry = peer("mmengine.registry")
    assert [len(of) for of in configs.values()] == [3, 3]
    for scope, before, after in zip(("mmpretrain", "mmdet", "mmseg"), *configs.values(), strict=True):
        assert before.keys() == after.keys() and after["type"] == f"fastres.{before['type']}"
        pretrained = {
            after.pop("init_cfg", {}).get("checkpoint"),
            before.pop("init_cfg", {}).get("checkpoint"),
        }
        assert pretrained <= {None, "torchvision://resnet50"}
        with registry.DefaultScope.overwrite_default_scope(scope), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            try:
                ours = registry.MODELS.build(after)
            finally:
                logging.disable(logging.NOTSET)
        before.pop("contract_dilation", None)
        theirs = registry.MODELS.build(
            before | dict(type=f"mmpretrain.{before['type']}", norm_cfg=dict(type="BN"))
        )
        assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_tools_that_change_norms():
    """revert_sync_batchnorm and fuse_conv_bn look at types; a net goes on being right after them."""
    wrappers = peer("mmengine.model")
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
