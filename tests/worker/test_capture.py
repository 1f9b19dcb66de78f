"""Which models run without CUDA graphs on which GPUs, by themselves."""

import logging

import pytest
import torch
from ops.known_models import MODELS
from pagewire.config import WorkerConfig
from pagewire.worker.device.gpus import GIB, Gpu
from pagewire.worker.load import capture
from pagewire.worker.load.kv_sizing import Sizing
from pagewire.worker.load.loader import Loaded
from pagewire.worker.models import describe
from pagewire.worker.models.cache_spec import cache_spec
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire_kernels.backend import backend

MIXTURE, DENSE = describe(MODELS["Qwen3-30B-A3B"]), describe(MODELS["SmolLM2-135M"])
HALF, FULL = torch.bfloat16, torch.float32


def gpu(*capability: int) -> Gpu:
    return Gpu(0, "NVIDIA L4", (capability[0], capability[1]), 22 * GIB, 21 * GIB)


@pytest.mark.parametrize(
    ("capability", "dtype", "free"),
    [
        ((8, 0), HALF, False),
        ((8, 9), HALF, False),
        ((12, 0), HALF, False),
        ((9, 0), HALF, True),
        ((10, 3), HALF, True),
        ((8, 9), FULL, True),
    ],
)
def test_experts_are_captured_where_they_stay_on_the_device(
    capability: tuple[int, int],
    dtype: torch.dtype,
    free: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for arch, captured in ((MIXTURE, free), (DENSE, True)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            config = capture.eager_if_needed(WorkerConfig(), arch, dtype, gpu(*capability))
        assert config.enforce_eager is not captured
        assert len(caplog.records) == (not captured)
        decoder = Decoder(arch, Build(backend("cuda"), dtype, "meta"))
        loaded = Loaded(
            decoder,
            dtype,
            Sizing(1, 1, 1, 16, 16),
            [],
            cache_spec(arch, dtype),
            torch.empty(0),
            (),
            "cuda",
        )
        assert loaded.capturable is captured


def test_the_log_says_why_once_and_not_where_it_was_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        asked = WorkerConfig(enforce_eager=True)
        assert (
            capture.eager_if_needed(asked, MIXTURE, HALF, gpu(8, 9)) is asked and not caplog.records
        )
        capture.eager_if_needed(WorkerConfig(), MIXTURE, HALF, gpu(8, 9))
    line = caplog.records[0].getMessage()
    assert "NVIDIA L4" in line and "compute capability 8.9" in line and "--enforce-eager" in line
