"""timm, torchvision and mmpretrain models with fused parts beside themselves without."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastres
from fastres import functional as FF
from fastres.convert import FusedForward
from fastres.integrations import timm as fastres_timm
from tests.parity import assert_parity, randomize, steps
from tests.peers import peer

pytestmark = pytest.mark.peers


def made(package: str, name: str, **options) -> nn.Module:
    module = peer(
        {"torchvision": "torchvision.models", "mmpretrain": "mmpretrain.models"}.get(package, package)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = module.create_model if package == "timm" else None
        return make(name, **options) if make else getattr(module, name)(**options)


def first(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    y = module(x)
    return (y[-1] if isinstance(y, tuple) else y)[..., None, None]


SMALL = dict(num_classes=5)
CASES = [  # package, name, options, modules fused, modules left
    ("torchvision", "resnet18", SMALL, 1 + 8 + 3, 0),
    ("torchvision", "resnext50_32x4d", SMALL, 1 + 16 + 4, 0),
    ("torchvision", "googlenet", SMALL | dict(init_weights=False, aux_logits=False), 57, 0),
    ("timm", "resnet18", SMALL, 1 + 8 + 3, 0),
    ("timm", "resnet50", SMALL | dict(drop_path_rate=0.2), 1 + 16 + 4, 0),
    ("timm", "resnet26d", SMALL, 1 + 1 + 8 + 4, 0),
    ("timm", "seresnet50", SMALL, 1 + 16 + 4, 0),
    ("mmpretrain", "ResNet", dict(depth=18), 1 + 8 + 3, 0),
    ("mmpretrain", "ResNet", dict(depth=50, style="caffe", drop_path_rate=0.2), 1 + 16 + 4, 0),
]


@pytest.mark.parametrize("package, name, options, fused, left", CASES)
def test_found_and_the_same_results(package, name, options, fused, left):
    model = made(package, name, **options)
    torch.manual_seed(2)
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    report = fastres.fuse_(model)
    assert (len(report.fused), len(report.left)) == (fused, left), str(report)
    assert list(model.state_dict()) == keys
    assert not any(m.fused_obstacle() for m in model.modules() if isinstance(m, FusedForward))
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)  # in float32 a deep net makes much of a rounding
    model.double(), plain.double()
    for training in (False, True):
        model.train(training), plain.train(training)
        want = first(plain, x)
        torch.testing.assert_close(first(model, x), want, rtol=1e-9, atol=1e-9)
    again = pickle.loads(pickle.dumps(model))
    with FF.backend("reference"):
        torch.testing.assert_close(first(again, x), first(plain, x), rtol=1e-9, atol=1e-9)
    fastres.unfuse_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_block_by_the_rule(package):
    """One residual block, forward, backward and running statistics, held against float64."""
    net = randomize(made(package, "resnet50", **SMALL).layer2[0])
    plain = copy.deepcopy(net)
    fastres.fuse_(net)
    inputs, gradients = steps((2, 256, 10, 10), (2, 512, 5, 5), 1)
    with FF.backend("reference"):
        assert_parity(net, plain, inputs, gradients)


def test_mmpretrain_checkpointed_blocks():
    model = made("mmpretrain", "ResNet", depth=18, with_cp=True)
    assert "add+relu" in str(fastres.fuse_(model))
    block, plain = model.layer1[0], made("mmpretrain", "ResNet", depth=18).layer1[0]
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    y, z = block(x), plain(x)
    assert torch.equal(y, z)
    calls = []
    block.conv1.register_forward_hook(lambda *args: calls.append(1))
    y.backward(torch.randn(y.shape))
    assert calls == [1], "recomputed in the backward pass"
    assert torch.equal(block.bn1.running_mean, plain.bn1.running_mean), "updated once"


def test_torchvision_norm_layer():
    models = peer("torchvision.models")
    ours, plain = models.resnet18(norm_layer=fastres.FusedBatchNorm2d), models.resnet18()
    plain.load_state_dict(ours.state_dict())
    assert all(type(m) is fastres.FusedBatchNorm2d for m in ours.modules() if isinstance(m, _BatchNorm))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("how", ["fuse_", "norm_layer"])
def test_torchvision_feature_extractor(how):
    """It traces a model with torch.fx and cuts it: the same nodes, the same features, parameters shared."""
    models, extraction = peer("torchvision.models"), peer("torchvision.models.feature_extraction")
    plain = models.resnet18()
    ours = (
        models.resnet18(norm_layer=fastres.FusedBatchNorm2d) if how == "norm_layer" else copy.deepcopy(plain)
    )
    ours.load_state_dict(plain.state_dict())
    fastres.fuse_(ours)
    assert extraction.get_graph_node_names(ours) == extraction.get_graph_node_names(plain)
    nodes = {"layer2": "a", "layer4.1.bn1": "b"}
    got, want = (extraction.create_feature_extractor(m, return_nodes=nodes) for m in (ours, plain))
    assert got.layer1 is not ours.layer1 and got.conv1.weight is ours.conv1.weight
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        a, b = got.train(training)(x), want.train(training)(x)
        for name in ("a", "b"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4)
    assert ours.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, None])
def test_batch_norm_act(act, randn):
    timm = peer("timm.layers")
    cls = fastres_timm.batch_norm_act_class()
    options = dict(act_layer=act) if act else dict(apply_act=False)
    ours, plain = cls(6, eps=1e-3, **options), timm.BatchNormAct2d(6, eps=1e-3, **options)
    assert isinstance(ours, timm.BatchNormAct2d) and ours.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(randomize(ours).state_dict())
    inputs, gradients = steps((3, 6, 5, 5), (3, 6, 5, 5), 2)
    for backend in ("aten", "reference"):
        with FF.backend(backend):
            assert_parity(copy.deepcopy(ours), copy.deepcopy(plain), inputs, gradients)
    assert type(pickle.loads(pickle.dumps(ours))) is cls
    hooked = copy.deepcopy(ours)
    seen = []
    hooked.act.register_forward_hook(lambda *args: seen.append(1))
    hooked(randn(2, 6, 3, 3))
    assert seen == [1]


def test_timm_builds_with_fused_norms():
    timm = peer("timm")
    cls = fastres_timm.register()
    assert fastres_timm.register() is cls
    ours = timm.create_model("regnety_002", norm_layer=fastres.FusedBatchNorm2d, num_classes=5).eval()
    plain = timm.create_model("regnety_002", num_classes=5).eval()
    norms = {type(m) for m in ours.modules() if isinstance(m, _BatchNorm)}
    assert norms == {cls}, norms
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


def test_timm_norms_with_activation_are_fused_in_place():
    model = made("timm", "efficientnet_b0", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    report = fastres.fuse_(model)
    assert report.norms == 49
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    synchronised = peer("timm.layers").convert_sync_batchnorm(model)
    names = {type(m).__name__ for m in synchronised.modules() if isinstance(m, _BatchNorm)}
    assert names == {"SyncBatchNormAct"}, "timm still knows its own, activation included"
