"""Biases, allowed ids, bad words, minima and penalties through the Runner, against transformers'
processors; scores of prompts."""

import random
from itertools import pairwise

import pytest
from pagewire_protocol.messages import pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.sampling_reference import bias, continued, scored, words

EOS = (2,)
GREEDY = {"seed": 0, "max_tokens": 100, "temperature": 0.0}
COUNT = 20


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama")


def sampling(**given) -> Sampling:
    return Sampling(**{**GREEDY, **given})


def tempting(out: list[int], seed: int) -> dict[str, dict]:
    """Settings that change the greedy continuation `out`, each where it hurts."""
    make = random.Random(seed)
    pairs = [[a, b] for a, b in pairwise(out)]
    allowed = make.sample(range(257), 40)
    return {
        "allowed": {"allowed_ids": pack("i", allowed)},
        "one allowed": {"allowed_ids": pack("i", [allowed[0]])},
        "bias": bias(
            {
                out[0]: -100.0,
                out[3]: -2.5,
                make.randrange(257): 3.0,
                make.randrange(257): 100.0 if seed % 2 else 1.5,
            }
        ),
        "bad word": {"bad_words": words([out[0]], [out[5]])},
        "bad pairs": {"bad_words": words(*pairs[1:], out[:3])},
        "bad sequence": {"bad_words": words(out[2:7], out[:19], [out[1], 256, out[3]])},
        "minimum": {"min_tokens": 6, "stop_token_ids": (out[0], out[1], 100_000)},
        "repetition": {"repetition_penalty": 1.6},
        "counts": {"presence_penalty": 0.7, "frequency_penalty": 1.1},
    }


def mixture(out: list[int], seed: int) -> dict:
    found = tempting(out, seed)
    return {
        **found["bad pairs"],
        **found["minimum"],
        **found["bias"],
        **found["counts"],
        "repetition_penalty": 1.3,
        "allowed_ids": pack("i", sorted({*random.Random(seed).sample(range(257), 120), *out[:4]})),
    }


def test_each_setting_alone_and_all_at_once_in_one_batch(model, driver, numbers):
    ours = driver(model.path, num_kv_blocks=400)
    prompts = {name: numbers(9 + i, i) for i, name in enumerate(tempting([*range(20)], 0))}
    plain = {
        name: continued(model.logits, prompt, sampling(), EOS, COUNT)
        for name, prompt in prompts.items()
    }
    given = {name: sampling(**tempting(plain[name], i)[name]) for i, name in enumerate(prompts)}
    for i in range(3):
        prompts[f"mixture {i}"] = numbers(12, 50 + i)
        out = continued(model.logits, prompts[f"mixture {i}"], sampling(), EOS, COUNT)
        given[f"mixture {i}"], plain[f"mixture {i}"] = sampling(**mixture(out, i)), out
    prompts["plain"], given["plain"] = numbers(7, 99), sampling()
    wanted = {
        name: continued(model.logits, prompts[name], given[name], EOS, COUNT) for name in prompts
    }
    got = ours.generate(list(prompts.values()), list(given.values()), COUNT, chunk=8)
    assert dict(zip(prompts, got, strict=True)) == wanted
    unmoved = [name for name in plain if wanted[name] == plain[name]]
    assert unmoved == [], "these settings must change something, or nothing is tested"


def test_drawn_rows_keep_to_the_same_limits(model, driver, numbers):
    prompt = numbers(8, 1)
    out = continued(model.logits, prompt, sampling(), EOS, COUNT)
    narrow = sampling(**mixture(out, 4))
    first = {
        **{name: getattr(narrow, name) for name in narrow.__struct_fields__},
        "temperature": 1.0,
        "top_k": 1,
    }
    (drawn,) = driver(model.path).generate([prompt], [Sampling(**first)], COUNT)
    assert drawn == continued(model.logits, prompt, narrow, EOS, COUNT)
    hot = sampling(
        temperature=60.0, seed=3, allowed_ids=pack("i", [5, 6, 7]), bad_words=words([5, 6], [7])
    )
    (drawn,) = driver(model.path).generate([prompt], [hot], 60)
    assert set(drawn) == {5, 6} and (5, 6) not in set(pairwise(drawn))


def test_bad_words_look_at_the_output_alone_and_at_up_to_63_tokens_of_it(model, driver, numbers):
    prompt = numbers(10, 2)
    out = continued(model.logits, prompt, sampling(), EOS, 70)
    crossing = [prompt[-1], out[0]]
    (same,) = driver(model.path).generate([prompt], [sampling(bad_words=words(crossing))], 5)
    assert same == out[:5]
    long = sampling(bad_words=words(out[2:66]))
    (changed,) = driver(model.path).generate([prompt], [long], 70)
    assert (
        changed[:65] == out[:65]
        and changed[65] != out[65]
        and changed == continued(model.logits, prompt, long, EOS, 70)
    )


