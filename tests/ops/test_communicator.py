"""Ranks of one process as threads: collective operations over gloo."""

import pytest
import torch
from pagewire_kernels.communicator import (
    SINGLE_RANK,
    Communicator,
    CommunicatorFailed,
    GlooCommunicator,
)
from rank_threads import run_ranks
from torch import Tensor
from torch.distributed import HashStore


def inputs(rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5, 33, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_sums_are_the_same_bits_on_every_rank(size: int, dtype: torch.dtype) -> None:
    def reduced(communicator: Communicator) -> Tensor:
        assert communicator.size == size
        return communicator.all_reduce(inputs(communicator.rank, dtype))

    wanted = inputs(0, dtype).float()
    for rank in range(1, size):
        wanted += inputs(rank, dtype).float()
    for got in run_ranks(size, reduced):
        assert got.dtype == dtype
        assert torch.equal(got, wanted.to(dtype))


@pytest.mark.parametrize("dim", [0, 1])
def test_gathers_in_the_order_of_ranks(dim: int) -> None:
    def gathered(communicator: Communicator) -> Tensor:
        x = inputs(communicator.rank, torch.float32)
        return communicator.all_gather(x[:, ::2], dim)

    wanted = torch.cat([inputs(rank, torch.float32)[:, ::2] for rank in range(4)], dim)
    for got in run_ranks(4, gathered):
        assert torch.equal(got, wanted) and got.is_contiguous()


def test_an_empty_tensor_is_no_exception() -> None:
    def both(communicator: Communicator) -> tuple[Tensor, Tensor]:
        empty = torch.empty(0, 3)
        return communicator.all_reduce(empty), communicator.all_gather(empty, 1)

    for reduced, gathered in run_ranks(2, both):
        assert reduced.shape == (0, 3) and gathered.shape == (0, 6)


def test_a_rank_alone_gives_back_its_own() -> None:
    x = torch.ones(2)
    assert SINGLE_RANK.all_reduce(x) is x and SINGLE_RANK.all_gather(x, 0) is x


def test_a_missing_rank_ends_the_wait_with_a_reason() -> None:
    with pytest.raises(CommunicatorFailed, match="rank 0 of 2 was left alone in connecting"):
        GlooCommunicator(HashStore(), 0, 2, timeout_s=0.2)


def test_a_rank_that_does_not_come_ends_the_operation() -> None:
    def reduced(communicator: Communicator) -> str:
        if communicator.rank == 1:
            return ""
        with pytest.raises(CommunicatorFailed) as caught:
            communicator.all_reduce(torch.ones(4))
        return str(caught.value)

    reason, _ = run_ranks(2, reduced, timeout_s=0.5)
    assert "rank 0 of 2 was left alone in an all-reduce, for which it waits 0.5 s" in reason
