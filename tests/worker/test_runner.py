"""Steps and slots: order of application, repeats, epochs, containment, and seeded requests alone
and in company."""

import dataclasses

import numpy as np
import pytest
import torch
from pagewire.worker.step.slots import BadStep
from pagewire_protocol.messages import Step, pack, unpack
from pagewire_protocol.sampling import Sampling

GREEDY = Sampling(seed=0, max_tokens=100, temperature=0.0)


@pytest.fixture(scope="module")
def reference(tiny):
    """Greedy continuations by transformers, without a cache."""
    model = tiny("llama")

    def continue_(tokens: list[int], count: int) -> list[int]:
        tokens, out = list(tokens), []
        for _ in range(count):
            out.append(int(model.logits(tokens)[-1].argmax()))
            tokens.append(out[-1])
        return out

    return continue_


@pytest.fixture
def small(tiny, driver):
    return driver(tiny("llama").path, max_num_seqs=8)


def ints(*values: int) -> bytes:
    return pack("i", values)


@pytest.mark.parametrize("chunk", [1000, 16, 37])
def test_greedy_equals_transformers_whatever_the_chunks(chunk, tiny, driver, numbers, reference):
    prompts = [numbers(n, n) for n in (3, 50, 90, 8)]
    out = driver(tiny("llama").path).generate(prompts, [GREEDY] * 4, 20, chunk)
    assert out == [reference(prompt, 20) for prompt in prompts]


def test_facts(small):
    facts = small.runner.facts()
    assert (facts.num_blocks, facts.block_size, facts.max_num_seqs) == (160, 8, 8)
    assert (facts.vocab_size, facts.max_model_len, facts.eos_token_ids, facts.device) == (
        257,
        512,
        (2,),
        "cpu",
    )


def test_repeat_grow_and_retire(small, numbers, reference):
    prompts = [numbers(8, 1), numbers(5, 2)]
    result = small.step(
        admit=tuple(small.admission(i, p, GREEDY) for i, p in enumerate(prompts)),
        run_slots=ints(0, 1),
        run_counts=ints(8, 5),
    )
    assert (result.epoch, result.incarnation, result.n, list(unpack("i", result.slots))) == (
        1,
        5,
        0,
        [0, 1],
    )
    small.step(repeat=True, grow_slots=ints(0), grow_blocks=ints(small.free.pop()))
    small.step(repeat=True)
    small.step(retire=ints(1), run_slots=ints(0), run_counts=ints(1))
    result = small.step(repeat=True)
    assert list(unpack("i", result.slots)) == [0]
    assert small.out[0] == reference(prompts[0], 5)
    assert small.out[1] == reference(prompts[1], 3)


def test_a_slot_and_its_blocks_pass_to_another_in_one_step(small, numbers, reference):
    first, second = numbers(6, 3), numbers(7, 4)
    small.step(admit=(small.admission(2, first, GREEDY),), run_slots=ints(2), run_counts=ints(6))
    small.free += small.held[2]
    small.step(
        retire=ints(2),
        admit=(small.admission(2, second, GREEDY),),
        run_slots=ints(2),
        run_counts=ints(7),
    )
    assert small.out[2] == reference(second, 1)


def test_chunks_sample_only_at_the_last_known_token(small, numbers, reference):
    prompt = numbers(20, 5)
    assert (
        small.step(
            admit=(small.admission(0, prompt, GREEDY, room=4),),
            run_slots=ints(0),
            run_counts=ints(12),
        ).slots
        == b""
    )
    small.step(run_slots=ints(0), run_counts=ints(8))
    assert small.out[0] == reference(prompt, 1)


