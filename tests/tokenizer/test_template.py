"""Chat templates: the same text as transformers renders, inside limits."""

import pytest
from pagewire.checkpoint.chat_templates import read_option
from pagewire.tokenizer.render_limit import RenderLimit
from pagewire.tokenizer.template import ChatTemplate, TemplateRefused
from pagewire_protocol.messages import Chat, ChatMessage

ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
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
    "json": "{% for m in messages %}{% if loop.index > 4 %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{{ m | tojson }}{% endfor %}",
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


@pytest.mark.parametrize(
    ("given", "shown"),
    [(b"", "no 1"), (b'{"enable_thinking": true}', "yes 1"), (b'{"more": 2}', "no 2")],
)
def test_variables_that_a_request_does_not_give_have_defaults(given: bytes, shown: str):
    source = "{{ 'yes' if enable_thinking else 'no' }} {{ more }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, {}, defaults={"enable_thinking": False, "more": 1})
    assert template.render(chat([("user", "")], template_kwargs=given)) == shown


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
    with pytest.raises(TemplateRefused, match=r"leaves out messages\[3\] \(role 'user'\)"):
        ChatTemplate("{% for m in messages[:3] %}{{ m.content }}{% endfor %}", {}).render(
            chat(add_generation_prompt=False, continue_final_message=True)
        )


def test_names_of_speakers():
    template = ChatTemplate(
        "{% for m in messages %}{{ m.name | default('nobody') }}: {{ m.content }} {% endfor %}", {}
    )
    assert (
        template.render(Chat((ChatMessage("user", "a", "Ann"), ChatMessage("user", "b"))))
        == "Ann: a nobody: b "
    )


@pytest.mark.parametrize(
    "source",
    [
        ALL,
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
        read_option("chatml"),
        read_option("llama-2"),
    ],
)
def test_a_name_that_the_template_does_not_show_changes_nothing(source: str):
    """OpenAI's clients send names to every model: that is no refusal, and no other prompt."""
    messages = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    named = tuple(ChatMessage(role, text, "Ann") for role, text in messages)
    template = ChatTemplate(source, NAMES)
    assert template.render(Chat(named)) == template.render(chat(messages))


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
    template = ChatTemplate(source, {}, RenderLimit(0.2))
    for _ in range(2):
        with pytest.raises(TemplateRefused, match=r"longer than 0\.2 s"):
            template.render(chat())
    assert ChatTemplate(ALL, {}, RenderLimit(30)).render(chat([("user", "ok")])) == "ok"


def test_a_template_that_does_not_compile():
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% for %}", {})


THINKING = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<no-think>{% endif %}{{ tools | length }}"


def test_further_variables_reach_the_template():
    found = ChatTemplate(THINKING, NAMES).render(
        chat([("user", "hi")], template_kwargs=b'{"enable_thinking": false, "tools": [1, 2]}')
    )
    assert found == "hi<no-think>2"


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
    source = ALL + "{{ lipsum.__globals__ }}{{ messages.__class__ }}"
    assert ChatTemplate(source, {}).render(chat([("user", "hi")])) == "hi"


# --- text that was accepted is in the prompt, or the request is refused

PARTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
FILTERED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    "{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
)
MIXED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content[0].text }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ raise_exception('a list, please') }}"
    "{% endif %}{{ m.content[0]['text'] | trim }}{% endfor %}"
)


@pytest.mark.parametrize("source", [PARTS, FIRST_PART, FILTERED, EITHER, STRICT])
def test_a_template_of_typed_parts_gets_them(source: str):
    messages = [("system", "Be brief."), ("user", 'Quote "this" 世界'), ("assistant", "4.")]
    found = ChatTemplate(source, {}).render(chat(messages))
    assert found == '<system>Be brief.<user>Quote "this" 世界<assistant>4.'
    # Written as parts from the start it would be the same.
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages]
    assert found == utils.render_jinja_template([parts], chat_template=source)[0][0]


def test_a_template_may_take_one_role_s_content_as_parts_alone():
    found = ChatTemplate(MIXED, {}).render(chat([("system", "Brief."), ("user", "Hi")]))
    assert found == "<system>Brief.<user>Hi"


