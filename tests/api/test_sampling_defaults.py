"""Requests get the model's recommended sampling for what they do not say themselves."""

import pytest
from api.conftest import serve
from pagewire_protocol.messages import Generate
from pagewire_protocol.sampling import SamplingDefaults

DEFAULTS = SamplingDefaults(temperature=0.25, top_k=20, repetition_penalty=1.5, max_tokens=7)


@pytest.fixture(scope="module")
def recommended():
    with serve(sampling_defaults=DEFAULTS) as server:
        yield server


@pytest.fixture
def sent(recommended):
    recommended.stack.received.clear()

    def last() -> Generate:
        return [m for m in recommended.stack.received if isinstance(m, Generate)][-1]

    return last


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_request_does_not_say(recommended, sent, stream: bool) -> None:
    assert recommended.chat(stream=stream).status_code == 200
    sampling = sent().sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.25, 20, 1.0)
    assert (sampling.repetition_penalty, sampling.max_tokens) == (1.5, 7)
    assert sent().max_tokens_is_rest
    assert recommended.complete(stream=stream).status_code == 200
    assert (sent().sampling.temperature, sent().sampling.max_tokens) == (0.25, 16)


def test_what_a_request_says_goes_first(recommended, sent) -> None:
    said = {"temperature": 1, "top_k": -1, "repetition_penalty": 1, "max_tokens": 9}
    assert recommended.chat(**said).status_code == 200
    sampling = sent().sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (1, 0, 1)
    assert sampling.max_tokens == 9 and not sent().max_tokens_is_rest


def test_the_model_s_card_tells_them(recommended) -> None:
    card = recommended.http.get("/v1/models").json()["data"][0]
    assert card["sampling_defaults"] == {
        "temperature": 0.25,
        "top_k": 20,
        "repetition_penalty": 1.5,
        "max_tokens": 7,
    }


def test_beam_search_goes_by_the_model_alone(recommended, sent) -> None:
    body = {"use_beam_search": True, "best_of": 2, "n": 2, "max_tokens": 2}
    assert recommended.complete(**body).status_code == 200
    assert sent().sampling.repetition_penalty == 1.0 and sent().sampling.top_k == 0