@pytest.mark.parametrize("chunks", [(20,), (12, 8)])
def test_a_request_for_no_tokens_samples_none(chunks, small, numbers, reference):
    """Beside one that decodes."""
    prompt, other = numbers(20, 5), numbers(7, 6)
    nothing = Sampling(seed=0, max_tokens=0, prompt_logprobs=0)
    small.step(
        admit=(small.admission(1, other, GREEDY, room=8),), run_slots=ints(1), run_counts=ints(7)
    )
    admit = (small.admission(0, prompt, nothing),)
    positions = []
    for count in chunks:
        result = small.step(admit=admit, run_slots=ints(1, 0), run_counts=ints(1, count))
        assert unpack("i", result.slots).tolist() == [1] and len(result.tokens) == 4
        for run in result.prompt_logprobs:
            assert run.slot == 0
            positions += range(run.first, run.first + len(run.ranks) // 4)
        admit = ()
    assert positions == list(range(1, 20))
    assert small.out[0] == [] and small.out[1] == reference(other, 1 + len(chunks))


def test_prefix_blocks_and_resumed_output(small, numbers, reference):
    """Another request's sealed blocks stand for computed tokens; output that came before counts as
    known."""
    prompt = numbers(16, 6)
    small.step(
        admit=(small.admission(0, prompt, GREEDY, room=8),), run_slots=ints(0), run_counts=ints(16)
    )
    expected = reference(prompt, 6)
    admission = small.admission(1, prompt, GREEDY, output=tuple(expected[:3]), room=8)
    shared = pack("i", [*small.held[0][:2], *small.held[1][2:]])
    admission = type(admission)(1, 1, admission.prompt, admission.output, shared, 16, GREEDY)
    small.step(admit=(admission,), run_slots=ints(1), run_counts=ints(3))
    small.step(repeat=True)
    assert small.out[1] == expected[:5]


def test_clear_forgets_every_slot(small, numbers, reference):
    prompt = numbers(6, 7)
    small.step(admit=(small.admission(0, prompt, GREEDY),), run_slots=ints(0), run_counts=ints(6))
    small.runner.clear()
    with pytest.raises(BadStep, match=r"slots \[0\] are named, but hold no request"):
        small.step(run_slots=ints(0), run_counts=ints(1))
    assert small.step(epoch=2, repeat=True).slots == b""
    small.step(
        epoch=2, admit=(small.admission(0, prompt, GREEDY),), run_slots=ints(0), run_counts=ints(6)
    )
    assert small.out[0] == reference(prompt, 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"run_slots": ints(3), "run_counts": ints(1)}, r"slots \[3\]"),
        ({"run_slots": ints(99), "run_counts": ints(1)}, r"slots \[99\]"),
        ({"retire": ints(3)}, r"slots \[3\]"),
        (
            {"run_slots": ints(0), "run_counts": ints(2)},
            "to compute 2 tokens from 6 on, but has 7 tokens",
        ),
        ({"run_slots": ints(0), "run_counts": ints(0)}, "to compute 0 tokens"),
        ({"run_slots": ints(0), "run_counts": b""}, "1 slots to run but 0 counts"),
        ({"grow_slots": ints(0), "grow_blocks": b""}, "1 slots to grow but 0 blocks"),
    ],
)
def test_impossible_steps_are_refused_with_numbers(parts, message, small, numbers):
    small.step(
        admit=(small.admission(0, numbers(6, 8), GREEDY),), run_slots=ints(0), run_counts=ints(6)
    )
    with pytest.raises(BadStep, match=message):
        small.step(**parts)


def test_impossible_admissions_are_refused(small, numbers):
    for admission, message in (
        (small.admission(8, [5], GREEDY), "slot 8 admitted, but there are 8"),
        (small.admission(0, [], GREEDY), "admitted with 0 tokens"),
        (small.admission(0, numbers(513), GREEDY), "admitted with 513 tokens"),
    ):
        with pytest.raises(BadStep, match=message):
            small.runner.execute(Step(1, 0, admit=(admission,)))


def test_another_requests_nan_stays_its_own(small, numbers, reference):
    """The blocks of a request with broken numbers are given to a sound one, which fills them only
    in part."""
    prompt = numbers(11, 9)
    with torch.inference_mode():
        small.runner._loaded.cache.fill_(float("nan"))
    small.step(
        admit=(small.admission(0, prompt, GREEDY, room=9),), run_slots=ints(0), run_counts=ints(11)
    )
    for _ in range(8):
        result = small.step(repeat=True)
        assert result.flags == b"\0"
    assert small.out[0] == reference(prompt, 9)


