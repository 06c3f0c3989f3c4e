"""Networks that live through random events: training steps, evaluations, and whatever changes a model in between.

Ours and mmcls's sequence of modules (``norm_cfg`` BN) start alike, in float64, and everything happens to both; what
they compute must agree to rounding. What a test of one feature cannot see is seen here: two features that meet, or
something kept for later that should not have been. A seed that fails is replayed by its number, and the message tells
the events.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import functional as fn
from tests.parity import like, randomize
from tests.plain_resnet import PlainResNet

LAST, NCHW = torch.channels_last, torch.contiguous_format
FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "ResNet": fastres.ResNet, "V1d": fastres.ResNetV1d, "CIFAR": fastres.ResNet_CIFAR, "SE": fastres.SEResNet,
    "ResNeXt": lambda **o: fastres.ResNeXt(**o, groups=4, width_per_group=4),
}  # fmt: skip


class Pair:
    """Both networks, the random numbers that decide what happens, and what has happened."""

    def __init__(self, seed: int) -> None:
        self.draw, self.told = random.Random(seed), [f"seed {seed}"]
        self.generator = torch.Generator().manual_seed(seed)
        self.hooks: list[Any] = []
        self.ours, self.theirs = self.foreign() if self.draw.random() < 0.2 else self.own()
        self.both(lambda net: net.train())

    def foreign(self) -> tuple[nn.Module, nn.Module]:
        """Somebody else's network, fused in place, and the same as it was."""
        options: dict[str, Any] = dict(
            depth=self.draw.choice([18, 50]), width=16, stem=16, caffe=self.draw.random() < 0.3,
            cifar=self.draw.random() < 0.2, avg_down=self.draw.random() < 0.2,
        )  # fmt: skip
        self.tell("foreign", options)
        theirs = randomize(PlainResNet(**options)).double()
        ours = copy.deepcopy(theirs)
        fastres.fuse_(ours)
        return ours, theirs

    def own(self) -> tuple[nn.Module, nn.Module]:
        family = self.draw.choice([*FAMILIES, *["ResNet"] * 5])
        options: dict[str, Any] = dict(
            depth=50 if family in ("SE", "ResNeXt") else self.draw.choice([18, 50, 50]), base_channels=16,
            stem_channels=16, out_indices=self.draw.choice([(3,), (0, 2, 3)]),
            frozen_stages=self.draw.choice([-1, -1, 0, 1, 2]), norm_eval=self.draw.random() < 0.15,
        )  # fmt: skip
        if family == "ResNet":
            options |= dict(style=self.draw.choice(["pytorch", "caffe"]), avg_down=self.draw.random() < 0.2)
        if self.draw.random() < 0.2:
            options |= dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
        self.tell(family, options)
        make = FAMILIES[family]
        ours = randomize(make(**options, norm_cfg=dict(type="FusedBN"))).double()
        return ours, like(make(**options, norm_cfg=dict(type="BN")), ours).double()

    def tell(self, *what: Any) -> None:
        self.told.append(" ".join(map(str, what)))

    def name(self, wanted: Callable[[str, Any], bool], of: str = "named_parameters") -> str:
        return self.draw.choice([n for n, v in getattr(self.theirs, of)() if wanted(n, v)])

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        for net in (self.ours, self.theirs):
            change(net)

    def images(self) -> Tensor:
        """Of sizes at which every norm has more values than decide the sign of one."""
        h, w = self.draw.choice([(64, 64), (48, 64), (65, 63), (56, 40)])
        x = torch.randn(3, 3, h, w, generator=self.generator).double()
        return x.contiguous(memory_format=self.draw.choice([LAST, LAST, LAST, NCHW]))

    compared = 0

    def agree(self, what: str, got: Any, want: Any, bound: float = 1e-9) -> None:
        self.compared += got is not None
        assert (got is None) == (want is None), f"{what}: {got} and {want}; {self.told}"
        if got is not None:
            error = (got - want).abs().max() / want.abs().max().clamp_min(1e-3)
            assert error < bound, f"{what}: {error:.2g}; {self.told}"


def evaluate(pair: Pair) -> None:
    how = pair.draw.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    training = pair.draw.random() < 0.2
    pair.tell("evaluate", how.__name__, training)
    if pair.ours.training != training:  # else what was kept for inference may be used again
        pair.both(lambda net: net.train(training))
    x = pair.images()
    times = pair.draw.choice([1, 1, 4])  # by which a program would be written, and run
    for time in range(times):
        with how():
            for i, (got, want) in enumerate(zip(pair.ours(x), pair.theirs(x), strict=True)):
                pair.agree(f"output {i}, {time + 1} of {times}", got.detach(), want.detach())
        x = x.neg()


