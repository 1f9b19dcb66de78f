"""What a program may pass to LLM, checked before any service is asked."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from pagewire import LLM, BeamSearchParams, SamplingParams
from pagewire.cli import parse_structs
from pagewire.config import FrontendConfig, to_flags
from pagewire.offline.prompts import as_chats, as_params, as_prompts
from pagewire.offline.sampling_params import GuidedDecodingParams, StructuredOutputsParams
from pagewire.offline.settings import configure
from pagewire.offline.translate import job_templates
from pagewire.requests.model_facts import ModelFacts
from pagewire.requests.request import Job
from pagewire_protocol.columns import pack
from pagewire_protocol.grammar import Grammar, GrammarKind
from pagewire_protocol.structs import Prompt


def jobs_of(params: SamplingParams, seed: int = 0) -> list[Job]:
    """The jobs of one prompt; `seed` is drawn where the parameters have none."""
    (template,) = job_templates([params], ModelFacts())
    return template.jobs(Prompt(text="p"), lambda bits: seed, add_special_tokens=True)


def test_the_defaults_are_the_ones_people_know() -> None:
    params = SamplingParams()
    assert (
        params.n,
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.max_tokens,
    ) == (1, 1.0, 1.0, -1, 0.0, 16)
    (job,) = jobs_of(params, seed=5)
    wire = job.sampling
    assert (wire.seed, wire.top_k, wire.max_tokens, wire.logprobs) == (5, 0, 16, -1)
    assert {"temperature", "top_k", "stop_token_ids", "ignore_eos"} <= set(
        SamplingParams.__annotations__
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -1}, "`temperature` must be between 0 and 100, got -1."),
        ({"top_p": 0}, "`top_p` must be above 0 and at most 1, got 0."),
        ({"top_k": -2}, "`top_k` must be between -1 and"),
        ({"min_p": 1.5}, "`min_p` must be between 0 and 1, got 1.5."),
        ({"presence_penalty": 3}, "`presence_penalty` must be between -2 and 2, got 3."),
        ({"max_tokens": 0}, "`max_tokens` must be between 1 and"),
        ({"min_tokens": 17}, "`min_tokens` is 17 but at most 16 tokens are asked for."),
        ({"logprobs": 21}, "`logprobs` must be between 0 and 20, got 21."),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2"),
        ({"stop": ""}, "A string in `stop` must have 1 to"),
        ({"stop": "x", "detokenize": False}, "need detokenize"),
        ({"temperature": float("nan")}, "`temperature` must be between 0 and 100, got nan."),
        ({"prompt_logprobs": 21}, "`prompt_logprobs` must be between 0 and 20, got 21."),
        (
            {"truncate_prompt_tokens": 0},
            "`truncate_prompt_tokens` must be -1 .* or at least 1, got 0.",
        ),
        ({"logit_bias": {5: 101}}, "`logit_bias` must be between -100 and 100, got 101."),
        ({"logit_bias": {"x": 1}}, "`logit_bias` has the key 'x'; its keys are token ids."),
        ({"allowed_token_ids": []}, "`allowed_token_ids` is empty"),
        ({"bad_words": [""]}, "A string in `bad_words` must have 1 to 256 characters, got 0."),
        ({"logits_processors": [print]}, "logits_processors=.* is not supported"),
        ({"structured_outputs": {}}, "`structured_outputs` must say exactly one of json, regex"),
        (
            {
                "structured_outputs": StructuredOutputsParams(regex="a"),
                "guided_decoding": GuidedDecodingParams(regex="a"),
            },
            "exclude each other",
        ),
    ],
)
def test_a_bad_value_is_refused_with_the_numbers(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**given)


@pytest.mark.parametrize(
    ("given", "kind", "source"),
    [
        ({"json": {"type": "object"}}, GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
        ({"json": '{"type": "object"}'}, GrammarKind.JSON_SCHEMA, '{"type": "object"}'),
        ({"json_object": True}, GrammarKind.JSON_OBJECT, ""),
        ({"regex": "[ab]+"}, GrammarKind.REGEX, "[ab]+"),
        ({"choice": ["x", "y"]}, GrammarKind.CHOICE, '["x","y"]'),
        ({"grammar": 'root ::= "x"'}, GrammarKind.GBNF, 'root ::= "x"'),
        ({"grammar": 'start: "x"'}, GrammarKind.LARK, 'start: "x"'),
    ],
)
def test_a_form_of_the_answer_becomes_a_grammar_by_both_names(given, kind, source) -> None:
    for name, outputs in (
        ("structured_outputs", StructuredOutputsParams(**given)),
        ("structured_outputs", given),
        ("guided_decoding", GuidedDecodingParams(**given)),
        ("guided_decoding", given),
    ):
        (job,) = jobs_of(SamplingParams(**{name: outputs}))
        assert job.grammar == Grammar(kind, source, param=name)


def test_a_form_has_options_and_a_former_constructor() -> None:
    outputs = StructuredOutputsParams(
        json={}, disable_any_whitespace=True, disable_additional_properties=True
    )
    grammar = SamplingParams(structured_outputs=outputs).grammar()
    assert grammar is not None and not grammar.whitespace and not grammar.additional_properties
    assert GuidedDecodingParams.from_optional() is None
    guided = GuidedDecodingParams.from_optional(json={"type": "null"}, whitespace_pattern=" ")
    assert guided is not None and guided.whitespace_pattern == " "
    with pytest.raises(ValueError, match="together with beam search"):
        jobs_of(
            SamplingParams(
                use_beam_search=True, best_of=2, temperature=0, structured_outputs={"regex": "a"}
            )
        )


LEGACY = {
    # vLLM 0.4's rules and words
    "best_of must be greater than or equal to n, got n=3 and best_of=2.": {"n": 3, "best_of": 2},
    "best_of must be 1 when using greedy sampling.Got 2.": {"best_of": 2, "temperature": 0},
    "best_of must be greater than 1 when using beam search. Got 1.": {"use_beam_search": True, "temperature": 0},
    "temperature must be 0 when using beam search.": {"use_beam_search": True, "best_of": 2},
    "top_p must be 1 when using beam search.": {"use_beam_search": True, "best_of": 2, "temperature": 0, "top_p": 0.5},
    "top_k must be -1 when using beam search.": {"use_beam_search": True, "best_of": 2, "temperature": 0, "top_k": 5},
    "early_stopping must be True, False, or 'never', got soon.": {
        "use_beam_search": True, "best_of": 2, "temperature": 0, "early_stopping": "soon",
    },
    "early_stopping is not effective and must be False when not using beam search.": {"early_stopping": True},
    "length_penalty is not effective and must be the default value of 1.0 when not using beam search.": {"length_penalty": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("words", LEGACY)
def test_the_rules_of_older_parameters_in_the_words_people_search_for(words: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**LEGACY[words])
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "given",
    [
        {"stop": "x"},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"bad_words": ["x"]},
        {"logit_bias": {1: 1}},
    ],
)
def test_what_beam_search_could_only_ignore_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=f"`{next(iter(given))}` is not supported together with beam search."
    ):
        SamplingParams(use_beam_search=True, best_of=2, temperature=0, **given)


def test_beam_search_params_have_bounds() -> None:
    assert BeamSearchParams(4, 32).length_penalty == 1.0
    for given, words in [
        ((0, 5), "`beam_width` must be between 1 and 16, got 0."),
        ((99, 5), "got 99"),
        ((2, 0), "`max_tokens` must be between 1 and"),
    ]:
        with pytest.raises(ValueError, match=words):
            BeamSearchParams(*given)
    with pytest.raises(ValueError, match=r"temperature=0.7: .*only 0 is supported"):
        BeamSearchParams(2, 5, temperature=0.7)


TABLE = (
    "n best_of presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p use_beam_search length_penalty"
    " early_stopping stop stop_token_ids ignore_eos max_tokens logprobs prompt_logprobs skip_special_tokens"
)


def test_names_and_order_are_those_of_the_tutorials_table() -> None:
    assert " ".join(SamplingParams.__annotations__).startswith(TABLE)
    further = "seed min_tokens include_stop_str_in_output spaces_between_special_tokens logits_processors truncate_prompt_tokens detokenize"
    assert set(further.split()) <= set(SamplingParams.__annotations__)
    table = (
        1,
        None,
        0.0,
        0.0,
        1.0,
        1.0,
        1.0,
        -1,
        0.0,
        False,
        1.0,
        False,
        None,
        None,
        False,
        16,
        None,
        None,
        True,
    )
    assert SamplingParams(*table) == SamplingParams()  # type: ignore[arg-type]


def test_every_parameter_arrives() -> None:
    given = SamplingParams(
        logit_bias={"7": 2, 9: -1.5}, allowed_token_ids=[1, 2], bad_words=["no"], prompt_logprobs=3, truncate_prompt_tokens=-1, seed=-1,
        stop="x", include_stop_str_in_output=True, spaces_between_special_tokens=False, min_tokens=2, best_of=3, n=2,
    )  # fmt: skip
    jobs = jobs_of(given, seed=11)
    wire, text = jobs[0].sampling, jobs[0].text
    assert (wire.bias_ids, wire.bias_values, wire.allowed_ids) == (
        pack("i", [7, 9]),
        pack("f", [2.0, -1.5]),
        pack("i", [1, 2]),
    )
    assert (wire.prompt_logprobs, wire.seed, wire.min_tokens, wire.logprobs) == (3, 11, 2, 0)
    assert (text.bad_words, text.truncate_prompt, text.stop, text.include_stop) == (
        ("no",),
        -1,
        ("x",),
        True,
    )
    assert not text.spaces_between_special_tokens
    assert [job.sampling.prompt_logprobs for job in jobs] == [3, -1, -1]


def test_an_unknown_parameter_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="no_such"):
        SamplingParams(no_such=1)  # type: ignore[call-arg]


def test_prompts_in_all_their_forms() -> None:
    assert as_prompts("a")[0].prompt.text == "a"
    assert as_prompts([1, 2])[0].prompt.ids == pack("i", [1, 2])
    mixed = as_prompts(["a", {"prompt": "b"}, {"prompt_token_ids": [3]}, [4, 5]])
    assert [(e.prompt.text, e.prompt.ids) for e in mixed] == [
        ("a", None),
        ("b", None),
        (None, pack("i", [3])),
        (None, pack("i", [4, 5])),
    ]
    for bad, words in [
        ({"prompt": "a", "multi_modal_data": 1}, "multi_modal_data"),
        ([[]], "prompt 0"),
        ([[2**40]], "out of range"),
    ]:
        with pytest.raises(ValueError, match=words):
            as_prompts(bad)
    with pytest.raises(TypeError, match="int"):
        as_prompts(3)


def test_conversations_alone_and_many() -> None:
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]
    assert len(as_chats(talk, True, False)) == 1 and len(as_chats([talk, talk], True, False)) == 2
    chat = as_chats(talk, True, False)[0].prompt.chat
    assert chat is not None and chat.messages[0].content == "a\nb"
    for bad in ("hi", [{"role": "user"}], [{"content": "x"}]):
        with pytest.raises(ValueError, match="role"):
            as_chats(bad, True, False)
    with pytest.raises(ValueError, match="tool_calls"):
        as_chats([{"role": "assistant", "content": "", "tool_calls": [1]}], True, False)


def test_one_set_of_parameters_for_all_or_one_for_each() -> None:
    assert len(as_params(SamplingParams(), 3)) == 3
    with pytest.raises(ValueError, match="3 prompts but 2 sampling_params"):
        as_params([SamplingParams(), SamplingParams()], 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "gpu"}, "device='gpu': one of auto, cpu, cuda, fake is needed"),
        ({"max_num_seqs": 0}, "max_num_seqs=0: at least 1 is needed"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5: at most 1.0 is allowed"),
        ({"seed": -1}, "seed=-1: at least 0 is needed"),
        ({"max_model_len": "x"}, "max_model_len='x': Expected `int`, got `str`"),
        ({"chat_template": 5}, "chat_template=5: Expected `str`"),
    ],
)
def test_a_bad_setting_is_refused_in_the_words_of_a_program(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        configure(given)
    assert str(caught.value).startswith(words)


def test_the_settings_of_the_tutorials_table() -> None:
    table: dict[str, Any] = {
        "tokenizer": "tokenizer_name", "tokenizer_mode": "auto", "trust_remote_code": False, "tensor_parallel_size": 1, "dtype": "auto",
        "quantization": None, "gpu_memory_utilization": 0.9, "max_model_len": None, "seed": 0, "download_dir": None, "load_format": "auto",
        "revision": None,
    }  # fmt: skip
    config = configure({"model": "model_name", **table})
    assert (config.model.model, config.model.tokenizer, config.worker.gpu_memory_utilization) == (
        "model_name",
        "tokenizer_name",
        0.9,
    )
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(LLM).parameters.items()
    }
    assert {name: defaults[name] for name in table if name != "tokenizer"} == {
        name: table[name] for name in table if name != "tokenizer"
    }
    assert [
        configure({"tokenizer_mode": mode}).model.tokenizer_mode for mode in ("slow", "hf")
    ] == ["slow", "hf"]
    for given in (
        {"tensor_parallel_size": 0},
        {"pipeline_parallel_size": 0},
        {"quantization": "quip"},
        {"enable_lora": True},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(given))}=.*: ") as caught:
            configure(given)
        assert len(str(caught.value).splitlines()) == 1


def test_settings_as_objects() -> None:
    class Tokenizer:
        name_or_path = "of/tokenizer"

    torch = pytest.importorskip("torch")
    config = configure(
        {
            "model": Path("/some/model"),
            "tokenizer": Tokenizer(),
            "dtype": torch.float16,
            "max_model_len": -1,
            "num_gpu_blocks_override": 9,
        }
    )
    assert (config.model.model, config.model.tokenizer, config.worker.dtype) == (
        "/some/model",
        "of/tokenizer",
        "float16",
    )
    assert (config.model.max_model_len, config.worker.num_kv_blocks) == (0, 9)


def test_settings_survive_the_way_to_a_child_process() -> None:
    given = [
        "--api-key=-begins-with-a-dash",
        "--api-key",
        "one",
        "--api-key",
        "two",
        "--served-model-name",
        "a",
        "b",
    ]
    (config,) = parse_structs("frontend", "", (FrontendConfig,), given)
    assert config.api_key == ("-begins-with-a-dash", "one", "two") and config.served_model_name == (
        "a",
        "b",
    )
    assert parse_structs("frontend", "", (FrontendConfig,), to_flags(config)) == [config]
