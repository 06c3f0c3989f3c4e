"""Folded weights: never stale, whatever changes the parameters, and never seen from outside."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastres
from fastres import _folding, functional
from tests.parity import randomize
from tests.tolerance import assert_close64


class Net(nn.Module):
    """A stem and two blocks, one with a downsample branch."""

    def __init__(self, kind: str = "FusedBN") -> None:
        super().__init__()
        self.layer = fastres.ResLayer(fastres.Bottleneck, 2, 8, 32, stride=2, norm_cfg=dict(type=kind))

    def forward(self, x):
        return self.layer(x)


CONVOLUTIONS = 7


@pytest.fixture
def net():
    return randomize(Net()).eval()


@pytest.fixture
def x(randn):
    return randn(2, 8, 9, 7, layout=torch.channels_last)


def infer(net, x):
    with torch.no_grad():
        return net(x)


def truth(net, x, kind="BN"):
    """The same network on PyTorch's own norms, in its own dtype and in float64."""
    plain = Net(kind).to(next(net.parameters()).dtype).eval()
    plain.load_state_dict(net.state_dict())
    for ours, other in zip(net.modules(), plain.modules(), strict=True):
        if isinstance(other, nn.BatchNorm2d):
            other.eps = ours.eps
    with torch.no_grad():
        return plain(x), plain.double()(x.double())


def assert_fresh(net, x):
    ours = infer(net, x)
    eager, ref = truth(net, x)
    assert_close64("inference", ours, eager, ref)
    assert_close64("inference again", infer(net, x), eager, ref)
    return ours


def weights_of(net):
    return net.layer[1].conv2.weight, net.layer[1].bn2


# Every way in which values change. Each gets the net and changes something that the output depends on.


def in_place(net):
    with torch.no_grad():
        weights_of(net)[0].mul_(1.5)


def in_inference_mode(net):
    with torch.inference_mode():
        weights_of(net)[0].mul_(1.5)


def slice_in_place(net):
    with torch.no_grad():
        weights_of(net)[0][0].zero_()


def gamma(net):
    nn.init.constant_(weights_of(net)[1].weight, 0.3)


def beta(net):
    nn.init.constant_(weights_of(net)[1].bias, 0.3)


def running_mean(net):
    weights_of(net)[1].running_mean.add_(0.5)


def running_var(net):
    weights_of(net)[1].running_var.mul_(3)


def eps(net):
    weights_of(net)[1].eps = 0.1


def load_state_dict(net):
    net.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in net.state_dict().items()})


def load_state_dict_assign(net):
    state = {k: v * 1.5 if v.is_floating_point() else v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def new_parameter(net):
    net.layer[1].conv2.weight = nn.Parameter(weights_of(net)[0].detach() * 1.5)


def new_module(net):
    net.layer[1].conv2 = randomize(copy.deepcopy(net.layer[1].conv2), 3)


def new_norm(net):
    net.layer[1].bn2 = randomize(copy.deepcopy(net.layer[1].bn2), 3).eval()


def data_assigned(net):
    weight = weights_of(net)[0]
    weight.data = weight.data * 1.5


def data_copied_back(net):
    """To half precision and back: the same object and perhaps the same address, with rounded values."""
    net.half()
    net.float()


def swapped(net):
    weight = weights_of(net)[0]
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.5))


def training_forward(net):
    """Running statistics move in a kernel that bumps no version counter."""
    net.train()
    net(torch.randn(4, 8, 9, 7))
    net.eval()


def norm_alone(net):
    """A norm called by itself in training: no convolution hears of it, and the kernel bumps no version counter."""
    norm = weights_of(net)[1]
    norm.train()(3 * torch.randn(4, 8, 5, 5))
    norm.eval()


def training_step(net):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.randn(4, 8, 9, 7)).square().mean().backward()
    optimizer.step()
    net.eval()


def fused_optimizer(net):
    optimizer = torch.optim.Adam(net.parameters(), 0.1, fused=True)
    net(torch.randn(4, 8, 9, 7)).square().mean().backward()
    optimizer.step()


def foreach(net):
    with torch.no_grad():
        torch._foreach_mul_(list(net.parameters()), 1.5)


def old_optimizer(net):
    """One that writes through ``.data``, as many did: it has no version counter to show, but there was a step."""
    net.train()
    net(torch.randn(4, 8, 9, 7)).square().mean().backward()
    for p in net.parameters():
        p.data.add_(p.grad.data, alpha=-0.1)
    net.eval()


def frozen_norms_step(net):
    """``norm_eval``: norms stay in eval mode while a ``.data`` optimizer trains the convolutions."""
    net(torch.randn(4, 8, 9, 7)).square().mean().backward()
    for p in net.parameters():
        p.data.add_(p.grad.data, alpha=-0.1)


def reset(net):
    weights_of(net)[1].reset_running_stats()


