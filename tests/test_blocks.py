"""BasicBlock, Bottleneck, their variants and ResLayer: parity, the choice between the two paths, refusals."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from fastres import functional as FF
from fastres._registry import NORM_LAYERS
from fastres.modules import BasicBlock, Bottleneck, DropPath, FusedBatchNorm2d, ResLayer, get_expansion
from fastres.variants import ResNeXtBottleneck, SEBottleneck
from tests.parity import assert_parity, like, randomize, steps
from tests.plain_resnet import Block

BACKENDS = ["aten", "reference"]


def layer(block, cin, cout, norm="FusedBN", blocks=1, **options):
    """A block as a stage makes it, with its downsample where there is one."""
    return ResLayer(block, blocks, cin, cout, norm_cfg=dict(type=norm), **options)


# (ours, plain, input channels): the same block in both.
PAIRS = {
    "basic": (lambda **o: layer(BasicBlock, 6, 6, **o), lambda: Block(6, 6), 6),
    "basic stride": (lambda **o: layer(BasicBlock, 4, 6, stride=2, **o), lambda: Block(4, 6, stride=2), 4),
    "basic dilation": (
        lambda **o: layer(BasicBlock, 4, 4, dilation=2, **o),
        lambda: Block(4, 4, dilation=2),
        4,
    ),
    "bottleneck": (lambda **o: layer(Bottleneck, 8, 8, **o), lambda: Block(8, 8, 2), 8),
    "pytorch": (lambda **o: layer(Bottleneck, 4, 8, stride=2, **o), lambda: Block(4, 8, 2, 2), 4),
    "caffe": (
        lambda **o: layer(Bottleneck, 4, 8, stride=2, style="caffe", **o),
        lambda: Block(4, 8, 2, 2, caffe=True),
        4,
    ),
    "avg_down": (
        lambda **o: layer(Bottleneck, 4, 8, stride=2, avg_down=True, **o),
        lambda: Block(4, 8, 2, 2, avg_down=True),
        4,
    ),
    "dilation": (lambda **o: layer(Bottleneck, 4, 8, dilation=2, **o), lambda: Block(4, 8, 2, dilation=2), 4),
    "resnext": (
        lambda **o: layer(
            ResNeXtBottleneck, 8, 16, groups=2, width_per_group=3, base_channels=4, stride=2, **o
        ),
        lambda: Block(8, 16, 6, 2, groups=2),
        8,
    ),
    "se": (
        lambda **o: layer(SEBottleneck, 4, 8, se_ratio=2, stride=2, **o),
        lambda: Block(4, 8, 2, 2, squeeze=8),
        4,
    ),
}


def pair(name, **options):
    ours, plain, channels = PAIRS[name]
    mine = randomize(ours(**options))
    return mine[0], like(plain(), mine[0]), channels


def data(block, channels, count=2, n=3, size=5, seed=11):
    shape = (n, channels, size, size)
    with torch.no_grad():
        out = copy.deepcopy(block).double()(torch.zeros(shape, dtype=torch.float64)).shape
    return steps(shape, out, count, seed)


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
def test_parity(name, route, layout):
    ours, plain, channels = pair(name)
    assert ours.fused_obstacle() == ""
    x, dy = data(plain, channels)
    with FF.backend(route):
        record = assert_parity(ours, plain, x, dy, layout=layout)
    assert int(record["step 1 buffer bn1.num_batches_tracked"]) == 2


@pytest.mark.parametrize("name", PAIRS)
def test_the_eager_sequence_is_eager(name, layout):
    ours, plain, channels = pair(name, norm="BN")
    assert ours.fused_obstacle() == "bn1 is BatchNorm2d"
    x, dy = data(plain, channels)
    assert_parity(ours, plain, x, dy, layout=layout)


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["basic stride", "bottleneck"])
def test_parity_in_other_dtypes(name, dtype, route):
    # A seed at which rounding decides no ReLU's sign: such a flip changes gradients far beyond rounding.
    ours, plain, channels = pair(name)
    x, dy = data(plain, channels, count=1, seed=1)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy, dtype=dtype)


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("frozen", ["all", "bn1", "bn2", "downsample"])
def test_frozen_norms_inside_a_training_block(frozen, route):
    ours, plain, channels = pair("basic stride")
    for m in (ours, plain):
        part = m if frozen == "all" else getattr(m, frozen)
        for norm in part.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    x, dy = data(plain, channels)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy)


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(eps=0.1)],
    ids=lambda o: next(iter(o)),
)
def test_norm_options(options, route):
    ours = randomize(ResLayer(Bottleneck, 1, 4, 8, stride=2, norm_cfg=dict(type="FusedBN", **options)))[0]
    plain = Block(4, 8, 2, 2)
    for name, m in list(plain.named_modules()):
        if isinstance(m, nn.BatchNorm2d):
            parent = plain.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.BatchNorm2d(m.num_features, **options))
    plain = like(plain, ours)
    x, dy = data(plain, 4)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy)


@pytest.mark.interpret
@pytest.mark.parametrize("name", PAIRS)
def test_parity_of_the_kernels(name, layout):
    ours, plain, channels = pair(name)
    x, dy = data(plain, channels, count=1, n=2)
    with FF.backend("triton"):
        assert_parity(ours, plain, x, dy, layout=layout)


# ------------------------------------------------------------------------------------------------- the contract's form


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_signature(block):
    parameters = inspect.signature(block).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    empty = inspect.Parameter.empty
    assert defaults == dict(
        in_channels=empty, out_channels=empty, expansion=1 if block is BasicBlock else 4, stride=1, dilation=1,
        downsample=None, style="pytorch", with_cp=False, conv_cfg=None, norm_cfg=dict(type="FusedBN"),
        drop_path_rate=0.0, act_cfg=dict(type="ReLU", inplace=True), init_cfg=None,
    )  # fmt: skip


def test_children_and_attributes():
    down = nn.Conv2d(8, 16, 1)
    b = Bottleneck(8, 16, stride=2, dilation=3, downsample=down, drop_path_rate=0.1)
    assert [n for n, _ in b.named_children()] == [
        "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu", "downsample", "drop_path",
    ]  # fmt: skip
    assert (b.norm1, b.norm2, b.norm3) == (b.bn1, b.bn2, b.bn3) and b.last_norm is b.bn3
    assert (b.norm1_name, b.norm3_name, b.mid_channels) == ("bn1", "bn3", 4)
    assert b.conv1.stride == (1, 1) and b.conv2.stride == (2, 2)
    assert b.conv2.padding == b.conv2.dilation == (3, 3)
    assert all(c.bias is None for c in (b.conv1, b.conv2, b.conv3)) and b.relu.inplace
    assert isinstance(b.drop_path, DropPath) and b.drop_path.drop_prob == 0.1
    caffe = Bottleneck(16, 16, stride=2, style="caffe")
    assert caffe.conv1.stride == (2, 2) and caffe.conv2.stride == (1, 1)
    basic = BasicBlock(8, 8, stride=2, dilation=2, style="anything", drop_path_rate=1e-6)
    assert [n for n, _ in basic.named_children()] == ["conv1", "bn1", "conv2", "bn2", "relu", "drop_path"]
    assert basic.conv1.padding == (2, 2) and basic.conv2.padding == basic.conv2.dilation == (1, 1)
    assert type(basic.drop_path) is nn.Identity and basic.last_norm is basic.norm2
    gn = BasicBlock(8, 8, norm_cfg=dict(type="GN", num_groups=2))
    assert gn.norm1_name == "gn1" and gn.norm2 is gn.gn2


def test_configs_are_not_changed():
    norm, act = dict(type="FusedBN", requires_grad=False), dict(type="ReLU")
    b = BasicBlock(4, 4, norm_cfg=norm, act_cfg=act)
    assert norm == dict(type="FusedBN", requires_grad=False) and act == dict(type="ReLU")
    assert not b.bn1.weight.requires_grad and b.conv1.weight.requires_grad


def test_get_expansion():
    class Mine(nn.Module):
        expansion = 3

    assert [get_expansion(b) for b in (BasicBlock, Bottleneck, SEBottleneck, Mine)] == [1, 4, 4, 3]
    assert get_expansion(Bottleneck, 2) == 2
    for block, expansion, error in (
        (BasicBlock, 0, AssertionError),
        (BasicBlock, -1, AssertionError),
        (BasicBlock, "4", TypeError),
        (BasicBlock, 1.0, TypeError),
        (nn.Linear, None, TypeError),
    ):
        with pytest.raises(error, match="get_expansion"):
            get_expansion(block, expansion)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BasicBlock(4, 4, expansion=2), AssertionError, "expansion is 2; wanted 1"),
        (lambda: Bottleneck(4, 4, style="tensorflow"), AssertionError, "'tensorflow'"),
        (lambda: Bottleneck(4, 6), AssertionError, "multiple of expansion"),
        (lambda: BasicBlock(4, 4, norm_cfg=None), TypeError, "dict"),
        (lambda: BasicBlock(4, 4, norm_cfg="BN"), TypeError, "dict"),
        (lambda: BasicBlock(4, 4, norm_cfg={}), KeyError, "type"),
        (lambda: BasicBlock(4, 4, norm_cfg=dict(type="FusedBm")), KeyError, "did you mean 'FusedBN'"),
        (lambda: BasicBlock(4, 4, conv_cfg=dict(type="Conf")), KeyError, "did you mean 'Conv'"),
        (lambda: BasicBlock(4, 4, act_cfg=dict(type="Relu")), KeyError, "did you mean 'ReLU'"),
        (lambda: BasicBlock(4, 4, drop_path_rate=1.0), ValueError, "drop_prob"),
        (lambda: BasicBlock(4, 4, strides=2), TypeError, "strides"),
        (lambda: ResNeXtBottleneck(8, 24, base_channels=4), AssertionError, "multiple of base_channels"),
        (lambda: ResLayer(BasicBlock, 2, 4, 4, drop_path_rate=[0.1]), AssertionError, "2, one a block"),
        (lambda: ResLayer(BasicBlock, 2, 4, 4, multi_grid=(1,)), AssertionError, "multi_grid"),
        (lambda: ResLayer("BasicBlok", 2, 4, 4), KeyError, "did you mean 'BasicBlock'"),
        (lambda: ResLayer(nn.Linear, 2, 4, 4), TypeError, "expansion"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_res_layer():
    stage = ResLayer(
        Bottleneck, 3, 8, 16, stride=2, avg_down=True, drop_path_rate=[0.0, 0.1, 0.2], style="caffe"
    )
    pool, conv, norm = stage[0].downsample
    assert (pool.kernel_size, pool.stride, pool.ceil_mode, pool.count_include_pad) == (2, 2, True, False)
    assert conv.stride == (1, 1) and conv.kernel_size == (1, 1) and type(norm) is FusedBatchNorm2d
    assert stage[1].downsample is None and [b.stride for b in stage] == [2, 1, 1]
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in stage] == [0.0, 0.1, 0.2]
    assert all(b.style == "caffe" for b in stage)
    assert [type(m) for m in ResLayer(Bottleneck, 1, 8, 16, avg_down=True)[0].downsample][0] is nn.Conv2d
    assert ResLayer(Bottleneck, 1, 16, 16)[0].downsample is None
    assert [b.drop_path.drop_prob for b in ResLayer(BasicBlock, 2, 4, 4, drop_path_rate=0.3)] == [0.3, 0.3]
    assert len(ResLayer("BasicBlock", 2, 4, 4)) == 2


def test_dilations_of_mmseg():
    def dilations(**options):
        return [b.conv2.dilation[0] for b in ResLayer(Bottleneck, 3, 8, 8, **options)]

    assert dilations(dilation=4) == [4, 4, 4]
    assert dilations(dilation=4, contract_dilation=True) == [2, 4, 4]
    assert dilations(contract_dilation=True) == [1, 1, 1]
    assert dilations(dilation=4, multi_grid=(1, 2, 4), contract_dilation=True) == [1, 2, 4]


# --------------------------------------------------------------------------------------------- which path is taken


def fresh(**options):
    return randomize(layer(BasicBlock, 4, 6, stride=2, **options))[0]


class Scaled(FusedBatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class MyDrop(nn.Module):
    def forward(self, x):
        return x


def hook(module, name="register_forward_hook"):
    getattr(module, name)(lambda *args: None)


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x)


OBSTACLES = {
    "GN": (lambda b: setattr(b, "bn2", nn.GroupNorm(2, 6)), "bn2 is GroupNorm"),
    "BN": (lambda b: setattr(b, "bn1", nn.BatchNorm2d(6)), "bn1 is BatchNorm2d"),
    "Identity": (lambda b: setattr(b, "bn2", nn.Identity()), "bn2 is Identity"),
    "subclass": (lambda b: setattr(b, "bn1", Scaled(6)), "bn1 is Scaled, with a forward of its own"),
    "norm with ReLU": (lambda b: setattr(b.bn2, "relu", True), "bn2 has a ReLU of its own"),
    "norm hook": (lambda b: hook(b.bn1), "bn1 has hooks"),
    "norm pre-hook": (lambda b: hook(b.bn1, "register_forward_pre_hook"), "bn1 has hooks"),
    "backward hook": (lambda b: hook(b.bn2, "register_full_backward_hook"), "bn2 has hooks"),
    "backward pre-hook": (lambda b: hook(b.bn2, "register_full_backward_pre_hook"), "bn2 has hooks"),
    "replaced forward": (lambda b: own_forward(b.bn2), "bn2 has hooks"),
    "activation": (lambda b: setattr(b, "relu", nn.LeakyReLU()), "relu is LeakyReLU"),
    "activation hook": (lambda b: hook(b.relu), "relu has hooks"),
    "drop path": (lambda b: setattr(b, "drop_path", MyDrop()), "drop_path is MyDrop"),
    "drop path hook": (lambda b: hook(b.drop_path), "drop_path has hooks"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacle(case):
    change, reason = OBSTACLES[case]
    block = fresh()
    assert block.fused_obstacle() == ""
    change(block)
    assert block.fused_obstacle() == reason
    with FF.record_routes() as log:
        y = block(torch.randn(2, 4, 5, 5))
    assert not any(c.op == "add_relu" for c in log)
    y.sum().backward()


def test_a_hook_for_all_modules_is_an_obstacle():
    block = fresh()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert block.fused_obstacle() == "a hook for all modules is set"
    finally:
        handle.remove()
    assert block.fused_obstacle() == ""


def test_hooks_see_what_they_would_see_in_eager():
    block, seen = fresh(), []
    eager = copy.deepcopy(block)
    x = torch.randn(2, 4, 5, 5)
    expected = eager.bn1(eager.conv1(x))
    block.bn1.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    block(x)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("route", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["basic stride", "pytorch"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_convolutions_are_called_with_their_hooks(name, training, route):
    block, seen = pair(name)[0].train(training), []
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda *args: seen.append(1))
    assert block.fused_obstacle() == ""
    with FF.backend(route), torch.set_grad_enabled(training):
        block(torch.randn(2, 4, 5, 5))
    assert len(seen) == len(convs)


@pytest.mark.parametrize("index", [None, 0, 1, 2])
def test_hooks_in_a_shortcut_are_called(index):
    block, seen = randomize(layer(BasicBlock, 4, 6, stride=2, avg_down=True))[0], []
    module = block.downsample if index is None else block.downsample[index]
    x = torch.randn(2, 4, 5, 5)
    expected = copy.deepcopy(block.downsample)[: None if index is None else index + 1](x)
    module.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    block(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_another_norm_in_the_shortcut(norm):
    """The branch stays fused; the shortcut is called."""
    block = fresh()
    block.downsample[1] = norm
    assert block.fused_obstacle() == ""
    x = torch.randn(2, 4, 5, 5)
    identity = copy.deepcopy(block).downsample(x)
    z = torch.relu(copy.deepcopy(block.bn1)(block.conv1(x)))
    branch = copy.deepcopy(block.bn2)(block.conv2(z))
    torch.testing.assert_close(block(x), torch.relu(branch + identity))


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda b: hook(b.bn1),
        lambda b: hook(b.downsample),
        lambda b: hook(b.downsample[1]),
        lambda b: setattr(b, "downsample", Wrapped(b.downsample)),
    ],
    ids=["norm hook", "downsample hook", "downsample norm hook", "downsample of another class"],
)
def test_both_paths_agree(change, route):
    fused = fresh(drop_path_rate=0.5)
    other = copy.deepcopy(fused)
    change(other)
    x = torch.randn(16, 4, 5, 5)
    dy = torch.randn(16, 6, 3, 3)
    results = []
    with FF.backend(route):
        for block in (fused, other):
            torch.manual_seed(5)
            leaf = x.clone().requires_grad_()
            y = block(leaf)
            y.backward(dy)
            results.append([y, leaf.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_a_folded_block():
    """What mmcv's fuse_conv_bn leaves behind: a convolution with bias, and Identity for the norm."""
    block = fresh().eval()
    x = torch.randn(2, 4, 5, 5)
    expected = block(x)
    for i in (1, 2):
        conv, norm = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
        setattr(block, f"conv{i}", nn.utils.fuse_conv_bn_eval(conv, norm))
        setattr(block, f"bn{i}", nn.Identity())
    assert block.fused_obstacle() == "bn1 is Identity"
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_a_block_whose_norms_torch_made_synchronised():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(fresh().eval())
    assert block.fused_obstacle() == "bn1 is SyncBatchNorm"
    plain = fresh().eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), plain(x))


