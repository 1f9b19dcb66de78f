"""How many frontends and tokenizers a stack gets when nobody says."""

import pytest
from pagewire import launch, stack


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
def test_several_only_where_cores_are_left(cores: int, device: str, has_gpu: bool, expected: tuple[int, int]) -> None:
    assert stack.replicas(cores, device, has_gpu) == expected


def test_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "cores", lambda: 16)
    config = launch.parse(["--device", "cuda", "--num-frontends", "1"])
    assert (config.num_frontends, config.num_tokenizers, config.num_workers) == (1, 2, 1)
    assert "2 tokenizer(s), on 16 cores" in launch.crew(config)


def test_the_choice_is_not_mentioned_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "cores", lambda: 2)
    config = launch.parse(["--device", "cuda"])
    assert (config.num_frontends, config.num_tokenizers) == (1, 1)
    assert launch.crew(config) == ""


def test_cores_are_at_least_one() -> None:
    assert stack.cores() >= 1