def averaged(net):
    """Exponential moving average of weights, as swa_utils makes it."""
    ema = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    ema.update_parameters(randomize(copy.deepcopy(net), 5))
    net.load_state_dict(ema.module.state_dict())
    in_place(net)


CHANGES = [
    in_place, in_inference_mode, slice_in_place, gamma, beta, running_mean, running_var, eps, load_state_dict,
    load_state_dict_assign, new_parameter, new_module, new_norm, data_assigned, data_copied_back, swapped,
    training_forward, norm_alone, training_step, fused_optimizer, foreach, old_optimizer, frozen_norms_step, reset,
    averaged,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_no_change_leaves_a_stale_weight(net, x, change, backend):
    with functional.backend(backend):
        before = assert_fresh(net, x)
        change(net)
        after = assert_fresh(net, x)
    assert not torch.equal(before, after), "the change had no effect: it tests nothing"


def test_values_written_through_data_need_forget(net, x):
    """The one documented hole: an alias with a version counter of its own, and no training step in between."""
    before = infer(net, x)
    weights_of(net)[0].data.mul_(1.5)
    assert torch.equal(infer(net, x), before)
    assert fastres.forget_folded(net) == CONVOLUTIONS
    assert_fresh(net, x)
    assert not torch.equal(infer(net, x), before)


@pytest.mark.parametrize("how", ["eval", "train and eval", "a norm alone"])
def test_values_written_through_data_before_a_change_of_mode(net, x, how):
    """As mmengine's EMAHook swaps weights: no version counter tells, but whoever evaluates calls eval()."""
    before = infer(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.data.copy_(p.data * 1.5)
    if how == "a norm alone":
        for m in net.modules():
            if isinstance(m, fastres.FusedBatchNorm2d):
                m.eval()
    else:
        (net.train() if "train" in how else net).eval()
    assert not torch.equal(assert_fresh(net, x), before)
    assert not any("modes" in key for key in net.state_dict())


def test_mode_changes_cost_one_refold(net, x, monkeypatch):
    made = []
    fold = fastres._inference.fold
    monkeypatch.setattr(fastres._inference, "fold", lambda *a: (made.append(1), fold(*a))[1])
    for _ in range(3):
        infer(net, x)
    assert len(made) == CONVOLUTIONS
    for epoch in range(2, 4):
        training_step(net)
        for _ in range(3):
            infer(net, x)
        assert len(made) == CONVOLUTIONS * epoch
    for size in (9, 12, 31):  # other batches and image sizes do not refold
        infer(net, torch.randn(size, 8, size, size + 1).contiguous(memory_format=torch.channels_last))
    assert len(made) == CONVOLUTIONS * 3


def test_eval_in_a_loop_compares_and_does_not_fold(net, x, monkeypatch):
    made = []
    fold = fastres._inference.fold
    monkeypatch.setattr(fastres._inference, "fold", lambda *a: (made.append(1), fold(*a))[1])
    for turn, expected in enumerate((1, 2, 2, 2)):
        before = infer(net.eval(), x)
        assert len(made) == expected * CONVOLUTIONS, turn
    with torch.inference_mode():
        assert torch.equal(infer(net.eval(), x), before)
    # What leaves no mark is seen each time, in every tensor that goes into the weight.
    weight, norm = weights_of(net)
    for written in (weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        del made[:]
        written.data.mul_(1.5).add_(0.1)
        assert not torch.equal(assert_fresh(net.eval(), x), before)
        assert len(made) == 1
        before = infer(net.eval(), x)
        assert len(made) == 1


def test_nothing_is_seen_from_outside(net, x):
    keys, attributes = list(net.state_dict()), {n: set(m.__dict__) for n, m in net.named_modules()}
    infer(net, x)
    assert _folding.count(net) == CONVOLUTIONS
    assert list(net.state_dict()) == keys
    assert {n: set(m.__dict__) for n, m in net.named_modules()} == attributes
    twin = copy.deepcopy(net)
    assert _folding.count(twin) == 0
    assert torch.equal(infer(twin, x), infer(net, x))
    restored = pickle.loads(pickle.dumps(net))
    assert torch.equal(infer(restored, x), infer(net, x))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(infer(torch.load(file, weights_only=False), x), infer(net, x))


def test_folded_weights_go_with_their_module(x):
    gc.collect()
    net = Net().eval()
    infer(net, x)
    before = len(_folding._cache)
    del net
    gc.collect()
    assert len(_folding._cache) == before - CONVOLUTIONS


def test_a_training_step_frees_them(net, x):
    infer(net, x)
    net.train()(x)
    assert _folding.count(net) == 0


def test_the_number_kept_is_bounded(net, x):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for backend in ("auto", "aten"):
            with functional.backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                infer(net, x)
    assert _folding.count(net) <= CONVOLUTIONS * _folding.KEPT
    assert_fresh(net, x)


def test_inference_mode_and_no_grad_share_a_weight(net, x):
    with torch.inference_mode():
        a = net(x)
    assert torch.equal(infer(net, x), a)
    net.requires_grad_(False)
    assert torch.equal(net(x), a)  # gradients on, but none is wanted


def reasons(net, x):
    with functional.record_routes() as log, torch.no_grad():
        net(x)
    return [c for c in log if not c.reason.startswith("norm folded")]


def test_what_cannot_be_folded_says_why(net, x):
    assert reasons(net, x) == []
    net.layer[1].conv2.register_forward_hook(lambda *a: None)
    (one,) = reasons(net, x)
    assert "not folded: the convolution has hooks" in one.reason
    assert_fresh(net, x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda c: prune.random_unstructured(c, "weight", 0.5), "has hooks"),
        (lambda c: parametrize.register_parametrization(c, "weight", nn.Identity()), "ParametrizedConv2d"),
        (lambda c: setattr(c, "padding_mode", "reflect"), "padding_mode is reflect"),
    ],
    ids=["pruned", "parametrized", "reflect"],
)
def test_special_convolutions_run_as_they_are(net, x, make, words):
    infer(net, x)
    make(net.layer[1].conv2)
    (one,) = reasons(net, x)
    assert words in one.reason


def test_gradients_are_never_lost(net, x):
    """oneDNN's operators drop them without a word."""
    infer(net, x)
    x.requires_grad_()
    assert net(x).requires_grad
    x.requires_grad_(False)
    assert net(x).requires_grad
    net.requires_grad_(False)
    assert not net(x).requires_grad
    net.layer[1].conv3.weight.requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), [net.layer[1].conv3.weight])
    assert float(g.abs().max()) > 0
    net.requires_grad_(False)
    net.layer[0].bn1.bias.requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), [net.layer[0].bn1.bias])
    assert float(g.abs().max()) > 0


