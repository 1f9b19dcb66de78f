"""The metrics of several stacks on one page."""

from pagewire.ray.metrics import merged_page

PAGE = """# HELP vllm:prompt_tokens_total Prompt tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{model_name="m"} %d.0
# HELP vllm:e2e_seconds Time.
# TYPE vllm:e2e_seconds histogram
vllm:e2e_seconds_bucket{le="1.0"} 2.0
vllm:e2e_seconds_bucket{le="+Inf"} 3.0
vllm:e2e_seconds_count 3.0
vllm:e2e_seconds_sum 4.0
"""


def test_each_sample_says_of_which_replica_it_is() -> None:
    lines = merged_page({"a": PAGE % 5, "b": PAGE % 6}).decode().splitlines()
    assert lines[:4] == [
        "# HELP vllm:prompt_tokens_total Prompt tokens.",
        "# TYPE vllm:prompt_tokens_total counter",
        'vllm:prompt_tokens_total{model_name="m",replica="a"} 5.0',
        'vllm:prompt_tokens_total{model_name="m",replica="b"} 6.0',
    ]
    assert [line for line in lines if line.startswith("# TYPE")] == [
        "# TYPE vllm:prompt_tokens_total counter",
        "# TYPE vllm:e2e_seconds histogram",
    ]
    assert 'vllm:e2e_seconds_bucket{le="+Inf",replica="b"} 3.0' in lines


def test_without_a_replica_the_page_is_empty() -> None:
    assert merged_page({}) == b""
