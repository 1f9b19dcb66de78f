"""Families whose own code lives in their repositories, without that code: against oracles written
from what was published."""

import json

import pytest
import torch
from pagewire.config import ModelConfig
from pagewire.worker.load import loader
from pagewire.worker.models import describe
from pagewire.worker.models.architecture import Unsupported
from pagewire_protocol.sampling import Sampling
from worker.remote_oracles import CASES, make

LENGTH = 60


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """remote(name) -> Remote, made once."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("remote") / name)
        return made[name]

    return get


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ours.shape == wanted.shape
    worst = (ours - wanted).abs().max().item()
    assert worst < 2e-5 * max(1.0, wanted.abs().max().item()), f"logits differ by {worst:.2e}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [LENGTH, 17, 1])
def test_one_sequence(name, chunk, remote, harness, numbers):
    reference, tokens = remote(name), numbers(LENGTH)
    close(harness(reference.path).logits(tokens, chunk), reference.logits(tokens))


@pytest.mark.parametrize("name", CASES)
def test_mixed_batch(name, remote, harness, numbers):
    """A decode, a chunk and a fresh prompt in one step."""
    reference = remote(name)
    ours = harness(reference.path)
    spans = [(40, 41), (0, 33), (16, 48)]
    work, ours_logits = ours.mixed_step(spans, numbers)
    expected = torch.cat([reference.logits(tokens)[first:end] for tokens, first, end, _ in work])
    close(ours_logits, expected)


@pytest.mark.parametrize("name", CASES)
def test_greedy_through_the_runner(name, remote, driver, numbers):
    reference, prompts = remote(name), [numbers(n, n) for n in (5, 30)]
    wanted = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(reference.logits(tokens)[-1].argmax()))
        wanted.append(tokens[len(prompt) :])
    samplings = [Sampling(seed=1, max_tokens=6, temperature=0.0)] * 2
    assert driver(reference.path).generate(prompts, samplings, 6, chunk=8) == wanted


def test_a_cached_prefix_gives_the_same_logits(remote, harness, numbers):
    """The second request begins in blocks that the first one filled."""
    reference, tokens = remote("chatglm2"), numbers(48)
    ours = harness(reference.path)
    table = ours.table(40)
    ours.step([(tokens, 0, 40, table)])
    other = [*tokens[:32], *numbers(20, 9)]
    found = ours.step([(other, 32, 52, table[:4] + ours.table(20))])
    close(found, reference.logits(other)[32:])


def test_contexts_end_where_the_original_would_change_its_rotation(remote):
    """Qwen-1 with dynamic NTK: its configuration allows more positions than it was trained on."""
    assert describe(remote("qwen1").config).max_position == 256


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("qwen1", {"scale_attn_weights": False}, "without scaling"),
        (
            "chatglm2",
            {"multi_query_attention": False},
            "multi_query_attention False of chatglm is not supported",
        ),
        ("chatglm2", {"quantization_bit": 4}, "weights of 4 bits"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm False"),
        ("chatglm2", {"padded_vocab_size": None}, "the first ChatGLM is not supported"),
        ("baichuan-7b", {"rms_norm_eps": None}, "has no 'rms_norm_eps'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(name, changes, told, remote):
    config = {
        key: value for key, value in (remote(name).config | changes).items() if value is not None
    }
    with pytest.raises(Unsupported, match=told):
        describe(config)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"model_type": "qwen", "eos_token_id": 151643}, {"chat_format": "raw"}, (151643,)),
        (
            {"model_type": "qwen"},
            {"chat_format": "chatml", "eos_token_id": 151643},
            (151643, 151644, 151645),
        ),
        (
            {"model_type": "chatglm", "padded_vocab_size": 65024, "eos_token_id": 2},
            {},
            (2, 64795, 64797),
        ),
        (
            {
                "model_type": "chatglm",
                "padded_vocab_size": 151552,
                "eos_token_id": [151329, 151336, 151338],
            },
            {},
            (151329, 151336, 151338),
        ),
    ],
)
def test_ends_of_a_message(config, generation, ends, tmp_path):
    """Some are in no file: the repository's code knows them."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert loader.open_model(tmp_path, ModelConfig(load_format="dummy"))[2] == ends


@pytest.mark.parametrize("name", ["qwen1", "baichuan2-7b", "chatglm2"])
def test_random_weights(name, remote, harness, numbers):
    logits = harness(remote(name).path, ModelConfig(load_format="dummy")).logits(numbers(10), 10)
    assert logits.isfinite().all() and logits.std() > 0
