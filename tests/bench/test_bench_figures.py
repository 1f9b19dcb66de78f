"""From samples to figures: what is counted, how repeats are bounded, and what stands beside a
figure."""

import json
import math
from pathlib import Path

import pytest
from pagewire.bench import baselines, interleave, options, stats
from pagewire.bench.load import Sample

EIGHT_B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}


def sample(
    began: float, first: float, last: float, tokens: int, gaps: tuple[float, ...] = ()
) -> Sample:
    return Sample(began, first, last, tokens, len(gaps) + 2, "", list(gaps))


def test_percentile() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [stats.percentile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [
        1,
        1,
        3,
        5,
        5,
    ]
    assert math.isnan(stats.percentile([], 0.5))


def test_figures_count_tokens_by_usage_and_pool_gaps() -> None:
    row = stats.summarize(
        [
            sample(10, 10.1, 11.1, 11, (0.5, 0.5)),
            sample(10.5, 10.8, 12, 4, (0.4, 0.8)),
            Sample(error="refused"),
        ]
    )
    assert row["out tok/s"] == pytest.approx(15 / 2)
    assert row["requests/s"] == pytest.approx(1) and row["failed"] == 1
    assert (row["TTFT p50"], row["TTFT p99"]) == (pytest.approx(100), pytest.approx(300))
    assert (row["TPOT p50"], row["TPOT p99"]) == (pytest.approx(100), pytest.approx(400))
    assert (row["gap p50"], row["gap p99"]) == (pytest.approx(500), pytest.approx(800))


def test_figures_of_nothing_are_no_numbers() -> None:
    row = stats.summarize([Sample(error="refused")])
    assert math.isnan(row["out tok/s"]) and math.isnan(row["gap p99"])
    assert stats.table("t", ("a", "b"), [["x", row["gap p99"]]]).endswith("x  -")


def test_a_distribution_is_ordered() -> None:
    shares = stats.distribution({"gap": [3.0, 1.0, 2.0], "TTFT": []})
    assert (
        shares["gap"][0] == 1 and shares["gap"][-1] == 3 and shares["gap"] == sorted(shares["gap"])
    )
    assert len(shares["gap"]) == len(stats.GRID) and shares["TTFT"] == []


def test_tables_leave_empty_columns_out() -> None:
    text = stats.table("title", ("name", "us", "goal"), [["a", 1234.5, ""], ["longer", 0.123, ""]])
    assert text == "title\n  name       us\n  a       1,234\n  longer   0.12"


def test_json_has_no_nan_and_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    stats.write_json(str(file), {"a": float("nan"), "b": [{"c": float("inf")}, 1.5]})
    assert json.loads(file.read_text()) == {"a": None, "b": [{"c": None}, 1.5]}
    assert list(tmp_path.iterdir()) == [file]


def test_models_that_figures_are_known_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_B))
    assert baselines.identify(str(tmp_path)) == "8B"
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_B | {"num_hidden_layers": 16}))
    assert baselines.identify(str(tmp_path)) == ""
    assert (
        baselines.identify("meta/Llama-3.1-8B-Instruct") == "8B"
        and baselines.identify("other") == ""
    )


@pytest.mark.parametrize(
    ("figure", "workload", "value", "share"),
    [
        ("out tok/s", "single", 125.0, "50%"),
        ("out tok/s", "single", 500.0, "200%"),
        ("TTFT p50", "1x128/256", 20.0, "50%"),
    ],
)
def test_less_of_a_latency_and_more_of_a_rate_is_better(
    figure: str, workload: str, value: float, share: str
) -> None:
    assert options.cells("8B", workload, figure, value)[2] == share


def test_unknown_figures_have_nothing_beside_them() -> None:
    assert options.cells("8B", "7x7/7", "out tok/s", 1.0) == ["", "", ""]
    assert options.cells("", "single", "out tok/s", 1.0) == ["", "", ""]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(interleave, "time", made)
    return made


def run(
    clock: Clock, seconds: dict[str, float], runs: int, budget_s: float
) -> tuple[list[str], dict[str, interleave.Result]]:
    order: list[str] = []

    def measure(name: str, number: int) -> interleave.Row:
        order.append(f"{name}{number}")
        clock.now += seconds[name]
        if name == "bad":
            raise OSError("no answer")
        return {"x": float(number)}

    measures = {name: lambda number, name=name: measure(name, number) for name in seconds}
    return order, interleave.run_interleaved(
        measures, runs, interleave.Budget(budget_s), lambda name, result: None
    )


def test_repeats_go_round(clock: Clock) -> None:
    order, results = run(clock, {"a": 1, "b": 1}, 3, 0)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert results["a"].median() == {"x": 1.0}


def test_repeats_that_would_overrun_are_left_out(clock: Clock) -> None:
    order, results = run(clock, {"long": 50, "short": 1}, 3, 60)
    assert order == ["long0", "short0", "short1", "short2"]
    assert clock.now <= 60 and len(results["long"].rows) == 1


def test_what_there_was_no_time_for_says_so(clock: Clock) -> None:
    _, results = run(clock, {"a": 70, "b": 1}, 2, 60)
    assert results["b"].error == "no time left" and not results["b"].rows


def test_a_failure_stops_nothing_else(clock: Clock) -> None:
    order, results = run(clock, {"bad": 1, "b": 1}, 2, 0)
    assert order == ["bad0", "b0", "b1"] and results["bad"].error == "no answer"
    assert results["bad"].as_json() == {"median": {}, "runs": [], "error": "no answer"}