def train(pair: Pair) -> None:
    pair.tell("train")
    pair.both(lambda net: net.train())
    inputs = [pair.images()]
    inputs.append(inputs[0].clone(memory_format=torch.preserve_format))
    wanted, dy = pair.draw.random() < 0.3, None
    for net, x in zip((pair.ours, pair.theirs), inputs, strict=True):
        outputs = net(x.requires_grad_(wanted))
        dy = dy or [torch.randn(out.shape, generator=pair.generator).double() for out in outputs]
        kept = [(out, d) for out, d in zip(outputs, dy, strict=True) if out.requires_grad]
        if kept:
            torch.autograd.backward(*zip(*kept, strict=True))
    pair.agree("gradient of the images", inputs[0].grad, inputs[1].grad, 1e-8)
    grown = max(
        (p.grad.abs().max().item() for p in pair.theirs.parameters() if p.grad is not None), default=0.0
    )
    for (name, p), q in zip(pair.ours.named_parameters(), pair.theirs.parameters(), strict=True):
        if p.grad is not None and q.grad is not None and q.grad.abs().max() < 1e-9 * grown:
            assert p.grad.abs().max() < 1e-7 * grown, (
                f"gradient of {name}; {pair.told}"
            )  # which cancels to nothing
        else:
            pair.agree(f"gradient of {name}", p.grad, q.grad, 1e-8)
    for (name, p), q in zip(pair.ours.named_buffers(), pair.theirs.buffers(), strict=True):
        pair.agree(f"buffer {name}", p.double(), q.double())
    with torch.no_grad():
        for p in pair.theirs.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.01 / (p.grad.norm().item() + 1e-9))
    pair.both(lambda net: net.zero_grad())
    take_over(pair)


def take_over(pair: Pair) -> None:
    """Ours get their state, in one of the ways there are."""
    how = pair.draw.choice(["load", "assign", "copy"])
    pair.tell("  by", how)
    state = {name: t.clone() for name, t in pair.theirs.state_dict().items()}
    if how == "copy":
        with torch.no_grad():
            for name, t in pair.ours.state_dict().items():
                t.copy_(state[name])
    else:
        wanted = {n: p.requires_grad for n, p in pair.ours.named_parameters()}
        pair.ours.load_state_dict(state, assign=how == "assign")
        for name, p in pair.ours.named_parameters():
            p.requires_grad_(wanted[name])


def scale(pair: Pair) -> None:
    name, factor = pair.name(lambda n, p: True), pair.draw.choice([0.5, 1.5, -1.0])
    pair.tell("scale", name, factor)
    with torch.no_grad():
        pair.both(lambda net: net.get_parameter(name).mul_(factor))


def shift_statistics(pair: Pair) -> None:
    name = pair.name(lambda n, b: b.is_floating_point(), "named_buffers")
    pair.tell("shift", name)
    pair.both(lambda net: net.get_buffer(name).add_(0.25))


def want(pair: Pair) -> None:
    name, wanted = pair.name(lambda n, p: True), pair.draw.random() < 0.4
    pair.tell("want", name, wanted)
    pair.both(lambda net: net.get_parameter(name).requires_grad_(wanted))


def freeze(pair: Pair) -> None:
    name = pair.name(lambda n, m: n.count(".") == 1 and n.startswith("layer"), "named_modules")
    pair.tell("freeze", name)
    pair.both(lambda net: net.get_submodule(name).requires_grad_(False))


def hook(pair: Pair) -> None:
    name = pair.name(lambda n, m: isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU), "named_modules")
    pair.tell("hook", name)
    after = pair.draw.random() < 0.5
    for net in (pair.ours, pair.theirs):
        module = net.get_submodule(name)
        if after:
            pair.hooks.append(module.register_forward_hook(lambda module, given, out: out * 1.25))
        else:
            pair.hooks.append(module.register_forward_pre_hook(lambda module, given: (given[0] * 0.75,)))


def unhook(pair: Pair) -> None:
    pair.tell("unhook")
    while pair.hooks:
        pair.hooks.pop().remove()


def replace(pair: Pair) -> None:
    """One of our norms by torch's, or another eps."""
    name = pair.name(lambda n, m: isinstance(m, nn.BatchNorm2d), "named_modules")
    how = pair.draw.choice(["torch", "eps"])
    pair.tell("replace", name, how)
    if how == "eps":
        pair.both(lambda net: setattr(net.get_submodule(name), "eps", 0.01))
        return
    old = pair.ours.get_submodule(name)
    new = nn.BatchNorm2d(old.num_features, old.eps).double().train(old.training)
    new.load_state_dict(old.state_dict())
    wanted = old.weight.requires_grad
    new.weight.requires_grad_(wanted)
    new.bias.requires_grad_(old.bias.requires_grad)
    unhook(pair)
    parent, _, last = name.rpartition(".")
    pair.ours.get_submodule(parent)._modules[last] = new


def copied(pair: Pair) -> None:
    how = pair.draw.choice(["deepcopy", "pickle", "channels_last", "nchw"])
    pair.tell(how)
    if how in ("channels_last", "nchw"):
        pair.both(lambda net: net.to(memory_format=LAST if how == "channels_last" else NCHW))
        return
    unhook(pair)
    pair.ours = copy.deepcopy(pair.ours) if how == "deepcopy" else pickle.loads(pickle.dumps(pair.ours))


EVENTS = [evaluate] * 5 + [train] * 4 + [
    scale, shift_statistics, want, freeze, hook, unhook, replace, copied, copied,
]  # fmt: skip


@pytest.mark.parametrize(
    "backend, seed",
    [*(("aten", seed) for seed in range(12)), *(("reference", seed) for seed in range(100, 160))],
)
def test_random_events(backend, seed):
    pair = Pair(seed)
    moments = pair.draw.choice(["on", "on", "auto", "auto", "off"])
    memory = pair.draw.choice(["save", "recompute"])
    pair.tell(backend, moments, memory)
    with contextlib.ExitStack() as stack:
        for setting in (fn.backend(backend), fn.moments(moments), fn.memory(memory)):
            stack.enter_context(setting)
        for _ in range(12):
            pair.draw.choice(EVENTS)(pair)
        before = pair.compared
        evaluate(pair)
    assert pair.compared > before
