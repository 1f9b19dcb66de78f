"""langchain's own integration tests of a chat model, all of them, with tools and structured output on.

They run against a hash function whose calls and JSON grammars hold. What does not apply is listed here
with its reason, and a test that skips itself fails.
"""

from collections.abc import Callable
from typing import Any, Final

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("Pydantic serializer warnings", "Received a Pydantic BaseModel V1 schema")
]
"""Of the clients, about what the tests hand them."""
TEXT_ONLY: Final = "the models take text alone"
ONE_NAME: Final = "answers bear the first of a model's names, whichever of them was asked for"
NOT_HERE: Final = {
    "test_pdf_inputs": TEXT_ONLY,
    "test_pdf_tool_message": TEXT_ONLY,
    "test_audio_inputs": TEXT_ONLY,
    "test_image_inputs": TEXT_ONLY,
    "test_image_tool_message": TEXT_ONLY,
    "test_invoke_with_model_override": ONE_NAME,
    "test_ainvoke_with_model_override": ONE_NAME,
    "test_stream_with_model_override": ONE_NAME,
    "test_astream_with_model_override": ONE_NAME,
    "test_stream_time": "it times the client by itself, with the recorded answers of a server",
}
"""Tests that have nothing to ask, and why."""
SAYS: Final = "it wants certain words, and a hash function says anything"
CALLS: Final = "it wants a call that the model may make or not, and a hash function makes none"
NO_MORE: Final = (
    "it wants no keys but those of a schema that allows others, and a hash function adds some"
)
ONE_CALL: Final = "it wants one call where several may come, and a hash function goes on calling"
THINKS: Final = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>\n{% endif %}"
)
LONG: Final = "The cat sat on the mat. " * 40


@pytest.fixture(autouse=True)
def only_listed_skips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    name = request.function.__name__
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])

    def refuse(reason: str = "", **_: Any) -> None:
        pytest.fail(f"{name} skips itself, and is not listed: {reason}")

    monkeypatch.setattr(pytest, "skip", refuse)


@pytest.fixture
def benchmark() -> None:
    """Of a plugin that the one test wants that is not run."""


@pytest.fixture
def vcr() -> None:
    """The same."""


@pytest.fixture(scope="module")
def saying(start: Callable[..., Any]) -> Any:
    """A model whose texts end by a token."""
    return start("sayer", "EMPTY", "--fake-eos-token-id", "2")


@pytest.fixture(scope="module")
def thinking(start: Callable[..., Any]) -> Any:
    """A model whose answers begin with reasoning."""
    flags = ("--chat-template", THINKS, "--fake-eos-token-id", "2")
    return start("thinker", "EMPTY", *flags)


def params(base: str, model: str, **more: Any) -> dict[str, Any]:
    """For ChatOpenAI."""
    return {
        "base_url": base,
        "model": model,
        "api_key": "EMPTY",
        "max_retries": 0,
        "stream_usage": True,
        # Clients are kept beyond a test, whose event loop ends with it.
        "default_headers": {"Connection": "close"},
        **more,
    }


class TestHowItAnswers(ChatModelIntegrationTests):
    """All of them."""

    @pytest.fixture(autouse=True)
    def _stacks(self, saying: Any, thinking: Any) -> None:
        self._saying = saying
        self._thinking = thinking

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return params(self._saying.base, "sayer", max_tokens=2000)

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> Any:
        details = ["reasoning_output", "cache_read_input"]
        return {"invoke": details, "stream": details}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatOpenAI(**params(self._saying.base, "sayer", max_tokens=8))
        model.invoke(LONG)
        message = _asked(model, LONG, stream)
        usage: Any = message.usage_metadata
        assert usage["input_token_details"]["cache_read"] >= 64
        return message

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        model = ChatOpenAI(**params(self._thinking.base, "thinker", max_tokens=8))
        message = _asked(model, "hello", stream)
        usage: Any = message.usage_metadata
        assert usage["output_token_details"]["reasoning"] == 8
        return message

    @pytest.mark.xfail(reason=SAYS, run=False)
    def test_tool_calling(self, model: BaseChatModel) -> None: ...

    @pytest.mark.xfail(reason=SAYS, run=False)
    async def test_tool_calling_async(self, model: BaseChatModel) -> None: ...

    @pytest.mark.xfail(reason=ONE_CALL, run=False)
    def test_tool_calling_with_no_arguments(self, model: BaseChatModel) -> None: ...

    @pytest.mark.xfail(reason=SAYS, run=False)
    def test_unicode_tool_call_integration(self, model: BaseChatModel, **_: Any) -> None: ...

    @pytest.mark.xfail(reason=NO_MORE, run=False)
    def test_structured_output_pydantic_2_v1(self, model: BaseChatModel) -> None: ...

    @pytest.mark.xfail(reason=SAYS, run=False)
    def test_json_mode(self, model: BaseChatModel) -> None: ...

    @pytest.mark.xfail(reason=CALLS, run=False)
    def test_agent_loop(self, model: BaseChatModel) -> None: ...


def _asked(model: ChatOpenAI, text: str, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke(text)
    pieces = list(model.stream(text))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    return whole
