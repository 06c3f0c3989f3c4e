"""Two and four gloo processes against one on the joined batch; DDP, FSDP2; a killed rank is an error, not a hang.

Starting processes is slow, so each world is started once and answers every question in one go: a worker writes what it
computed to a file, and the tests here compare the files with one process.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastres
from fastres.integrations.distributed import DistributedDataParallel
from tests.parity import randomize
from tests.tolerance import assert_close64

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"
)

SIZES = {2: [(3, 2), (4, 0)], 4: [(3, 1, 0, 2), (0, 0, 5, 1)]}  # samples of each rank, by step
LR = 1e-3


def net(norm: str = "FusedSyncBN") -> nn.Module:
    backbone = fastres.ResNet(
        18, stem_channels=8, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,),
        norm_cfg=dict(type=norm),
    )  # fmt: skip
    return randomize(backbone)


class First(nn.Module):
    """A backbone that gives a tensor."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)[0]


def data(step: int, samples: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randn(samples, 3, 32, 32, generator=g, dtype=torch.float64)
    return x, torch.randn(samples, 16, 4, 4, generator=g, dtype=torch.float64)


def part(t: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return t.split(list(sizes))[rank].float()


def one_process(sizes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Eager PyTorch on the joined batch."""
    model = First(net("BN")).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    record: dict[str, Tensor] = {}
    for step, counts in enumerate(sizes):
        x, dy = (t.float().to(dtype) for t in data(step, sum(counts)))
        x.requires_grad_()
        y = model(x)
        y.backward(dy)
        record |= _record(step, model, y.detach(), x.grad)
        optimizer.step()
        optimizer.zero_grad()
    return record


def _record(step: int, model: nn.Module, y: Tensor, dx: Tensor | None) -> dict[str, Any]:
    record: dict[str, Any] = {f"step {step} output": y, f"step {step} input gradient": dx}
    for name, p in model.named_parameters():
        record[f"step {step} gradient of {name}"] = p.grad.clone()
    for name, b in model.named_buffers():
        record[f"step {step} buffer {name}"] = b.clone()
    return record


# ------------------------------------------------------------------------------------------------------------- workers


def uneven(rank: int, world: int) -> dict[str, Any]:
    """FusedSyncBN net, gradients summed over ranks by hand, as for a loss that is a sum over samples."""
    model = First(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    record: dict[str, Any] = {}
    for step, counts in enumerate(SIZES[world]):
        x, dy = (part(t, counts, rank) for t in data(step, sum(counts)))
        x.requires_grad_()
        y = model(x)
        y.backward(dy)
        for p in model.parameters():
            dist.all_reduce(p.grad)
        record |= _record(step, model, y.detach(), x.grad)
        optimizer.step()
        optimizer.zero_grad()
    return record


def stage(norm: str = "FusedSyncBN") -> nn.Module:
    layer = fastres.ResLayer(fastres.Bottleneck, 2, 8, 16, stride=2, norm_cfg=dict(type=norm))
    return randomize(layer).to(memory_format=torch.channels_last)


def basic_stage(norm: str = "FusedSyncBN") -> nn.Module:
    layer = fastres.ResLayer(fastres.BasicBlock, 2, 8, 16, stride=2, norm_cfg=dict(type=norm))
    return randomize(layer).to(memory_format=torch.channels_last)


def stage_data(step: int, samples: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(200 + step)
    x = 2 + torch.randn(samples, 8, 12, 11, generator=g, dtype=torch.float64)
    return x, torch.randn(samples, 16, 6, 6, generator=g, dtype=torch.float64)


def stage_steps(
    model: nn.Module, sizes: list[tuple[int, ...]], dtype: torch.dtype, rank: int | None
) -> dict[str, Any]:
    """Two steps of the joined batch in one process, or of one rank's part with gradients summed over ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    record: dict[str, Any] = {}
    for step, counts in enumerate(sizes):
        x, dy = (t.float() for t in stage_data(step, sum(counts)))
        if rank is not None:
            x, dy = (t.split(list(counts))[rank] for t in (x, dy))
        x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = model(x)
        y.backward(dy.to(dtype))
        if rank is not None:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        record |= _record(step, model, y.detach(), x.grad)
        optimizer.step()
        optimizer.zero_grad()
    return record


def moment_form(rank: int, world: int) -> dict[str, Any]:
    """Linked bottlenecks on the fused operators; an empty rank takes another route than the others."""
    with fastres.backend("reference"), fastres.functional.moments("on"), fastres.record_routes() as log:
        record = stage_steps(stage(), SIZES[world], torch.float32, rank)
    used = [c.reason.endswith("; moment form") for c in log if c.op == "add_relu"]
    return dict(record=record, used=used)


def downsample_form(rank: int, world: int) -> dict[str, Any]:
    """Basic blocks, the first with a downsample in moment form; an empty rank takes another route than the others."""
    with fastres.backend("reference"), fastres.functional.moments("on"), fastres.record_routes() as log:
        record = stage_steps(basic_stage(), SIZES[world], torch.float32, rank)
    used = [c.reason.endswith("; downsample in moment form") for c in log if c.op == "add_relu"]
    return dict(record=record, used=used)


def groups(rank: int, world: int) -> dict[str, Any]:
    """Pairs of ranks that synchronise among themselves."""
    pairs = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
    norm = fastres.FusedSyncBatchNorm(3, process_group=pairs[rank // 2], relu=True)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(rank))
    return dict(y=norm(x), mean=norm.running_mean, var=norm.running_var)


def skipped(rank: int, world: int) -> dict[str, Any]:
    """One rank's batch overflows; with the option no rank's running statistics move, on any form."""
    answer = {}
    for moments in ("on", "off"):
        model = stage()
        for norm in model.modules():
            if isinstance(norm, fastres.FusedSyncBatchNorm):
                norm.skip_nonfinite_stats = True
        before = {name: b.clone() for name, b in model.named_buffers()}
        x = stage_data(0, 2)[0].float().contiguous(memory_format=torch.channels_last)
        with fastres.backend("reference"), fastres.functional.moments(moments):
            model(x * float("inf") if rank == 1 else x)
            answer[f"{moments}: kept"] = all(torch.equal(b, before[n]) for n, b in model.named_buffers())
            model(x)
            moved = [
                not torch.equal(b, before[n]) and bool(b.isfinite().all()) for n, b in model.named_buffers()
            ]
            answer[f"{moments}: moved"] = all(moved)
    return answer


def communication(call: Any) -> list[str]:
    """Every collective that a call ends in, in order: the process group's own operators, whoever asks for them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as log:
        call()
    events = sorted(log.events(), key=lambda event: event.time_range.start)
    return [e.name.removeprefix("c10d::").strip("_") for e in events if e.name.startswith("c10d::")]


def counted(rank: int, world: int) -> dict[str, Any]:
    """Collectives of a whole step, of layers alone and of every form in which a layer may run."""
    layers = dict(
        norm=fastres.FusedSyncBatchNorm(8, relu=True),
        basic=randomize(fastres.BasicBlock(8, 8, norm_cfg=dict(type="FusedSyncBN"))),
        stage=stage(),
        stage_of_basic_blocks=basic_stage(),
    )
    answer: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a collective that torch has renamed
        for backend in ("auto", "reference"):
            for moments in ("on", "off"):
                for name, layer in layers.items():
                    x = (
                        stage_data(0, 2)[0]
                        .float()
                        .contiguous(memory_format=torch.channels_last)
                        .requires_grad_()
                    )
                    with fastres.backend(backend), fastres.functional.moments(moments):
                        y: list[Tensor] = []
                        forward = communication(lambda layer=layer, x=x, y=y: y.append(layer(x)))
                        backward = communication(lambda y=y: y[0].backward(torch.randn(y[0].shape)))
                    norms = sum(isinstance(m, fastres.FusedSyncBatchNorm) for m in layer.modules())
                    answer[f"{name}, {backend}, {moments}"] = (norms, forward, backward)
    layers["stage"].eval()
    answer["eval"] = (0, communication(lambda: layers["stage"](x)), [])
    return answer


def _train(model: nn.Module, rank: int, world: int) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(2):
        x, dy = (part(t, (2,) * world, rank) for t in data(step, 2 * world))
        loss = (model(x) * dy).sum() * world  # both average gradients over ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {}


def ddp(rank: int, world: int) -> dict[str, Any]:
    model = DistributedDataParallel(fastres.convert_sync_batchnorm(First(net("FusedBN"))))
    _train(model, rank, world)
    return dict(model.module.state_dict())


def fsdp(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = First(net())
    mesh = init_device_mesh("cpu", (world,))
    for block in [*model.backbone.layer1, *model.backbone.layer2]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, rank, world)
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}


def fused_peer(rank: int, world: int) -> dict[str, Any]:
    """Somebody else's block: fuse_, then synchronise, then DDP; and the other way round."""
    from tests.plain_resnet import Block

    out = {}
    for order in ("fuse first", "synchronise first"):
        model: nn.Module = nn.Sequential(randomize(Block(4, 8, stride=2)))
        if order == "fuse first":
            fastres.fuse_(model)
            model = fastres.convert_sync_batchnorm(model)
        else:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            fastres.fuse_(model)
        assert model[0].fused_obstacle() == ""
        x = torch.randn(world, 4, 8, 8, generator=torch.Generator().manual_seed(1))[rank : rank + 1]
        out[order] = DistributedDataParallel(model)(x).detach()
    return out


QUESTIONS = [uneven, moment_form, downsample_form, skipped, groups, counted, ddp, fsdp, fused_peer]


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    answers = {question.__name__: question(rank, world) for question in QUESTIONS}
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    time.sleep(0.1)  # leaves the GIL to Gloo's threads, which abort the process if they come for it later


def dying(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    norm = fastres.FusedSyncBatchNorm(3)
    before = None
    try:
        for step in range(3):
            if step == 1 and rank == 1:
                os._exit(9)
            before = norm.running_mean.clone()
            norm(torch.randn(2, 3, 4, 4))
    except Exception as error:
        torch.save(dict(error=str(error), kept=torch.equal(norm.running_mean, before)), f"{folder}/{rank}.pt")
        raise


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module", params=[2, 4])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of a world of this size answered."""
    size, folder = request.param, tmp_path_factory.mktemp("world")
    torch.multiprocessing.spawn(worker, (size, str(folder)), size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def test_uneven_and_empty_ranks_against_one_process(world):
    sizes = SIZES[len(world)]
    ranks = [answers["uneven"] for answers in world]
    want, eager = one_process(sizes, torch.float64), one_process(sizes, torch.float32)
    for name, reference in want.items():
        if name.endswith(("output", "input gradient")):
            got = torch.cat([r[name] for r in ranks])
        else:
            got = ranks[0][name]
            assert all(torch.equal(r[name], got) for r in ranks), f"{name} differs between ranks"
        if got.is_floating_point():
            step = name.split()[1]
            assert_close64(
                name, got, eager[name], reference, scale=float(want[f"step {step} output"].abs().max())
            )
        else:
            assert torch.equal(got, reference), name


@pytest.mark.parametrize(
    ("question", "model", "blocks"),
    [("moment_form", stage, (True, True)), ("downsample_form", basic_stage, (True, False))],
    ids=["bottleneck", "basic"],
)
def test_moment_form_over_ranks_against_one_process(world, question, model, blocks):
    sizes = SIZES[len(world)]
    for rank, answers in enumerate(world):
        assert answers[question]["used"] == [counts[rank] > 0 and b for counts in sizes for b in blocks]
    ranks = [answers[question]["record"] for answers in world]
    want, eager = (stage_steps(model("BN").to(d), sizes, d, None) for d in (torch.float64, torch.float32))
    for name, reference in want.items():
        if name.endswith(("output", "input gradient")):
            got = torch.cat([r[name] for r in ranks])
        else:
            got = ranks[0][name]
            assert all(torch.equal(r[name], got) for r in ranks), f"{name} differs between ranks"
        if got.is_floating_point():
            scale = float(want[f"step {name.split()[1]} input gradient"].abs().max())
            assert_close64(name, got, eager[name], reference, scale=scale)
        else:
            assert torch.equal(got, reference), name


def test_process_group_is_honoured(world):
    for first in range(0, len(world), 2):
        norm = nn.BatchNorm2d(3)
        x = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(r)) for r in (first, first + 1)]
        y = torch.relu(norm(torch.cat(x)))
        for rank, mine in zip((first, first + 1), y.split(2), strict=True):
            got = world[rank]["groups"]
            torch.testing.assert_close(got["y"], mine)
            torch.testing.assert_close(got["mean"], norm.running_mean)
            torch.testing.assert_close(got["var"], norm.running_var)


def test_one_collective_each_way_for_every_layer(world):
    """The forward gathers (count, mean, M2) once a layer, the backward sums at most once; nothing else is sent."""
    for answers in world:
        assert len(answers["counted"]) == 17
        for name, (norms, forward, backward) in answers["counted"].items():
            shared = name.startswith(
                "stage"
            )  # the two norms that end its first block send their sums together
            assert (len(forward), len(backward)) == (norms, norms - shared), (name, norms, forward, backward)
            assert all("allgather" in op for op in forward) and all("allreduce" in op for op in backward), (
                name
            )


def test_a_batch_that_is_not_finite_can_be_kept_out_on_every_rank(world):
    for answers in world:
        assert len(answers["skipped"]) == 4 and all(answers["skipped"].values()), answers["skipped"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_data_parallel_training_is_one_process(world, how):
    size = len(world)

    def train(dtype: torch.dtype) -> dict[str, Tensor]:
        model = First(net("BN")).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for step in range(2):
            x, dy = (t.float().to(dtype) for t in data(step, 2 * size))
            (model(x) * dy).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    want, eager = train(torch.float64), train(torch.float32)
    for rank, answers in enumerate(world):
        assert answers[how].keys() == want.keys()
        for name, got in answers[how].items():
            if got.is_floating_point():
                assert_close64(f"rank {rank}: {name}", got, eager[name], want[name])
            else:
                assert torch.equal(got, want[name])


def test_fused_and_synchronised_in_either_order(world):
    from tests.plain_resnet import Block

    plain = randomize(Block(4, 8, stride=2))
    x = torch.randn(len(world), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    eager, want = copy.deepcopy(plain)(x), plain.double()(x.double())
    for order in ("fuse first", "synchronise first"):
        got = torch.cat([answers["fused_peer"][order] for answers in world])
        assert_close64(order, got, eager, want)


def nccl(rank: int, world: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    model = nn.parallel.DistributedDataParallel(First(net()).cuda(), device_ids=[rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(2):
        x, dy = (part(t, (2,) * world, rank).cuda() for t in data(step, 2 * world))
        ((model(x) * dy).sum() * world).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({name: t.cpu() for name, t in model.module.state_dict().items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between ranks needs two GPUs")
def test_nccl(tmp_path: Path):
    """torch's own DDP with synchronised norms on two GPUs, against one process on the joined batch."""
    torch.multiprocessing.spawn(nccl, (2, str(tmp_path)), 2)
    results = []
    for dtype in (torch.float64, torch.float32):
        model = First(net("BN")).to(dtype).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for step in range(2):
            x, dy = (t.float().to(dtype).cuda() for t in data(step, 4))
            (model(x) * dy).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    for rank in range(2):
        for name, got in torch.load(tmp_path / f"{rank}.pt").items():
            want, eager = (state[name] for state in results)
            if got.is_floating_point():
                assert_close64(f"rank {rank}: {name}", got, eager, want)
            else:
                assert torch.equal(got, want.cpu())


def test_a_killed_rank_is_an_error(tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(
        (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)
    ):
        context = torch.multiprocessing.spawn(dying, (2, str(tmp_path)), 2, join=False)
        context.processes[1].join()  # rank 1 is dead; see rank 0 through before the parent ends it
        context.processes[0].join(60)
        while not context.join(5):
            pass
    assert time.monotonic() - start < 60
    survivor = torch.load(tmp_path / "0.pt", weights_only=False)
    assert survivor["error"] and survivor["kept"], "the failed step changed no running statistics"
