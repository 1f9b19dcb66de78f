"""Connections of two ranks on GPUs, without GPUs: a library that stands in for NCCL, in which tensors
go over when the test says so; and gloo."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pagewire_kernels import cuda_point_to_point
from pagewire_kernels.communicator import CommunicatorFailed
from pagewire_kernels.cuda_point_to_point import MOST_SENT, NcclPointToPoint, StagedPointToPoint
from torch.distributed import HashStore


class Work:
    """Torch's handle of an operation."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.completed = False
        self.waited = False

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        """Of the current stream."""
        self.waited = True


class Nccl:
    """In place of ProcessGroupNCCL."""

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        assert size == 2 and options.config.max_ctas > 0
        self.rank = rank
        self.works: list[Work] = []

    @staticmethod
    def Options() -> Any:
        return SimpleNamespace(_timeout=None, config=SimpleNamespace(max_ctas=0))

    def eager_connect_single_device(self, device: torch.device) -> None: ...

    def _add(self, tensors: list[torch.Tensor], other: int, tag: int) -> Work:
        assert other == 1 - self.rank
        (x,) = tensors
        assert x.dtype == torch.uint8 and x.ndim == 1
        self.works.append(Work(x))
        return self.works[-1]

    send = recv = _add


@pytest.fixture
def connected(monkeypatch):
    """connected(is_sender) -> (link, its stand-in), with the tensor of the start gone over."""
    monkeypatch.setattr(cuda_point_to_point.dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def make(is_sender: bool) -> tuple[NcclPointToPoint, Nccl]:
        link = NcclPointToPoint(HashStore(), 3, 5, torch.device("cpu"), is_sender=is_sender)
        nccl: Any = link._group
        nccl.works[0].completed = True
        link.check()
        nccl.works.clear()
        return link, nccl

    return make


def test_a_sender_waits_only_while_four_tensors_are_on_their_way(connected):
    link, nccl = connected(True)
    for number in range(MOST_SENT + 2):
        link.send(torch.full((2, 3), number, dtype=torch.bfloat16))
    assert [work.waited for work in nccl.works] == [True] * 2 + [False] * MOST_SENT
    assert len(nccl.works[0].x) == 12


def test_a_receiver_s_stream_waits_for_each_tensor(connected):
    link, nccl = connected(False)
    x = torch.zeros(4, 2)
    link.recv(x[:3])
    (work,) = nccl.works
    assert work.waited and work.x.data_ptr() == x.data_ptr() and len(work.x) == 24


@pytest.mark.parametrize(
    ("is_sender", "operation"), [(True, "sending to"), (False, "receiving from")]
)
def test_a_rank_that_does_not_come_is_named(is_sender, operation, connected, monkeypatch):
    link, nccl = connected(is_sender)
    now = 100.0
    monkeypatch.setattr(cuda_point_to_point.time, "monotonic", lambda: now)
    link.serve()
    (link.send if is_sender else link.recv)(torch.zeros(1))
    now = 129.0
    link.check()
    now = 131.0
    with pytest.raises(CommunicatorFailed, match=f"rank 3 has waited 31 s in {operation} rank 5"):
        link.check()
    nccl.works[0].completed = True
    link.check()


def test_while_ranks_load_more_time_is_given(connected, monkeypatch):
    link, _ = connected(False)
    now = 100.0
    monkeypatch.setattr(cuda_point_to_point.time, "monotonic", lambda: now)
    link.recv(torch.zeros(1))
    now = 300.0
    link.check()


def test_tensors_go_through_the_host_in_their_order():
    store = HashStore()
    sent = [torch.randn(3, 4).to(torch.bfloat16), torch.randn(2, 4)]

    def end(is_sender: bool) -> list[torch.Tensor]:
        link = StagedPointToPoint(store, int(not is_sender), int(is_sender), is_sender=is_sender)
        received = [torch.zeros_like(x) for x in sent]
        for x in sent if is_sender else received:
            (link.send if is_sender else link.recv)(x)
        if is_sender:
            link._host._sent[-1].wait()
        return received

    with ThreadPoolExecutor(2) as pool:
        _, received = pool.map(end, (True, False))
    for one, other in zip(sent, received, strict=True):
        assert torch.equal(one, other)
