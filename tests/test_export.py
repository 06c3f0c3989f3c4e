"""What leaves PyTorch's eager mode: torch.compile, torch.export with save and load, ONNX; all held against eager."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.export import Dim

import fastres
from fastres import functional
from fastres.kernels._triton import INTERPRET
from tests.parity import randomize
from tests.tolerance import assert_close64

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="the exported graph is that of a process without the interpreter"),
    pytest.mark.slow,
]
SIZES = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)


def small(depth=18, **options):
    net = fastres.ResNet(depth, base_channels=8, stem_channels=8, **options)
    return randomize(net).eval()


def eager(net, x):
    plain = fastres.ResNet(net.depth, base_channels=8, stem_channels=8, norm_cfg=dict(type="BN")).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        return plain(x)[-1], plain.double()(x.double())[-1]


@pytest.fixture(params=["live", "folded"])
def model(request):
    """The net in eval mode after it has run (and has folded weights), and the permanent copy."""
    net = small()
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32))
    return net, net if request.param == "live" else fastres.fold(net)


def exported(module, x):
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=SIZES)


def test_export_runs_without_fastres(model, tmp_path, randn):
    """Batch and image size stay dynamic, and nothing but PyTorch's own operators is in the program."""
    net, module = model
    program = exported(module, randn(2, 3, 64, 72))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in", "_operator", "sym")) for name in called), called
    assert ("aten.batch_norm.default" in called) == (net is module)
    assert "aten.promote_types.default" not in called
    x = randn(5, 3, 96, 65)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = f"""
        import sys, torch
        sys.modules["fastres"] = None  # any import of it fails
        x = torch.load({str(tmp_path / "x.pt")!r})
        with torch.no_grad():
            y = torch.export.load({str(tmp_path / "net.pt2")!r}).module()(x)
        torch.save(y[-1], {str(tmp_path / "y.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=600, cwd=tmp_path)
    assert_close64("exported", torch.load(tmp_path / "y.pt"), *eager(net, x))


def test_onnx(model, tmp_path, randn):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'fastres[onnx]'")
    runtime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is not installed: pip install 'fastres[onnx]'"
    )
    net, module = model
    with torch.no_grad():
        program = torch.onnx.export(
            module, (randn(2, 3, 64, 72),), dynamo=True, dynamic_shapes=SIZES, verbose=False
        )
    program.save(str(tmp_path / "net.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 64, 72), (5, 3, 96, 65)):
        x = randn(*shape)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close64(f"onnxruntime {shape}", torch.from_numpy(y), *eager(net, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_after_it_was_folded(model, backend, randn):
    """The compiler sees the norms and leaves the folded weights alone; parameters that change are not baked in."""
    net, module = model
    x = randn(2, 3, 32, 40)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_close64("compiled", compiled(x)[-1], *eager(net, x))
        assert_close64("eager beside it", module(x)[-1], *eager(net, x))
        if net is module:
            net.layer4[1].conv1.weight.mul_(1.5)
            assert_close64("after a change", compiled(x)[-1], *eager(net, x))


def test_traced_modules_keep_their_parameters(randn):
    """torch.jit.trace records the norms, not weights that were folded at that moment."""
    net, x = small(), randn(2, 3, 32, 32)
    with torch.no_grad():
        net(x)
        traced = torch.jit.trace(net, (x,))
        randomize(net, 3)
        assert_close64("traced", traced(x)[-1], *eager(net, x))


def test_recorded_by_make_fx(randn):
    from torch.fx.experimental.proxy_tensor import make_fx

    net, x = small(), randn(2, 3, 32, 32)
    with torch.no_grad():
        net(x)
        graph = make_fx(lambda t: net(t)[-1])(x)
    assert not any("mkldnn" in str(n.target) for n in graph.graph.nodes)


def test_reasons_are_shown_by_the_command(capsys):
    from fastres.cli import main

    assert main(["routes", "--model", "resnet18", "--infer", "--gpu", "cpu", "--size", "64"]) == 0
    text = capsys.readouterr().out
    assert "onednn" in text and "norm folded; CPU: prepacked weight" in text and "layer1.0.bn1" in text
    with functional.folding("off"):
        assert main(["routes", "--model", "resnet18", "--infer", "--gpu", "cpu", "--size", "64"]) == 0
    assert "onednn" not in capsys.readouterr().out
