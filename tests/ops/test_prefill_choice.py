"""Which kernel prefill_attention takes, and that the one for Hopper compiles: this needs no GPU,
running it would."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops.triton_cases import paged
from pagewire_kernels import attention_prefill
from pagewire_kernels.attention_prefill import PrefillConfig, hopper_has, prefill_attention

BF16, SMALL = torch.bfloat16, PrefillConfig(block_m=16, block_n=16, warps=1, stages=2)


@pytest.mark.parametrize(
    ("has", "capability", "dtype", "dim", "group", "page", "release"),
    [
        (True, (9, 0), BF16, 128, 4, 16, "3.6.0"),
        (True, (9, 0), torch.float16, 128, 3, 128, "3.6.1"),
        (False, (8, 9), BF16, 128, 4, 16, "3.6.0"),
        (False, (10, 0), BF16, 128, 4, 16, "3.6.0"),
        (False, (9, 0), torch.float32, 128, 4, 16, "3.6.0"),
        (False, (9, 0), BF16, 64, 4, 16, "3.6.0"),
        (False, (9, 0), BF16, 128, 17, 16, "3.6.0"),
        (False, (9, 0), BF16, 128, 4, 8, "3.6.0"),
        (False, (9, 0), BF16, 128, 4, 16, "3.7.0"),
    ],
)
def test_where_there_is_a_hopper_kernel(
    has: bool,
    capability: tuple[int, int],
    dtype: torch.dtype,
    dim: int,
    group: int,
    page: int,
    release: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_prefill.triton, "__version__", release)
    assert hopper_has(capability, dtype, dim, group, page) is has


def _taken(monkeypatch: pytest.MonkeyPatch, **options: Any) -> bool:
    """Whether the Hopper kernel is, on a machine that has it."""
    calls: list[dict[str, Any]] = []

    def hopper_prefill(*args: Any, out: torch.Tensor, **rest: Any) -> torch.Tensor:
        calls.append(rest)
        return out

    monkeypatch.setitem(
        sys.modules,
        "pagewire_kernels.attention_prefill_hopper",
        SimpleNamespace(hopper_prefill=hopper_prefill),
    )
    monkeypatch.setattr(attention_prefill, "takes_hopper", lambda q, k_cache, v_cache: True)
    q, k, v, batch = paged([3, 5], [9, 5], 2, 2, 16, 16)
    prefill_attention(
        q,
        k,
        v,
        batch.block_tables,
        batch.seq_lens,
        batch.query_start,
        0.1,
        skip_one=True,
        **options,
    )
    assert calls in ([], [{"skip_one": True}])
    return bool(calls)


@pytest.mark.parametrize(
    "options", [{"window": 4}, {"softcap": 5.0}, {"alibi_slopes": torch.ones(4)}, {"config": SMALL}]
)
def test_what_the_hopper_kernel_lacks_goes_to_the_other(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _taken(monkeypatch)
    assert not _taken(monkeypatch, **options)


def _looks_like(q: Any, **other: Any) -> Any:
    """A tensor that claims to be on a GPU."""
    fields = {name: getattr(q, name) for name in ("shape", "dtype", "stride", "data_ptr")}
    return SimpleNamespace(**{**fields, "device": torch.device("cuda"), **other})


def test_few_tokens_and_gaps_go_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_prefill.triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    least, cache = attention_prefill.LEAST_TOKENS, torch.empty(4, 2, 16, 128, dtype=BF16)
    q = torch.empty(least, 8, 128, dtype=BF16)
    assert attention_prefill.takes_hopper(_looks_like(q), cache, cache)
    assert not attention_prefill.takes_hopper(q, cache, cache)
    assert not attention_prefill.takes_hopper(_looks_like(q[1:]), cache, cache)
    assert not attention_prefill.takes_hopper(_looks_like(q, data_ptr=lambda: 8), cache, cache)
    assert not attention_prefill.takes_hopper(_looks_like(q), cache, cache[:, :1])
    assert not attention_prefill.takes_hopper(
        _looks_like(torch.empty(least, 8, 132, dtype=BF16)[:, :, :128]), cache, cache
    )


COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

driver.set_active(Driver())
from pagewire_kernels import attention_prefill_hopper as hopper

found, kernel, heads, page = [], hopper._prefill, int(sys.argv[1]), int(sys.argv[2])

class Compiled:
    def __getitem__(self, grid): return lambda *args, **options: found.append(kernel.warmup(*args, grid=grid, **options))

hopper._prefill = Compiled()
q, cache = torch.zeros(64, heads, 128, dtype=torch.bfloat16), torch.zeros(64, 8, page, 128, dtype=torch.bfloat16)
tables, lengths, starts = (torch.zeros(shape, dtype=torch.int32) for shape in ((4, 40), 4, 5))
hopper.hopper_prefill(q, cache, cache.clone(), tables, lengths, starts, 0.1, skip_one=True, out=q.flatten(1))
print(found[0].metadata.shared, found[0].asm["ptx"].count("wgmma.mma_async"))
"""


@pytest.mark.parametrize(("heads", "page"), [(32, 16), (24, 128)])
def test_the_hopper_kernel_compiles(heads: int, page: int, tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", COMPILE, str(heads), str(page)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    shared, products = map(int, found.stdout.split()[-2:])
    assert shared <= 232_448  # of a block, on Hopper
    assert products == 2 * (
        8 + 2 * 16 + 8
    )  # two groups: the first scores, two loops with scores and values, the last values
