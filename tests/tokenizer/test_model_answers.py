"""What is found out of a chat template: how its model calls tools and reasons, and in which form the
template wants tools, calls and results. Templates here are short ones in the manner of each family.
"""

import json
from typing import Any

import pytest
from pagewire.tokenizer.answers.model import ModelAnswers
from pagewire.tokenizer.template import ChatTemplate
from pagewire_protocol.messages import Chat, Generate, Prompt
from pagewire_protocol.sampling import AnswerOptions, Sampling, TextOptions, ToolChoice
from pagewire_protocol.structs import ChatMessage, PartKind
from tokenizer.answer_cases import TOOLS

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
LISTED = "{% if tools %}{{ tools | tojson }}{% endif %}"


def calls(opening: str, body: str, closing: str) -> str:
    """A template that shows calls so."""
    shown = f"{{% for c in m.tool_calls or [] %}}{opening}{body}{closing}{{% endfor %}}"
    return LISTED + TURNS + shown + END


AS_JSON = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
NAME, ARGUMENTS = "{{ c.function.name }}", "{{ c.function.arguments | tojson }}"
AS_TEXT = "{{ c.function.arguments + '' }}"
ITEMS = "{% for k, v in c.function.arguments.items() %}"
TEMPLATES: dict[str, str] = {
    "hermes": calls("<tool_call>\n", AS_JSON, "\n</tool_call>"),
    "qwen3_coder": calls(
        "<tool_call>\n<function=",
        f"{NAME}>{ITEMS}<parameter={{{{ k }}}}>{{{{ v }}}}</parameter>{{% endfor %}}",
        "</function></tool_call>",
    ),
    "glm45": calls(
        "<tool_call>",
        f"{NAME}{ITEMS}<arg_key>{{{{ k }}}}</arg_key><arg_value>{{{{ v }}}}</arg_value>{{% endfor %}}",
        "</tool_call>",
    ),
    "mistral": calls("[TOOL_CALLS][", AS_JSON, "]"),
    "mistral_v11": calls("[TOOL_CALLS]", f"{NAME}[ARGS]{ARGUMENTS}", ""),
    "deepseek_v3": calls(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        f"{NAME}\n```json\n{AS_TEXT}\n```",
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": calls(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
        f"{NAME}<｜tool▁sep｜>{AS_TEXT}",
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi_k2": calls(
        "<|tool_calls_section_begin|><|tool_call_begin|>",
        f"{{{{ c.id }}}}<|tool_call_argument_begin|>{ARGUMENTS}<!--{NAME}-->",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "minimax_m2": calls(
        '<minimax:tool_call><invoke name="',
        f'{NAME}">{ITEMS}<parameter name="{{{{ k }}}}">{{{{ v }}}}</parameter>{{% endfor %}}',
        "</invoke></minimax:tool_call>",
    ),
    "gpt_oss": calls(
        "<|start|>assistant<|channel|>commentary to=functions.",
        f"{NAME} <|constrain|>json<|message|>{ARGUMENTS}",
        "<|call|>",
    ),
    "granite": calls("<|start_of_role|>assistant<|tool_call|>[", AS_JSON, "]"),
    "functionary_v31": calls("<function=", f"{NAME}>{ARGUMENTS}", "</function>"),
    "llama3_json": calls(
        "<|start_header_id|>", '{"name": "{{ c.function.name }}", "parameters": ' + ARGUMENTS, "}"
    ),
    "generic": TURNS + END,
}
WEATHER_CALL = {
    "id": "call_0123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}


def chat(*messages: tuple[str, str, Any], tools: bool = True, **more: Any) -> Chat:
    return Chat(
        tuple(
            ChatMessage(role, content, None, json.dumps(fields).encode() if fields else b"")
            for role, content, fields in messages
        ),
        tools=json.dumps(TOOLS).encode() if tools else b"",
        **more,
    )


LOOP = (
    ("user", "Weather?", None),
    ("assistant", "", {"tool_calls": [WEATHER_CALL]}),
    ("tool", "sunny", {"tool_call_id": "call_0123"}),
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_is_found_in_the_template(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], {})
    answers = ModelAnswers(template, None)
    assert answers.format.name == name
    rendered = template.render(chat(*LOOP))
    assert "get_weather" in rendered and "Paris" in rendered and "sunny" in rendered
    assert rendered == template.render(chat(*LOOP)), "the same text each time"
    shorter = template.render(chat(*LOOP[:1], add_generation_prompt=False))
    assert rendered.startswith(shorter), "a second turn begins as the first one did"


def test_a_template_without_tools_gets_them_in_its_messages() -> None:
    template = ChatTemplate(TURNS + END, {})
    rendered = template.render(chat(("system", "Be brief.", None), *LOOP))
    assert rendered.index("Be brief.") < rendered.index("<tools>") < rendered.index("<|user|>")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}' in rendered
    assert "<|user|><tool_response>\nsunny\n</tool_response>" in rendered
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    rendered = ChatTemplate(strict + TURNS + END, {}).render(chat(*LOOP[:1]))
    assert "<|user|>You may call" in rendered and rendered.index("</tools>") < rendered.index("W")


def test_a_name_says_more_than_the_template() -> None:
    template = ChatTemplate(TEMPLATES["hermes"], {})
    answers = ModelAnswers(template, None, "llama3_json", "deepseek_r1")
    assert answers.format.name == "llama3_json" and answers.reasoning is not None
    with pytest.raises(ValueError, match="--tool-call-parser nonsense is not known"):
        ModelAnswers(template, None, "nonsense")
    with pytest.raises(ValueError, match="--reasoning-parser nonsense is not known"):
        ModelAnswers(template, None, "", "nonsense")


def test_the_description_in_a_checkpoint_comes_first() -> None:
    template = ChatTemplate(TEMPLATES["hermes"], {})
    described = {"fields": {"tool_calls": {"open": "<tool_call>", "keys": "<arg_key>"}}}
    answers = ModelAnswers(template, None, response_template=json.dumps(described))
    assert answers.format.name == "glm45"
    described = {"fields": {"reasoning_content": {"open": "<think>", "close": "</think>"}}}
    answers = ModelAnswers(template, None, response_template=json.dumps(described))
    assert answers.format.name == "hermes" and answers.has_reasoning


def test_short_ids_where_a_template_wants_them() -> None:
    strict = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
        "{{ raise_exception('ids have nine characters') }}{% endif %}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(strict + TEMPLATES["mistral"], {})
    answers = ModelAnswers(template, None)
    assert answers.format.id_style == "nine" and "sunny" in template.render(chat(*LOOP))
    ids = {answers._call_id(bytes(16), index) for index in range(9)}  # pyright: ignore[reportPrivateUsage]
    assert len(ids) == 9 and all(len(one) == 9 and one.isalnum() for one in ids)


# --- reasoning ---

THINKS = TURNS + "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
MAY_THINK = (
    TURNS + "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OFF = b'{"enable_thinking": false}'


@pytest.mark.parametrize(
    ("source", "kwargs", "opens"),
    [(THINKS, b"", True), (MAY_THINK, b"", False), (MAY_THINK, OFF, False)],
)
def test_how_an_answer_begins_is_in_the_generation_prompt(
    source: str, kwargs: bytes, opens: bool
) -> None:
    """Whatever stands elsewhere in the prompt."""
    template = ChatTemplate(source, {})
    answers = ModelAnswers(template, None)
    assert answers.has_reasoning
    for text in ("hi", "what is <think>?", "and </think>?"):
        asked = chat(("user", text, None), tools=False, template_kwargs=kwargs)
        assert answers.opens_reasoning(asked, template.render(asked)) is opens
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    for text, expected in (("<think>hm", True), ("<think>hm</think>yes", False)):
        asked = chat(("user", "x", None), ("assistant", text, None), tools=False, **continued)
        assert answers.opens_reasoning(asked, template.render(asked)) is expected


def test_only_what_has_parts_is_parsed() -> None:
    def request(answer: AnswerOptions | None, tools: bool) -> Generate:
        prompt = Prompt(chat=chat(("user", "hi", None), tools=tools))
        text = TextOptions(answer=answer)
        return Generate(bytes(16), 1, 1, "ipc:///x", prompt, b"", Sampling(1, 9), text)

    plain = ModelAnswers(ChatTemplate(TURNS + END, {}), None)
    assert plain.parser(request(None, True), False) is None
    assert plain.parser(request(AnswerOptions(), True), False) is None
    parsing = plain.parser(request(AnswerOptions(ToolChoice.AUTO), True), False)
    assert parsing is not None
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    parts = parsing.parser.feed(text) + parsing.parser.finish()
    assert (PartKind.CALL_NAME, 0, "now") in parts
    thinking = ModelAnswers(ChatTemplate(THINKS, {}), None)
    parsing = thinking.parser(request(AnswerOptions(), False), True)
    assert parsing is not None
    # No tools may be called: what looks like a call is content.
    parts = parsing.parser.feed(f"hm</think>{text}") + parsing.parser.finish()
    assert parts == [(PartKind.REASONING, 0, "hm"), (PartKind.CONTENT, 0, text)]
