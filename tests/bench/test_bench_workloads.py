"""Workloads: the published names, numbers and lengths; the same prompts for the same seed; shares
that add up."""

import itertools
import random

import pytest
from pagewire.bench import workloads
from pagewire.bench.clients import moments


@pytest.mark.parametrize(
    ("name", "requests", "prompt", "output", "common"),
    [
        ("mixed", 256, (100, 1024), (100, 1024), 0),
        ("single", 1, (128, 128), (512, 512), 0),
        ("wide", 1024, (128, 128), (128, 128), 0),
        ("long", 32, (8192, 8192), (64, 64), 0),
        ("shared", 256, (64, 64), (64, 64), 2048),
    ],
)
def test_offline_workloads(
    name: str, requests: int, prompt: tuple[int, int], output: tuple[int, int], common: int
) -> None:
    found = workloads.parse(name)
    assert (found.requests, found.prompt, found.output, found.common) == (
        requests,
        prompt,
        output,
        common,
    )
    prompts, lengths = workloads.batch(found, 0)
    assert len(prompts) == len(lengths) == requests
    assert all(prompt[0] <= len(ids) - common <= prompt[1] for ids in prompts)
    assert all(output[0] <= n <= output[1] for n in lengths)
    assert len({tuple(ids[:common]) for ids in prompts}) == 1 if common else True
    assert (prompts, lengths) == workloads.batch(found, 0)
    assert prompts != workloads.batch(found, 1)[0]


def test_online_workloads() -> None:
    found = [workloads.parse(name, workloads.ALONE) for name in workloads.ONLINE]
    assert [(w.streams, w.rate, w.prompt[0], w.output[0], w.common) for w in found] == [
        (1, 0, 128, 256, 0),
        (256, 0, 128, 128, 0),
        (256, 0, 512, 128, 1024),
        (0, 32, 512, 128, 0),
        (1024, 0, 64, 64, 0),
    ]
    assert [w.requests for w in found] == [8, 256, 256, 320, 1024]


@pytest.mark.parametrize(
    "text", ["", "16x128", "0x1/1", "1x0/1", "poisson0x1/1", "widest", "1x1/1+", "-1x1/1"]
)
def test_what_is_no_workload_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="workload"):
        workloads.parse(text)


def test_groups_stand_for_their_members() -> None:
    found = workloads.parse_list("2x3/4, sweep", {"sweep": workloads.SWEEP})
    assert [w.name for w in found] == ["2x3/4", *workloads.SWEEP]


@pytest.mark.parametrize("name", [*workloads.OFFLINE, *workloads.ONLINE])
def test_scaling_shrinks_and_keeps_what_it_is(name: str) -> None:
    full = workloads.parse(name, workloads.ALONE)
    small = full.scaled(0.01)
    assert small.name == full.name and small.rate == full.rate
    assert (
        1 <= small.requests <= max(2, full.requests // 50)
        and 4 <= small.prompt[0] <= full.prompt[0]
    )
    assert bool(small.common) == bool(full.common)
    assert full.scaled(1) == full


@pytest.mark.parametrize(
    ("name", "parts"),
    [("1x128/256", 1), ("256x128/128", 4), ("poisson32x512/128", 4), ("3x4/5", 3), ("6x4/5", 4)],
)
def test_the_shares_of_the_clients_add_up(name: str, parts: int) -> None:
    whole = workloads.parse(name, workloads.ALONE)
    shares = workloads.split(whole, 4)
    assert len(shares) == parts and all(share.requests for share in shares)
    assert sum(share.requests for share in shares) == whole.requests
    assert sum(share.streams for share in shares) == whole.streams
    assert not whole.rate or sum(share.rate for share in shares) == pytest.approx(whole.rate)


@pytest.mark.parametrize("vocab", [0, 1000])
def test_prompts_of_requests(vocab: int) -> None:
    load = workloads.parse("4x20/8+30")

    def prompts(seed: str) -> list[object]:
        return [body["prompt"] for body in workloads.bodies(load, seed, "common", vocab)]

    made = prompts("a")
    assert made == prompts("a") != prompts("b") and len({str(prompt) for prompt in made}) == 4
    split = [prompt.split() if isinstance(prompt, str) else prompt for prompt in made]
    assert all(len(prompt) == 50 for prompt in split)
    assert (
        len(
            {
                tuple(prompt[:30])
                for prompt in split
                + [list(p.split()) if isinstance(p, str) else p for p in prompts("b")]
            }
        )
        == 1
    )
    if vocab:
        assert all(workloads.FIRST_ID <= token < vocab for prompt in split for token in prompt)


def test_requests_of_a_poisson_process_come_at_its_rate() -> None:
    when = list(moments(32.0, 20_000, random.Random(1)))
    gaps = [after - before for before, after in itertools.pairwise(when)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 32, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1), (
        "exponential: as wide as long"
    )


def test_a_warm_up_has_as_many_streams_and_few_tokens() -> None:
    assert workloads.parse("256x128/128").warmup().streams == 256
    assert workloads.parse("256x128/128").warmup().output == (16, 16)
    alone = workloads.parse("1x128/256", 5).warmup()
    assert (alone.requests, alone.streams, alone.output) == (workloads.WARMUPS_ALONE, 1, (8, 8))
    assert workloads.parse("4x4/4").warmup().output == (4, 4)
