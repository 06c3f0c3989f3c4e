"""Every launch that the tests make, and whole networks, through Triton's own launcher and the compiler's front end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastres
from fastres import functional
from fastres.kernels._triton import HAS_TRITON, INTERPRET, tl, triton
from tests import launches
from tests.cases import LAST, NCHW

pytestmark = pytest.mark.aot

NOTED = Path(os.environ[launches.FOLDER]) if launches.FOLDER in os.environ and not INTERPRET else None


@pytest.mark.skipif(NOTED is None, reason="the interpreter's tests did not run before: see tests/run.py")
def test_every_launch_of_the_interpreters_tests_is_one_that_the_compiler_takes():
    assert NOTED is not None
    rows, refused = launches.read(NOTED), []
    with launches.no_device():
        for launch in rows:
            try:
                launches.replay(launch)
            except Exception as error:
                refused.append(f"{launch}: {error}")
    assert rows
    assert not refused, "\n".join(refused[:5])


# --------------------------------------------------------------------------------------------------- whole networks


@pytest.fixture
def launched() -> Iterator[launches.Log]:
    with launches.on_cpu() as log:
        yield log


def network(depth: int, **options: Any) -> fastres.ResNet:
    norm = dict(type="FusedBN")
    return fastres.ResNet(depth, stem_channels=16, base_channels=16, norm_cfg=norm, **options)


NETS = {
    "18": dict(depth=18),
    "50": dict(depth=50),
    "50 caffe": dict(depth=50, style="caffe"),
    "50 dilated": dict(depth=50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    "50 deep stem": dict(depth=50, deep_stem=True, avg_down=True),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("net", list(NETS))
def test_a_training_step_and_a_pass_of_inference_launch(launched, net, layout, dtype):
    made = network(**NETS[net]).to(dtype).to(memory_format=layout)
    x = torch.randn(2, 3, 33, 33).to(dtype).contiguous(memory_format=layout)
    with functional.backend("triton"):
        out = made.train()(x)[-1]
        assert launched
        forward = len(launched)
        out.backward(torch.randn_like(out))
        assert len(launched) > forward
        trained = len(launched)
        with torch.inference_mode():
            made.eval()(x)
        assert len(launched) > trained


@pytest.mark.parametrize("size", [1, 32], ids=["1x1 pixels", "32x32 pixels"])
@pytest.mark.parametrize("mode", ["on", "off"])
def test_few_pixels_in_every_form_launch(launched, mode, size):
    made = network(50).to(memory_format=LAST).train()
    x = torch.randn(2, 3, size, size).contiguous(memory_format=LAST)
    with functional.backend("triton"), functional.moments(mode), functional.memory("recompute"):
        with functional.conv3x3("triton"):
            out = made(x)[-1]
        out.backward(torch.randn_like(out))
    names = {name for name, _ in launched}
    if size == 1:  # the moment form needs four rows a channel
        mode = "off"
    moments = {"gram_kernel", "fold_kernel", "pointwise_end_kernel", "p_kernel", "dz_kernel"}
    assert names & moments == (moments if mode == "on" else set())
    assert names > {"forward3x3_kernel", "dgrad3x3_kernel", "wgrad3x3_kernel"}


STAGES = {
    "identity": dict(in_channels=32),
    "strided": dict(in_channels=8, stride=2),
    "odd": dict(in_channels=9, out_channels=20, stride=2),
    "basic": dict(in_channels=32, block=fastres.BasicBlock),
    "basic, strided": dict(in_channels=8, stride=2, block=fastres.BasicBlock),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_program_launches_what_triton_would(launched, monkeypatch, stage, dtype):
    """From the third step on a block's launches go to Triton's driver without its ``run``: kernels, grids, stream
    and arguments are the same, to the alignment of every tensor. Where somebody listens to launches, or a tensor lies
    otherwise, they take the long way."""
    options: dict[str, Any] = dict(block=fastres.Bottleneck, num_blocks=2, out_channels=32) | STAGES[stage]
    net = fastres.ResLayer(**options).to(dtype).to(memory_format=LAST).train()
    c = options["in_channels"]
    asked = []
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *a, **k: (asked.append(1), run(*a, **k))[1])

    def step(shift: int = 0) -> tuple[int, list[Any]]:
        """How often Triton was asked, and all launches."""
        for log in (launched, launched.arguments, asked):
            log.clear()
        x = torch.randn(3 * c * 42 + shift).to(dtype)
        x = x.as_strided((3, c, 7, 6), (c * 42, 1, c * 6, c), shift).requires_grad_()
        with functional.backend("triton"), functional.moments("on"):
            out = net(x)
            out.backward(torch.ones_like(out))
        return len(asked), [*zip(launched, launched.arguments, strict=True)]

    (long, first), (_, second), (short, third), (_, fourth) = (step() for _ in range(4))
    assert long == len(first) > 20
    assert short == 0
    assert first == second == third == fourth
    shifted, fifth = step(1)  # the first block alone: the second one reads what that made
    assert 0 < shifted < long and fifth != third
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda *_: None)
    heard, sixth = step()
    assert heard == long and sixth == third


def test_another_triton_has_no_programs(launched, monkeypatch):
    """One whose compiled kernels are made otherwise: steps go the long way, and nothing fails."""
    monkeypatch.delattr(launches._Kernel, "packed_metadata")
    monkeypatch.setattr(triton.JITFunction, "run", lambda *a, grid, **k: launches._Kernel("other", launched))
    net = fastres.ResLayer(fastres.Bottleneck, 2, 32, 32).to(memory_format=LAST).train()
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    for _ in range(4):
        with functional.backend("triton"), functional.moments("on"):
            net(x).sum().backward()


# ------------------------------------------------------------------------------------ the harness itself must bite


@triton.jit
def size_kernel(x_ptr, N):
    tl.store(x_ptr, N.to(tl.float32))


needs_triton = pytest.mark.skipif(not HAS_TRITON or INTERPRET, reason="needs kernels that are compiled")


@needs_triton
def test_what_a_gpu_would_refuse_is_refused():
    x = torch.empty(1)
    with launches.no_device() as log:
        size_kernel[(1,)](x, 2)
        assert log == [("size_kernel", (1, 1, 1))]
        with pytest.raises(Exception, match="has no attribute 'to'"):
            size_kernel[(1,)](x, 1)
        with pytest.raises(KeyError, match="num_wraps"):
            size_kernel[(1,)](x, 2, num_wraps=4)
        for grid in [(0,), (1, 65536), (1, 1, 65536), (2**31,), (1.0,)]:
            with pytest.raises(ValueError, match="grid"):
                size_kernel[grid](x, 2)
        with pytest.raises(ValueError, match="grid"):
            launches.replay(launches.Launch(__name__, "size_kernel", (), {}, (1, 2**16), ""))


@needs_triton
def test_launches_are_told_apart_as_the_compiler_tells_them_apart():
    same = [launches._class(v, False) for v in (16, 160)]
    others = [launches._class(v, False) for v in (1, 2, 2**31, 2**31 + 1, None, True, 1.5)]
    assert same[0] == same[1] and len({str(v) for v in [*same, *others]}) == 8
    assert launches._class(3, True) != launches._class(5, True)
