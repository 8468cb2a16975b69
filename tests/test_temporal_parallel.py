# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding by 2, 3 and 4 processes equals one process, to the bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import vae_cases
from torch import Tensor, nn

import vidkernels
from vidkernels import distributed
from vidkernels.distributed import temporal
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import VidTok
from vidkernels.models.tokenizers.vidtok_config import VidTokConfig

Call = Callable[[], Tensor]


def vidtok(name: str, **changes: Any) -> VidTok:
    """A narrow model whose temporal blocks, which begin as the identity, are at work."""
    torch.manual_seed(0)
    config = dataclasses.replace(VidTokConfig.named(name), channels=8, residual_blocks=1, **changes)
    model = VidTok(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return model


def patched(name: str, exclude: tuple[str, ...] = (), **changes: Any) -> Any:
    torch.manual_seed(0)
    model = vae_cases.build(name, **changes)
    vidkernels.patch(model, exclude=exclude)
    return model


@torch.no_grad()
def compare(model: nn.Module, calls: list[Call], group: Any = None) -> None:
    """Every call gives the bits of one process on every rank, while the handle is there and after it."""
    expected = [call() for call in calls]
    with distributed.temporal_parallel(model, group) as parallel:
        assert parallel.ranks > 1
        found = [call() for call in calls]
    for a, b, call in zip(found, expected, calls, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        assert torch.equal(call(), b)


def compare_vidtok(group: Any = None, versions: tuple[str, ...] = ("1.0", "1.1")) -> None:
    for version in versions:
        model = vidtok("vidtok_fsq_causal_488_32768", version=version)
        side = model.config.spatial_factor
        for frames, batch in ((1, 1), (5, 2), (22, 1)):  # fewer chunks than ranks, as many, more
            video = torch.randn(batch, 3, frames, 2 * side, 3 * side)
            latents = torch.randn(batch, model.config.z_channels, -(-frames // 4), 2, 3)
            calls: list[Call] = [
                lambda m=model, x=video: m.moments(x),
                lambda m=model, x=video: m.encode(x, length="official"),
                lambda m=model, x=latents: m.decode(x),
            ]
            compare(model, calls, group)


def compare_wan(group: Any = None, names: tuple[str, ...] = ("wan2.1", "wan2.2", "qwenimage")) -> None:
    for name in names:
        # upstream's own forwards between ours
        model = patched(name, ("decoder.up_blocks.0.*", "encoder.down_blocks.2.*") if name == "qwenimage" else ())
        for frames, batch in ((1, 1), (9, 2), (22, 1)):
            video = torch.randn(batch, 3, frames, 32, 48)
            latents = torch.randn(batch, 4, -(-frames // 4), 2, 3)
            calls: list[Call] = [
                lambda m=model, x=video: m.encode(x).latent_dist.parameters,
                lambda m=model, x=latents: m.decode(x).sample,
            ]
            compare(model, calls, group)


def refuse(rank: int) -> None:
    """What cannot be right is refused on every rank, and the model works on."""
    model = vidtok("vidtok_fsq_causal_488_32768")
    latents = torch.randn(1, 5, 4, 2, 3)
    with distributed.temporal_parallel(model):
        with pytest.raises(OptionError, match=r"torch\.no_grad"):
            model.decode(latents)
        with torch.no_grad():
            with pytest.raises(ShapeError, match="the same shape and dtype on every rank"):
                model.decode(latents[:, :, rank:])
            with pytest.raises(OptionError, match="one that has one"):
                distributed.temporal_parallel(model)
            model.decode(latents)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with distributed.temporal_parallel(nn.ModuleDict({"vae": model})):
        model.decode(latents)
    with pytest.raises(OptionError, match=r"one-dimensional"):
        distributed.temporal_parallel(model, dist.init_device_mesh("cpu", (1, dist.get_world_size())))


def tiled() -> None:
    """Tiles go through upstream's own loop, on every rank all of them."""
    model = patched("wan2.1")
    vae_cases.enable_tiling("wan2.1", model)
    latents = torch.randn(1, 4, 3, 8, 8)
    compare(model, [lambda: model.decode(latents).sample])


LAYERS = 3


def record(path: Path, group: Any, rank: int, ranks: int) -> None:
    """Two clips of 2 R + 1 calls through a network of three layers; writes down which frames went where, in which order."""
    members = dist.get_process_group_ranks(group)
    notes, backwards = (dist.new_group(members, use_local_synchronization=True) for _ in range(2))
    temporal._channels[group] = notes, backwards
    log: list[tuple[str, int, int]] = []
    isend, recv = dist.isend, dist.recv

    def send(x: Tensor, peer: int, group: Any) -> Any:
        if group is not notes:
            log.append(("send", members.index(peer), int(group is backwards)))
        return isend(x, peer, group=group)

    def receive(x: Tensor, peer: int, group: Any) -> Any:
        if group is not notes:
            log.append(("receive", members.index(peer), int(group is backwards)))
        return recv(x, peer, group=group)

    dist.isend, dist.recv = send, receive
    ring = temporal.Ring(group, ranks, rank)
    for clip in range(2):
        turns = temporal.Turns(ring, torch.device("cpu"), lead=clip)
        calls = turns.calls(2 * ranks + 1, 2 * ranks + 1)
        parts = ((call, walked(turns, call, call == calls - 1)) for call in range(calls) if turns.is_mine(call))
        assert [int(part) for part in turns.shared(parts, calls)] == list(range(calls))
    dist.isend, dist.recv = isend, recv
    del temporal._channels[group]
    path.write_text(json.dumps(log))


def walked(turns: temporal.Turns, call: int, last: bool) -> Tensor:
    """A call whose layers leave their numbers, and find those of the call before."""
    frames = temporal.CarriedList(turns.carried(call, last), LAYERS)
    for layer in range(LAYERS):
        before = frames[layer]
        assert (before is None) == (call == 0)
        assert before is None or before.flatten().tolist() == [100 * (call - 1) + layer] * 2
        frames[layer] = torch.full((1, 1, 2, 1, 1), 100 * call + layer)
    return torch.tensor([call])


def are_delivered(logs: list[list[Any]], one_group: bool) -> bool:
    """Whether all messages arrive where each group of each rank delivers one after the other, in the order of the calls, as
    NCCL does, and a rank's computation waits for what it receives."""
    queues: dict[tuple[int, int], list[Any]] = {(rank, group): [] for rank in range(len(logs)) for group in (0, 1)}
    for rank, log in enumerate(logs):
        received = 0
        for kind, peer, group in log:
            queues[rank, 0 if one_group else group].append((kind, peer, received))
            received += kind == "receive"
    done = [0] * len(logs)
    moved = True
    while moved:
        moved = False
        for (rank, group), queue in queues.items():
            if not queue or queue[0][0] != "send" or queue[0][2] > done[rank]:
                continue
            target = queue[0][1]
            waiting = queues[target, group]
            if waiting and waiting[0][:2] == ("receive", rank) and waiting[0][2] <= done[target]:
                done[target] += 1
                queue.pop(0)
                waiting.pop(0)
                moved = True
    return not any(queues.values())


def begin(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(3)  # the same inputs on every rank


def two(rank: int, ranks: int, folder: str) -> None:
    begin(rank, ranks, folder)
    compare_vidtok()
    compare_wan()
    refuse(rank)
    tiled()
    record(Path(folder, f"2-{rank}.json"), dist.group.WORLD, rank, 2)
    dist.destroy_process_group()


def four(rank: int, ranks: int, folder: str) -> None:
    """A group of three, whose ranks are not the world's; a mesh's axis of two, each with its own clip."""
    begin(rank, ranks, folder)
    three = dist.new_group([1, 2, 3])
    # Before groups are made on some ranks alone, behind which torch 2.15 would wait here for ever.
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("clip", "time"))
    if rank:
        compare_vidtok(three, ("1.1",))
        compare_wan(three, ("wan2.1",))
        record(Path(folder, f"3-{rank - 1}.json"), three, rank - 1, 3)
    else:
        with pytest.raises(OptionError, match="^group: expected a group that holds this process"):
            distributed.temporal_parallel(vidtok("vidtok_kl_causal_488_4chn"), three)
    model = vidtok("vidtok_kl_causal_488_4chn")
    latents = torch.randn(1, 4, 3 + rank // 2, 2, 2)
    compare(model, [lambda: model.decode(latents)], mesh["time"])
    dist.destroy_process_group()


@pytest.mark.parametrize(("worker", "ranks", "ring"), [(two, 2, 2), (four, 4, 3)])
def test_ranks_together_equal_one_process(worker: Any, ranks: int, ring: int, tmp_path: Path) -> None:
    """And nobody waits for ever where messages keep their order, with two groups, not with one: NCCL itself cannot run here."""
    torch.multiprocessing.spawn(worker, (ranks, str(tmp_path)), nprocs=ranks)
    logs = [json.loads((tmp_path / f"{ring}-{rank}.json").read_text()) for rank in range(ring)]
    assert sum(len(log) for log in logs) == 2 * 2 * LAYERS * 2 * ring  # sent and received, in two clips
    assert are_delivered(logs, one_group=False)
    assert not are_delivered(logs, one_group=True)


def test_one_process_changes_nothing() -> None:
    """Without torch.distributed there is one rank, and gradients work on."""
    model = vidtok("vidtok_fsq_causal_488_32768")
    latents = torch.randn(1, 5, 2, 2, 2)
    expected = model.decode(latents)
    with distributed.temporal_parallel(model) as parallel:
        assert parallel.ranks == 1 and parallel.models == [model]
        assert torch.equal(model.decode(latents), expected) and expected.requires_grad


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(2, 2),
        lambda: "vae",
        lambda: vae_cases.build("wan2.1"),  # not patched
        lambda: patched("hunyuan"),
        lambda: vidtok("vidtok_kl_noncausal_488_4chn"),
    ],
)
def test_models_that_see_all_frames_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(OptionError, match=r"^model: expected .*vidkernels\.patch"):
        distributed.temporal_parallel(build())


def nccl(rank: int, ranks: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(3)
    model = vidtok("vidtok_fsq_causal_488_32768").to("cuda", torch.bfloat16)
    latents = torch.randn(1, 5, 9, 4, 4).to("cuda", torch.bfloat16)
    with torch.no_grad():
        expected = model.decode(latents)
        with distributed.temporal_parallel(model):
            torch.testing.assert_close(model.decode(latents), expected)
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_gpus_equal_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(nccl, (2, str(tmp_path)), nprocs=2)
