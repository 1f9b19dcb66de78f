"""How many frontends and tokenizers a stack gets when nobody says."""

from pathlib import Path

import pytest
from pagewire.launch import serve, stack
from pagewire.offline import settings
from pagewire.process import processors


@pytest.mark.parametrize(
    ("cores", "device", "has_gpu", "expected"),
    [
        (16, "cuda", True, (4, 2)),
        (16, "auto", True, (4, 2)),
        (128, "cuda", True, (4, 2)),
        (8, "cuda", True, (2, 2)),
        (7, "cuda", True, (1, 1)),
        (2, "cuda", True, (1, 1)),
        (16, "fake", False, (4, 2)),
        (16, "auto", False, (1, 1)),
        (64, "cpu", True, (1, 1)),
    ],
)
def test_several_only_where_cores_are_left(
    cores: int, device: str, has_gpu: bool, expected: tuple[int, int]
) -> None:
    assert stack.replicas(cores, device, has_gpu) == expected


def test_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "usable", lambda: 16)
    config = serve.parse(["--device", "cuda", "--num-frontends", "1"])
    assert (config.num_frontends, config.num_tokenizers, config.num_workers) == (1, 2, 1)
    assert "2 tokenizer(s), on 16 cores" in serve.service_counts(config)


def test_the_choice_is_not_mentioned_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "usable", lambda: 2)
    config = serve.parse(["--device", "cuda"])
    assert (config.num_frontends, config.num_tokenizers) == (1, 1)
    assert serve.service_counts(config) == ""


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-f00d ,-1,7")


def places(config: stack.StackConfig) -> list[str | None]:
    services = stack.model_services(config, config.model)
    return [
        dict(service.environment).get("CUDA_VISIBLE_DEVICES")
        for service in services
        if service.name.startswith("worker")
    ]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--device", "cuda", "--num-workers", "2"], ["2", "GPU-f00d"]),
        (["--num-workers", "3", "--gpu-memory-utilization", "0.45"], ["2", "GPU-f00d", "2"]),
        (["--num-workers", "1"], [None]),
        (["--device", "cpu", "--num-workers", "3"], [None] * 3),
        (["-tp", "2"], [None] * 2),
    ],
)
def test_workers_take_turns_over_the_gpus(
    visible: None, flags: list[str], expected: list[str | None]
) -> None:
    assert places(serve.parse(flags)) == expected


def test_more_workers_than_the_gpus_hold_are_refused(
    visible: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serve.parse(["--num-workers", "3"])
    assert (
        "there are 2 GPU(s), with room for 1 each at --gpu-memory-utilization 0.9"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="num_workers=3: there are 2"):
        settings.configure({"num_workers": 3})


def test_without_the_variable_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert stack.gpus() == [
        str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))
    ]