def test_a_resumed_request_remembers_what_it_said(model, driver, numbers):
    prompt = numbers(10, 3)
    out = continued(model.logits, prompt, sampling(), EOS, COUNT)
    given = sampling(**mixture(out, 7))
    wanted = continued(model.logits, prompt, given, EOS, COUNT)
    ours = driver(model.path)
    for slot, said in ((0, 1), (1, 5), (2, 12)):
        admit = (ours.admission(slot, prompt, given, tuple(wanted[:said]), room=COUNT),)
        ours.step(admit=admit, run_slots=pack("i", [slot]), run_counts=pack("i", [10 + said]))
        for _ in range(COUNT - said - 1):
            ours.step(repeat=True)
        assert ours.out[slot] == wanted


def test_a_slot_leaves_no_limits_to_its_next_tenant(model, driver, numbers):
    prompt, other = numbers(10, 4), numbers(8, 5)
    out = continued(model.logits, prompt, sampling(), EOS, COUNT)
    ours = driver(model.path)
    settings = [
        mixture(out, 1),
        {},
        {"min_tokens": 9},
        tempting(out, 2)["bias"],
        {},
        tempting(out, 3)["bad pairs"],
    ]
    for given in (sampling(**extra) for extra in settings):
        got = ours.generate([prompt, other], [given, sampling()], COUNT)
        assert got == [
            continued(model.logits, p, g, EOS, COUNT)
            for p, g in ((prompt, given), (other, sampling()))
        ]


def test_where_nothing_would_be_left_the_bans_yield_to_the_allowed_ids(model, driver, numbers):
    starved = [
        sampling(allowed_ids=pack("i", EOS), min_tokens=4),
        sampling(allowed_ids=pack("i", [7, 8]), bad_words=words([7], [8])),
        sampling(allowed_ids=pack("i", [9]), bad_words=words([9, 9])),
        sampling(
            bad_words=words(*[[token] for token in range(256)]),
            stop_token_ids=(256,),
            min_tokens=4,
            temperature=1.0,
        ),
    ]
    got = driver(model.path).generate([numbers(9, i) for i in range(4)], starved, 4)
    assert (
        got[0] == [2] * 4
        and set(got[1]) <= {7, 8}
        and got[2] == [9] * 4
        and all(0 <= token < 257 for token in got[3])
    )


def listed(runs) -> list[tuple[int, int, list[tuple[int, float]]]]:
    found = []
    for run in runs:
        counts, ranks, ids, values = (
            unpack(c, x).tolist()
            for c, x in zip("iiif", (run.counts, run.ranks, run.ids, run.values), strict=True)
        )
        entries = iter(zip(ids, values, strict=True))
        found += [
            (run.first + i, ranks[i], [next(entries) for _ in range(count)])
            for i, count in enumerate(counts)
        ]
        assert next(entries, None) is None
    return found


@pytest.mark.parametrize("chunk", [1000, 11, 1])
def test_prompt_logprobs_whatever_the_chunks(model, driver, numbers, chunk, monkeypatch):
    from pagewire.worker.step import logprobs

    monkeypatch.setattr(logprobs, "PROMPT_LOGITS", 257 * 16)  # so that a run takes several pieces
    prompts, tops = [numbers(n, n) for n in (60, 1, 2, 33)], [3, 5, 0, -1]
    ours = driver(model.path)
    ours.generate(prompts, [sampling(prompt_logprobs=top, logprobs=1) for top in tops], 2, chunk)
    for slot, (prompt, top) in enumerate(zip(prompts, tops, strict=True)):
        runs = [
            run for result in ours.results for run in result.prompt_logprobs if run.slot == slot
        ]
        got, wanted = listed(runs), scored(model.logits(prompt), prompt, top) if top >= 0 else []
        assert [(p, rank, [i for i, _ in entries]) for p, rank, entries in got] == [
            (p, r, [i for i, _ in e]) for p, r, e in wanted
        ]
        values = [value for _, _, entries in got for _, value in entries]
        assert values == pytest.approx(
            [value for _, _, entries in wanted for _, value in entries], abs=2e-4
        )


def test_prompt_logprobs_end_with_the_prompt_when_output_is_recomputed(model, driver, numbers):
    prompt = numbers(12, 9)
    ours = driver(model.path)
    admit = (ours.admission(0, prompt, sampling(prompt_logprobs=0), (5, 6, 7), room=4),)
    ours.step(admit=admit, run_slots=pack("i", [0]), run_counts=pack("i", [15]))
    assert [position for position, _, _ in listed(ours.results[0].prompt_logprobs)] == list(
        range(1, 12)
    )


def test_more_logprobs_than_there_are_tokens(model):
    import torch
    from pagewire.worker.step.logprobs import token_logprobs

    found = token_logprobs(torch.randn(2, 7), torch.tensor([1, 2]), 20)
    counts, _, ids, _ = found.columns(
        torch.tensor([1, 2], dtype=torch.int32).numpy(), torch.tensor([20, 3]).numpy()
    )
    assert unpack("i", counts).tolist() == [8, 4] and len(ids) == 48
