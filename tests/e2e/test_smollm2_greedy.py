"""The demo model in float32, the whole stack against transformers: the same tokens however the work
is cut up, and log-probabilities.

The oracle is one pass of transformers over prompt and output together: the output is what
transformers would generate greedily if and only if each of its tokens is the most likely one after
all before it. The prompts are varied, and the last one is 2,000 tokens long.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from e2e.greedy_prompts import LONG_TOKENS, Tokens, greedy_prompts
from pagewire import LLM, SamplingParams

STEPS = 64
FEWER_STEPS = 20
"""Where the outputs are compared with those of other settings: across the border of a block."""
SOME = slice(3, None, 4)
"""Of the prompts, a quarter with the long one: what takes a step for each few tokens takes minutes
with all."""
SOME_SHORTER = slice(2, None, 4)
"""Without the long one, with one of LONG_TOKENS // 4."""


@pytest.fixture(scope="module")
def prompts(oracle: Any) -> list[Tokens]:
    *others, long, longest = greedy_prompts(oracle[1])
    return [*others, long[: LONG_TOKENS // 4], longest]


def start(**settings: Any) -> LLM:
    base: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 4096,
        "max_num_seqs": 64,
    }
    return LLM(**{**base, **settings})


def generate(
    llm: LLM, prompts: list[Tokens], steps: int = FEWER_STEPS, logprobs: int | None = None
) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=logprobs)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def first_ids(outputs: list[Any]) -> list[Tokens]:
    return [output.outputs[0].token_ids[:FEWER_STEPS] for output in outputs]


@pytest.fixture(scope="module")
def stack() -> Iterator[LLM]:
    with start(enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(stack: LLM, prompts: list[Tokens]) -> list[Any]:
    """All 64 at once, with log-probabilities."""
    return generate(stack, prompts, STEPS, logprobs=5)


def test_tokens_and_logprobs_equal_those_of_transformers(
    oracle: Any, prompts: list[Tokens], together: list[Any]
) -> None:
    model = oracle[0]
    for place, (prompt, output) in enumerate(zip(prompts, together, strict=True)):
        completion = output.outputs[0]
        with torch.inference_mode():
            tokens = torch.tensor([prompt + completion.token_ids[:-1]])
            logits = model(tokens, logits_to_keep=STEPS).logits[0]
        assert logits.argmax(-1).tolist() == completion.token_ids, f"prompt {place}"
        expected = torch.log_softmax(logits.double(), -1)
        for step, given in enumerate(completion.logprobs):
            for token, entry in given.items():
                assert entry.logprob == pytest.approx(float(expected[step, token]), abs=1e-4), (
                    place,
                    step,
                    token,
                )
            assert set(torch.topk(expected[step], 5).indices.tolist()) <= set(given) | {
                completion.token_ids[step]
            }


def test_cached_prefixes_change_no_token(
    stack: LLM, prompts: list[Tokens], together: list[Any]
) -> None:
    again = generate(stack, prompts)
    assert first_ids(again) == first_ids(together)
    cached = [output.num_cached_tokens for output in again]
    assert (
        all(count >= (len(ids) - 1) // 16 * 16 for count, ids in zip(cached, prompts, strict=True))
        and max(cached) > 1900
    )


@pytest.mark.parametrize(("budget", "some"), [(16, SOME_SHORTER), (37, SOME)])
def test_prefill_chunks_change_no_token(
    budget: int, some: slice, prompts: list[Tokens], together: list[Any]
) -> None:
    with start(max_num_batched_tokens=budget, enable_prefix_caching=False) as llm:
        assert first_ids(generate(llm, prompts[some])) == first_ids(together[some])


def test_one_at_a_time_changes_no_token(prompts: list[Tokens], together: list[Any]) -> None:
    with start(max_num_seqs=1, enable_prefix_caching=False) as llm:
        assert first_ids(generate(llm, prompts[SOME_SHORTER])) == first_ids(together[SOME_SHORTER])


def test_preemption_changes_no_token(prompts: list[Tokens], together: list[Any]) -> None:
    blocks = 180
    with start(num_kv_blocks=blocks, max_model_len=2200) as llm:
        # All steps: blocks run out only while the outputs grow.
        assert first_ids(generate(llm, prompts, STEPS)) == first_ids(together)
        stats = llm.stats()
    assert stats["num_preemptions"] > 0
    assert stats["kv_blocks_free"] == stats["kv_blocks_total"] == blocks