def test_broken_rows_are_flagged_and_the_rest_goes_on(small, numbers, reference):
    prompts = [numbers(8, 1), numbers(8, 2)]
    small.step(
        admit=tuple(small.admission(i, p, GREEDY, room=8) for i, p in enumerate(prompts)),
        run_slots=ints(0, 1),
        run_counts=ints(8, 8),
    )
    with torch.inference_mode():
        small.runner._loaded.cache[:, :, small.held[0][0]] = float("nan")
    assert list(small.step(repeat=True).flags) == [1, 0]
    assert small.out[1] == reference(prompts[1], 2)


def test_seeded_alone_and_among_31_others(tiny, driver, numbers):
    """Float32: the logits of a row move by less than the draw can see, so the tokens are the
    same."""
    ours = driver(tiny("qwen3").path, num_kv_blocks=400)
    samplings = [
        Sampling(
            seed=1000 + i,
            max_tokens=50,
            temperature=0.5 + i / 20,
            top_k=(0, 7)[i % 2],
            top_p=(1.0, 0.9)[i % 3 == 0],
        )
        for i in range(32)
    ]
    prompts = [numbers(4 + i, i) for i in range(32)]
    together = ours.generate(prompts, samplings, 24)
    for i in (0, 1, 9, 31):
        assert ours.generate([prompts[i]], [samplings[i]], 24) == [together[i]]
    assert len({tuple(out) for out in together}) == 32


def test_a_resumed_request_continues_its_draw(tiny, driver, numbers):
    ours, prompt = driver(tiny("llama").path), numbers(10, 3)
    sampling = Sampling(
        seed=77, max_tokens=50, temperature=1.2, repetition_penalty=1.2, frequency_penalty=0.3
    )
    (whole,) = ours.generate([prompt], [sampling], 20)
    ours.step(
        admit=(ours.admission(4, prompt, sampling, tuple(whole[:12]), room=20),),
        run_slots=ints(4),
        run_counts=ints(22),
    )
    for _ in range(7):
        ours.step(repeat=True)
    assert ours.out[4] == whole


def test_min_tokens_and_logprobs_reach_the_sampler(tiny, driver, numbers, reference):
    prompt = numbers(9, 2)
    first = reference(prompt, 1)[0]
    plain = Sampling(
        seed=0, max_tokens=9, temperature=0.0, logprobs=2, stop_token_ids=(first, 100_000)
    )
    ours = driver(tiny("llama").path)
    result_rows = []
    for slot, sampling in enumerate((plain, Sampling(**{**_fields(plain), "min_tokens": 1}))):
        admit = (ours.admission(slot, prompt, sampling, room=3),)
        result = ours.step(admit=admit, run_slots=ints(slot), run_counts=ints(9))
        assert result.logprobs is not None
        result_rows.append(
            (
                ours.out[slot][0],
                list(unpack("i", result.logprobs.ids)),
                list(unpack("i", result.logprobs.ranks)),
            )
        )
        assert len(unpack("f", result.logprobs.values)) == 3
    (token, ids, ranks), (other, other_ids, other_ranks) = result_rows
    assert (token, ids[0], ids[1], ranks) == (first, first, first, [1])
    assert other != first and other_ids[0] == other and other_ranks[0] > 1


def _fields(sampling: Sampling) -> dict:
    return {name: getattr(sampling, name) for name in sampling.__struct_fields__}


def test_columns_are_int32(small, numbers):
    result = small.step(
        admit=(small.admission(0, numbers(6), GREEDY),), run_slots=ints(0), run_counts=ints(6)
    )
    assert len(result.slots) == len(result.tokens) == 4 and len(result.flags) == 1
    assert np.frombuffer(result.tokens, np.int32)[0] == small.out[0][0]
    assert dataclasses.is_dataclass(small.runner._loaded)