def test_a_users_norm_works_eagerly():
    class Halved(nn.Module):
        def __init__(self, channels, eps=1e-5):
            super().__init__()

        def forward(self, x):
            return x / 2

    NORM_LAYERS.register_module("Halved", module=Halved)
    try:
        block = BasicBlock(4, 4, norm_cfg=dict(type="Halved"))
    finally:
        NORM_LAYERS.module_dict.pop("Halved")
    assert block.fused_obstacle().startswith("norm_layer1 is Halved")
    x = torch.randn(2, 4, 5, 5)
    z = torch.relu(block.conv1(x) / 2)
    torch.testing.assert_close(block(x), torch.relu(block.conv2(z) / 2 + x))


# ---------------------------------------------------------------------------------------------------------- drop path


@pytest.mark.parametrize("route", BACKENDS)
def test_drop_path_in_a_block(route):
    block = randomize(layer(BasicBlock, 4, 4, drop_path_rate=0.5))[0]
    x = torch.randn(32, 4, 5, 5).abs()
    torch.manual_seed(9)
    keep = block.drop_path.keep(x)
    torch.manual_seed(9)
    with FF.backend(route):
        y = block(x)
    dropped = keep == 0
    assert dropped.any() and not dropped.all()
    assert torch.equal(y[dropped], x[dropped]) and not torch.equal(y[~dropped], x[~dropped])
    block.eval()
    with FF.backend(route):
        assert torch.equal(block(x), block(x))


