"""Programs that call tools, over the APIs that they speak: calls that must be are made by a model that
is a hash function, so their arguments are random, and valid.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import agents
import anthropic
import openai
import pytest
from agents import models
from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

UNITS = ("celsius", "fahrenheit")
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"type": "string", "enum": list(UNITS)}, "days": {"enum": [1, 2, 3]}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
ASK: list[Any] = [{"role": "user", "content": "What is the weather?"}]


class Weather(BaseModel):
    """The weather."""

    unit: Literal["celsius", "fahrenheit"]
    days: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def caller(start: Callable[..., Any]) -> Any:
    """A model whose texts end by a token, as those that must call do."""
    return start("caller", "EMPTY", "--fake-eos-token-id", "2", "--enable-auto-tool-choice")


@pytest.fixture
def client(caller: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=caller.base, api_key="EMPTY", max_retries=0, timeout=60)


def async_client(caller: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=caller.base, api_key="EMPTY", max_retries=0, timeout=60)


def check(arguments: str) -> None:
    assert Weather.model_validate_json(arguments)


def test_openai_calls_and_goes_on(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "caller", "tools": TOOLS, "parallel_tool_calls": False}
    first = client.chat.completions.create(
        messages=ASK, tool_choice="required", max_tokens=200, n=2, **options
    )
    for choice in first.choices:
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert call.type == "function" and call.function.name == "get_weather"
        check(call.function.arguments)
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    history = [*ASK, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(messages=history, max_tokens=8, **options)
    assert second.choices[0].message.content
    assert second.usage and second.usage.prompt_tokens_details
    prompt = first.usage.prompt_tokens if first.usage else 0
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert cached >= 0.95 * (prompt - prompt % 16), "the second turn begins as the first one did"


def test_openai_streams_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="caller",
        messages=ASK,
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
        max_tokens=200,
        seed=1,
    ) as stream:
        streamed = stream.get_final_completion().choices[0]
    whole = client.chat.completions.create(
        model="caller",
        messages=ASK,
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
        max_tokens=200,
        seed=1,
    ).choices[0]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    (one,), (other,) = streamed.message.tool_calls or [], whole.message.tool_calls or []
    assert one.function.arguments == other.function.arguments  # type: ignore[union-attr]
    check(one.function.arguments)


def test_a_strict_tool_is_held_where_calls_are_free(client: openai.OpenAI) -> None:
    def ask(schema: Any, strict: bool | None) -> Any:
        function: Any = {"name": "get_weather", "parameters": schema, "strict": strict}
        tools: Any = [{"type": "function", "function": function}]
        return client.chat.completions.create(
            model="caller", messages=ASK, tools=tools, max_tokens=16
        )

    assert ask(SCHEMA, True).choices[0].message.content
    unknown = {"type": "object", "properties": {"unit": {"not": {}}}}
    assert ask(unknown, None).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match='"not"') as caught:
        ask(unknown, True)
    assert caught.value.param == "tools"


def test_openai_responses(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **FUNCTION, "strict": True}
    options: Any = {"model": "caller", "input": "hi", "tools": [tool], "tool_choice": "required"}
    options["parallel_tool_calls"] = False
    whole = client.responses.create(**options, max_output_tokens=200)
    (call,) = whole.output
    assert call.type == "function_call" and whole.usage and whole.status == "completed"
    check(call.arguments)
    with client.responses.stream(**options, max_output_tokens=200) as stream:
        events = list(stream)
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    check(call.arguments)
    assert events[-1].type == "response.completed"
    text = client.responses.create(model="caller", input="hi", max_output_tokens=8)
    assert text.output_text and text.status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        client.responses.create(model="caller", input="hi", previous_response_id="resp_1")


def test_anthropic(caller: Any) -> None:
    client = anthropic.Anthropic(base_url=caller.url, api_key="EMPTY", max_retries=0, timeout=60)
    tool: Any = {"name": "get_weather", "description": "W.", "input_schema": SCHEMA}
    options: Any = {"model": "caller", "max_tokens": 200, "tools": [tool]}
    forced = {"type": "any", "disable_parallel_tool_use": True}
    message = client.messages.create(messages=ASK, tool_choice=forced, **options)
    assert message.stop_reason == "tool_use"
    (block,) = message.content
    assert block.type == "tool_use" and Weather.model_validate(block.input)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    history = [
        *ASK,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    with client.messages.stream(messages=history, tool_choice=forced, **options) as stream:
        final = stream.get_final_message()
    (block,) = final.content
    assert block.type == "tool_use" and Weather.model_validate(block.input)
    assert final.usage.cache_read_input_tokens and final.usage.output_tokens
    count = client.messages.count_tokens(model="caller", messages=ASK, tools=[tool])
    assert count.input_tokens == message.usage.input_tokens + (
        message.usage.cache_read_input_tokens or 0
    )
    long: Any = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(anthropic.BadRequestError, match=r"is too long: \d+ tokens > 4096 maximum"):
        client.messages.create(model="caller", messages=long, max_tokens=9)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="caller", messages=ASK, max_tokens=0)


@langchain_tool
def get_weather(unit: Literal["celsius", "fahrenheit"], days: Literal[1, 2, 3]) -> str:
    """The weather."""
    return f"{days} sunny days in {unit}"


def test_anthropic_tool_runner(caller: Any) -> None:
    """It asks the server to keep the conversation, and sends it whole where that cannot."""

    @anthropic.beta_tool
    def get_weather(sunny: bool) -> str:
        """The weather.

        Args:
            sunny: Whether the sun shines.
        """
        return "rain"

    options: Any = {"base_url": caller.url, "api_key": "EMPTY", "max_retries": 0, "timeout": 60}
    with anthropic.Anthropic(**options) as client:
        runner = client.beta.messages.tool_runner(
            model="caller",
            max_tokens=200,
            messages=ASK,
            tools=[get_weather],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            max_iterations=2,
        )
        first, second = list(runner)
        assert first.stop_reason == second.stop_reason == "tool_use"
        prompts = [
            message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
            for message in (first, second)
        ]
        assert prompts[1] > prompts[0], "the second turn has the first one in its prompt"
        with pytest.raises(anthropic.BadRequestError, match="thread"):
            client.beta.messages.create(
                model="caller",
                messages=ASK,
                max_tokens=2,
                thread={"type": "continue", "previous_message_id": "msg_1"},
            )


def test_langchain_calls_tools(caller: Any) -> None:
    llm = ChatOpenAI(base_url=caller.base, api_key="EMPTY", model="caller", max_retries=0)  # type: ignore[arg-type]
    bound = llm.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    (call,) = bound.invoke("hi").tool_calls  # type: ignore[attr-defined]
    assert get_weather.invoke(call).content.endswith(call["args"]["unit"])
    pieces = list(bound.stream("hi"))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    (call,) = whole.tool_calls  # type: ignore[attr-defined]
    assert get_weather.invoke(call).content
    for method in ("function_calling", "json_schema"):
        shaped = llm.with_structured_output(Weather, method=method)
        assert isinstance(shaped.invoke("hi"), Weather)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents_complete_a_loop(caller: Any, api: str) -> None:
    calls: list[str] = []

    @agents.function_tool
    def get_weather(unit: Literal["celsius", "fahrenheit"], days: Literal[1, 2, 3]) -> str:
        """The weather."""
        calls.append(unit)
        return "sunny"

    agents.set_tracing_disabled(True)
    kinds = {
        "chat": models.openai_chatcompletions.OpenAIChatCompletionsModel,
        "responses": models.openai_responses.OpenAIResponsesModel,
    }

    def agent_of(client: openai.AsyncOpenAI) -> agents.Agent[Any]:
        return agents.Agent(
            name="caller",
            instructions="Say what the weather is.",
            tools=[get_weather],
            model=kinds[api]("caller", client),
            # The texts of this model have no end, which this API calls incomplete.
            tool_use_behavior="run_llm_again" if api == "chat" else "stop_on_first_tool",
            model_settings=agents.ModelSettings(
                tool_choice="required", parallel_tool_calls=False, max_tokens=64
            ),
        )

    async def run() -> Any:
        async with async_client(caller) as client:
            streamed = agents.Runner.run_streamed(agent_of(client), "hi")
            async for _ in streamed.stream_events():
                pass
            return await agents.Runner.run(agent_of(client), "hi"), streamed

    for result in asyncio.run(run()):
        assert isinstance(result.final_output, str)
    assert len(calls) == 2 and set(calls) <= set(UNITS)


def test_pydantic_ai(caller: Any) -> None:
    async def run() -> Any:
        async with async_client(caller) as client:
            model = OpenAIChatModel("caller", provider=OpenAIProvider(openai_client=client))
            agent = Agent(model, output_type=Weather, retries=0)
            settings: Any = {"parallel_tool_calls": False, "max_tokens": 200}
            return await agent.run("hi", model_settings=settings)

    assert isinstance(asyncio.run(run()).output, Weather)


def test_smolagents(caller: Any) -> None:
    from smolagents import OpenAIServerModel, tool

    @tool
    def days_of(days: int) -> str:
        """The days.

        Args:
            days: How many.
        """
        return str(days)

    model = OpenAIServerModel("caller", api_base=caller.base, api_key="EMPTY", max_tokens=200)
    ask: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    message = model.generate(ask, tools_to_call_from=[days_of], parallel_tool_calls=False)
    assert message.tool_calls
    arguments = message.tool_calls[0].function.arguments
    assert isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)


IN_THE_PROMPT = "the form of the answer is said to the model and to nobody else"
ITS_CHOICE = "whether to call is the model's choice"
NOT_HELD = {
    "JSON": IN_THE_PROMPT,
    "MD_JSON": IN_THE_PROMPT,
    "PARALLEL_TOOLS": ITS_CHOICE,
    "ANTHROPIC_JSON": IN_THE_PROMPT,
    "ANTHROPIC_PARALLEL_TOOLS": ITS_CHOICE,
}
"""Modes of instructor whose answers a hash function cannot get right, and why."""


def test_instructor_in_all_of_its_modes(caller: Any, instructor_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(instructor_path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "instructor_calls.py"), caller.url],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes.pop("versions") == ["3.3.0", "1.17.0"]
    wrong = {mode: text for mode, text in outcomes.items() if text != "right"}
    assert wrong.keys() <= NOT_HELD.keys(), wrong
    # The server has answered, and instructor did not find what it had asked the model for.
    found = ("ValidationError", "IncompleteOutput", "AssertionError", "JSONDecodeError")
    assert all(text.startswith(found) for text in wrong.values()), wrong
