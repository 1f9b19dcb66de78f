"""Chat templates: the same text as transformers renders, inside limits."""

import pytest
from pagewire.tokenizer.template import ChatTemplate, TemplateRefused, read_option
from pagewire.tokenizer.watchdog import Watchdog
from pagewire_protocol.messages import Chat, ChatMessage

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    ("system", "Be brief & <polite>."),
    ("user", "  What is 2 + 2?\n"),
    ("assistant", "4. "),
    ("user", 'Quote "this" — 世界 😀'),
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n"
    "    {% else %}\n{{ m.content.strip() + eos_token }}\n{% endif %}\n{%- endfor %}\n",
    "json": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{{ m | tojson }}{% endfor %}",
    "generation": "{% for m in messages %}\n"
    "  {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}\n  {{ m.content }}\n{% endif %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m['content'] }};{% endfor %}"
    "{% if tools %}tools{% endif %}{{ documents is none }}{{ strftime_now('%%') }}",
}


def chat(messages: list[tuple[str, str]] = MESSAGES, **options: bool) -> Chat:
    return Chat(tuple(ChatMessage(role, content) for role, content in messages), **options)


def by_transformers(source: str, messages: list[tuple[str, str]], **options: bool) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    given = [{"role": role, "content": content} for role, content in messages]
    return utils.render_jinja_template([given], chat_template=source, **options, **NAMES)[0][0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_as_transformers(name: str, add_generation_prompt: bool):
    found = ChatTemplate(TEMPLATES[name], NAMES).render(
        chat(add_generation_prompt=add_generation_prompt)
    )
    assert found == by_transformers(
        TEMPLATES[name], MESSAGES, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("name", ["chatml", "llama2"])
@pytest.mark.parametrize("last", ["The answer is", "The answer is  ", "  The"])
def test_continue_final_message_as_transformers(name: str, last: str):
    messages = [*MESSAGES, ("assistant", last)]
    found = ChatTemplate(TEMPLATES[name], NAMES).render(
        chat(messages, add_generation_prompt=False, continue_final_message=True)
    )
    assert found == by_transformers(
        TEMPLATES[name], messages, add_generation_prompt=False, continue_final_message=True
    )
    assert found.endswith(last.strip() if name == "llama2" else last)


def test_continue_and_prompt_exclude_each_other():
    with pytest.raises(TemplateRefused, match="exclude each other"):
        ChatTemplate(TEMPLATES["chatml"], {}).render(chat(continue_final_message=True))


def test_continue_needs_the_final_message_in_the_text():
    with pytest.raises(TemplateRefused, match="leaves out the final message"):
        ChatTemplate("{{ messages[0].content }}", {}).render(
            chat(add_generation_prompt=False, continue_final_message=True)
        )


def test_names_of_speakers():
    template = ChatTemplate(
        "{% for m in messages %}{{ m.name | default('nobody') }} {% endfor %}", {}
    )
    assert (
        template.render(Chat((ChatMessage("user", "a", "Ann"), ChatMessage("user", "b"))))
        == "Ann nobody "
    )


def test_raise_exception_gives_its_message_alone():
    template = ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        {},
    )
    with pytest.raises(TemplateRefused) as caught:
        template.render(chat())
    assert str(caught.value) == "System role not supported"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 10**10 }}",
        "{{ 10 ** 1000000 }}",
        "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ messages[9].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_or_broken_templates_are_refused(source: str):
    with pytest.raises(TemplateRefused, match="cannot be rendered"):
        ChatTemplate(source, {}).render(chat())


def test_a_runaway_template_is_ended():
    source = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, {}, Watchdog(0.2))
    for _ in range(2):
        with pytest.raises(TemplateRefused, match=r"longer than 0\.2 s"):
            template.render(chat())
    assert ChatTemplate("ok", {}, Watchdog(30)).render(chat()) == "ok"


def test_a_template_that_does_not_compile():
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% for %}", {})


THINKING = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<no-think>{% endif %}{{ tools | length }}"


def test_further_variables_reach_the_template():
    found = ChatTemplate(THINKING, NAMES).render(
        chat(template_kwargs=b'{"enable_thinking": false, "tools": [1, 2]}')
    )
    assert found == "Be brief & <polite>.<no-think>2"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (b"{", "is not JSON"),
        (b"[" * 60_000, "is not JSON"),
        (b"[1]", "must be an object"),
        (
            b'{"messages": [], "add_generation_prompt": 1}',
            "add_generation_prompt, messages is given by a field",
        ),
    ],
)
def test_further_variables_that_cannot_be_used_are_refused(given: bytes, told: str):
    with pytest.raises(TemplateRefused, match=f"chat_template_kwargs.*{told}"):
        ChatTemplate("ok", {}).render(chat(template_kwargs=given))


def test_option_is_a_file_or_a_template(tmp_path):
    (tmp_path / "t.jinja").write_text("from a file {{ messages }}")
    assert read_option(str(tmp_path / "t.jinja")) == "from a file {{ messages }}"
    assert read_option("{{ messages }}") == "{{ messages }}"
    with pytest.raises(
        ValueError,
        match=r"--chat-template: nowhere/t is neither a file nor .* built-in one \(alpaca, .*vicuna\)",
    ):
        read_option("nowhere/t")


def test_the_interpreter_is_out_of_reach():
    assert ChatTemplate("{{ lipsum.__globals__ }}{{ messages.__class__ }}", {}).render(chat()) == ""