# -------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("name", ["basic stride", "bottleneck", "avg_down", "se"])
def test_checkpointing(name, route):
    """The same numbers, and running statistics updated once."""
    ours, plain, channels = pair(name)
    ours.with_cp = True
    assert ours.fused_obstacle() == ""
    x, dy = data(plain, channels)
    with FF.backend(route):
        record = assert_parity(ours, plain, x, dy)
    assert int(record["step 1 buffer bn1.num_batches_tracked"]) == 2


@pytest.mark.parametrize("route", BACKENDS)
def test_checkpointing_repeats_the_draws_of_drop_path(route):
    block = fresh(drop_path_rate=0.5)
    other = copy.deepcopy(block)
    other.with_cp = True
    grads = []
    for b in (block, other):
        torch.manual_seed(4)
        x = torch.ones(16, 4, 5, 5).cumsum(0).requires_grad_()
        with FF.backend(route):
            b(x).backward(torch.ones(16, 6, 3, 3))
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_checkpointing_only_where_a_gradient_is_wanted(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fastres._residual.checkpoint", lambda f, x, use_reentrant: calls.append(use_reentrant) or f(x)
    )
    block = fresh(with_cp=True)
    x = torch.randn(2, 4, 5, 5)
    block(x)
    assert calls == []
    block(x.requires_grad_())
    assert calls == [False]