@pytest.mark.parametrize("source", [PARTS, FIRST_PART])
def test_a_message_in_parts_is_continued(source: str):
    messages = [("user", "Hi"), ("assistant", "The answer is ")]
    found = ChatTemplate(source, {}).render(
        chat(messages, add_generation_prompt=False, continue_final_message=True)
    )
    assert found == "<user>Hi<assistant>The answer is "


def test_empty_texts_need_not_be_shown():
    found = ChatTemplate(
        "{% for m in messages if m.content %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}", {}
    ).render(chat([("system", ""), ("user", "Hi"), ("assistant", " \n")]))
    assert found == "<user>Hi<assistant>"


@pytest.mark.parametrize(
    ("source", "messages", "told"),
    [
        (
            "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}",
            [("system", "i"), ("user", "which?")],
            "messages[0] (role 'system')",
        ),
        (
            "{{ messages[-1].content }}",
            [("user", "i"), ("user", "hi")],
            "messages[0] (role 'user')",
        ),
        ("no text at all", [("user", "at")], "messages[0] (role 'user')"),
        (
            "{% for m in messages if m.role != 'function' %}{{ m.content }}{% endfor %}",
            [("user", "a"), ("function", "b")],
            "messages[1] (role 'function')",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(source, messages, told):
    """Also where the text is in the prompt by chance."""
    template = ChatTemplate(source, {})
    for _ in range(2):
        with pytest.raises(TemplateRefused) as caught:
            template.render(chat(messages))
        assert f"the chat template of this model leaves out {told}; " in str(caught.value)


def test_a_template_may_change_the_texts_that_it_shows():
    """Thoughts of earlier answers are left out by design."""
    source = (
        "{% for m in messages %}[{{ m.content.split('</think>')[-1] | trim | upper }}]{% endfor %}"
    )
    found = ChatTemplate(source, {}).render(
        chat([("user", " hi "), ("assistant", "<think>hm</think>yes"), ("user", "ok")])
    )
    assert found == "[HI][YES][OK]"


def test_a_template_that_needs_the_very_texts():
    """It does not render with other texts in their place; what it makes of these is looked at."""
    source = "{% for m in messages %}{% if m.content not in ('a', 'b') %}{{ raise_exception('?') }}{% endif %}{% endfor %}"
    shown = ChatTemplate(source + ALL, {})
    assert shown.render(chat([("user", "a"), ("user", "b")])) == "ab"
    with pytest.raises(TemplateRefused, match=r"^\?$"):
        shown.render(chat([("user", "a"), ("user", "c")]))
    with pytest.raises(TemplateRefused, match=r"leaves out messages\[1\]"):
        ChatTemplate(source + "{{ messages[0].content }}", {}).render(
            chat([("user", "a"), ("user", "b")])
        )


@pytest.mark.parametrize(
    ("source", "shown_as"),
    [
        (TEMPLATES["chatml"], "system"),
        (PARTS, "system"),
        (ALL + "{# system, developer #}{{ messages[0].role }}", "developer"),
    ],
)
def test_developer_is_system_where_the_template_does_not_know_it(source, shown_as):
    found = ChatTemplate(source, {}).render(chat([("developer", "Be brief."), ("user", "Hi")]))
    assert "Be brief." in found and shown_as in found
    assert ("developer" in found) == (shown_as == "developer")


def test_shapes_of_conversations_are_judged_once(monkeypatch):
    template = ChatTemplate(TEMPLATES["chatml"], {})
    renders = []
    monkeypatch.setattr(
        template,
        "_collect",
        lambda values, collect=template._collect: renders.append(1) or collect(values),
    )
    for text in ("a", "b", "c"):
        template.render(chat([("user", text)]))
    assert len(renders) == 4


def test_a_role_that_neither_openai_nor_the_template_knows_is_refused():
    template = ChatTemplate(TEMPLATES["chatml"], {})
    for role in ("system", "developer", "user", "assistant", "tool", "function"):
        assert "Hello" in template.render(chat([(role, "Hello")]))
    with pytest.raises(TemplateRefused, match=r"role 'usr'.*use one of system, developer, user"):
        template.render(chat([("user", "Hi"), ("usr", "Hello")]))
    named = ChatTemplate(ALL + "{# observation #}", {})
    assert named.render(chat([("observation", "Hello")])) == "Hello"
