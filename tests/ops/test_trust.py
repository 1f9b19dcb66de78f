"""The check of one attention kernel against another at a worker's start."""

import logging
from typing import Any

import pytest
import torch
from pagewire.worker.gpu import verify_hopper
from pagewire_kernels import attention_prefill
from pagewire_kernels.kernel_choices import KernelChoices


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Of a GPU for which there is the kernel, as far as the check can see; the interpreter runs the
    general one for both."""
    monkeypatch.setattr(attention_prefill, "takes_hopper", lambda q, keys, values: True)
    monkeypatch.setattr(verify_hopper, "COUNTS", (9, 1, 3))
    monkeypatch.setattr(verify_hopper, "BEFORE", (5, 0))
    monkeypatch.setattr(verify_hopper, "LEAST_TOKENS", 20)
    return torch.zeros(2, 9, 2, 16, 32)


def plain(*args: Any, config: Any, **options: Any) -> torch.Tensor:
    """The general kernel in small tiles."""
    small = attention_prefill.PrefillConfig(block_m=16, block_n=16, warps=1, stages=2)
    return attention_prefill.prefill_attention(*args, config=small, **options)


def test_kernels_that_agree_are_both_used(
    cache: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verify_hopper, "prefill_attention", plain)
    choices = KernelChoices()
    verify_hopper.check_prefill(choices, cache, 4, [70, 5, 1])
    assert choices.hopper_prefill and not caplog.records


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (1.1, "differ from the general kernel's by"),
        (float("nan"), "by inf"),
        (None, "it failed: no"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_not_used(
    cache: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: float | None,
    words: str,
) -> None:
    def wrong(*args: Any, config: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        if config is None and fault is None:
            raise RuntimeError("no such instruction")
        plain(*args, config=config, out=out, **options)
        return out.mul_(fault) if config is None and fault is not None else out

    monkeypatch.setattr(verify_hopper, "prefill_attention", wrong)
    choices = KernelChoices()
    with caplog.at_level(logging.WARNING):
        verify_hopper.check_prefill(choices, cache, 4, [5])
    assert not choices.hopper_prefill and words in caplog.text


def test_nothing_is_checked_where_there_is_no_such_kernel(caplog: pytest.LogCaptureFixture) -> None:
    cache = torch.full((2, 9, 2, 16, 32), 7.0)
    verify_hopper.check_prefill(KernelChoices(), cache, 4, [5])
    assert cache.eq(7).all() and not caplog.records