def test_a_frozen_part_of_a_training_net_is_folded(x):
    net = randomize(fastres.ResNet(50, base_channels=8, stem_channels=8, frozen_stages=1)).train()
    image = torch.randn(2, 3, 32, 32)
    with functional.record_routes() as log:
        (out,) = net(image)
    folded = [c for c in log if "norm folded" in c.reason]
    assert len(folded) == 11  # the stem, three blocks and the downsample
    out.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("transform", ["jvp", "functional_call", "dual"])
def test_transforms_see_the_unfolded_functions(net, x, transform):
    infer(net, x)
    v = torch.randn_like(x)
    if transform == "functional_call":
        state = {k: t * 1.5 if t.is_floating_point() else t for k, t in net.state_dict().items()}
        with torch.no_grad():
            got = torch.func.functional_call(net, state, (x,))
        load_state_dict(net)
        assert_close64("functional_call", got, *truth(net, x))
        return
    with torch.no_grad():
        if transform == "jvp":
            _, tangent = torch.func.jvp(net, (x,), (v,))
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, v)
                tangent = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
    assert tangent is not None and float(tangent.abs().max()) > 0


def test_parameters_made_in_inference_mode_are_not_folded(x):
    with torch.inference_mode():
        net = randomize(Net()).eval()
        assert all("inference mode" in c.reason for c in reasons(net, x) if "note" not in c.op)
        before = net(x)
        weights_of(net)[0].mul_(1.5)
        assert not torch.equal(net(x), before)


def test_norms_that_nothing_counts_are_not_folded(randn):
    conv, y = nn.Conv2d(4, 6, 3), randn(2, 4, 8, 8)
    bn = functional.BatchNorm(None, None, torch.zeros(6), torch.ones(6), None, 0.1, 1e-5, False)
    with torch.no_grad(), functional.record_routes() as log:
        functional.conv_bn_relu(y, conv, bn).tensor()
    assert "num_batches_tracked" in log[0].reason


def test_a_norm_without_bias_keeps_its_weight(x, monkeypatch):
    """torch >= 2.13: BatchNorm2d(bias=False); its zeros are made anew for every call."""
    try:
        norm = fastres.FusedBatchNorm2d(6, bias=False)
    except TypeError:
        pytest.skip("this torch has no BatchNorm2d(bias=False)")
    made = []
    fold = fastres._inference.fold
    monkeypatch.setattr(fastres._inference, "fold", lambda *a: (made.append(1), fold(*a))[1])
    conv = nn.Conv2d(8, 6, 3)
    norm.eval()
    for _ in range(3):
        with torch.no_grad():
            functional.conv_bn_relu(x, conv, norm.fused()).tensor()
    assert len(made) == 1


def test_folding_can_be_switched_off(net, x):
    with functional.folding("off"), functional.record_routes() as log, torch.no_grad():
        net(x)
    assert {c.route for c in log} == {"aten"} and _folding.count(net) == 0
    with pytest.raises(ValueError, match="folding is 'no'"):
        with functional.folding("no"):
            pass


def test_bad_norms_raise_as_they_did(net, x):
    net.layer[1].bn2.running_mean = torch.zeros(3)
    with pytest.raises(ValueError, match="running_mean"), torch.no_grad():
        net(x)