def test_checkpointing_saves_memory():
    def saved(with_cp):
        block, total = fresh(with_cp=with_cp), []
        x = torch.randn(4, 4, 16, 16, requires_grad=True)
        own = {p.data_ptr() for p in block.parameters()}

        def pack(t):
            if t.data_ptr() not in own:
                total.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x)
        return sum(total)

    assert saved(True) == 4 * 4 * 16 * 16  # the input
    assert saved(False) > 2 * saved(True)


def test_eager_norms_under_checkpointing_count_twice():
    """As in mmcls: documented, not wanted."""
    block = fresh(norm="BN", with_cp=True)
    block(torch.randn(2, 4, 5, 5, requires_grad=True)).sum().backward()
    assert int(block.bn1.num_batches_tracked) == 2


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = {
    "three dimensions": (torch.randn(4, 5, 5), ValueError, "4 dimensions"),
    "channels": (torch.randn(2, 3, 5, 5), ValueError, "wanted 4 channels"),
    "integers": (torch.ones(2, 4, 5, 5, dtype=torch.int32), TypeError, "int32"),
    "dtype": (torch.randn(2, 4, 5, 5, dtype=torch.float64), TypeError, "wanted float32"),
    "device": (torch.empty(2, 4, 5, 5, device="meta"), ValueError, "wanted device cpu"),
    "no tensor": (None, TypeError, "NoneType"),
    "one value after the stride": (torch.randn(1, 4, 2, 2), ValueError, "1 value per channel in bn1"),
}


@pytest.mark.parametrize("norm", ["FusedBN", "BN"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case, norm):
    x, error, words = BAD[case]
    block = fresh(norm=norm)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(error, match=words) as caught:
        block(x)
    assert str(caught.value).startswith("BasicBlock: input is") and "wanted" in str(caught.value)
    for name, t in block.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize(
    "block",
    [BasicBlock(4, 6), BasicBlock(4, 4, stride=2), Bottleneck(4, 8)],
    ids=["channels", "stride", "bottleneck"],
)
def test_a_missing_downsample_is_named(block):
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="downsample is None.*wanted a downsample module"):
        block(torch.randn(2, 4, 5, 5))
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


def test_one_value_per_channel_is_fine_where_statistics_are_frozen():
    x = torch.randn(1, 4, 2, 2)
    assert fresh().eval()(x).shape == (1, 6, 1, 1)
    block = fresh()
    for norm in (block.bn1, block.bn2, block.downsample[1]):
        norm.eval()
    assert block(x).shape == (1, 6, 1, 1)
    gn = randomize(ResLayer(BasicBlock, 1, 4, 6, stride=2, norm_cfg=dict(type="GN", num_groups=1)))[0]
    assert gn(x).shape == (1, 6, 1, 1)
