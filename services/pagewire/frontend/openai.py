"""The requests of OpenAI's API, with vLLM's additions, as typed Structs. Knows names and types;
parsing.py reads bodies and refuses fields that are not here; params.py, prompts.py and
requests/sampling.py check ranges.

Every accepted parameter is a field here; those that are single numbers or switches come from the
table of `requests/parameters.py`.
"""

from typing import TYPE_CHECKING, Any, Final, Literal

from msgspec import Raw, Struct, defstruct, field

from ..requests.parameters import HTTP_SCALARS

MAX_REQUEST_ID: Final = 128
"""Characters of a client's own name for its request."""


def is_request_id(text: str) -> bool:
    """Whether a client's text can be an id: it goes into headers, bodies and logs."""
    return text.isascii() and text.isprintable() and 0 < len(text) <= MAX_REQUEST_ID


_JSON_NULL: Final = Raw(b"null")
# A factory, since a schema cannot show a `Raw` as a field's default; of one object for all requests.
_NULL: Final[Any] = field(default_factory=lambda: _JSON_NULL)


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Which token counts a stream reports."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against eavesdroppers who measure the length of events; accepted, none is added."""


class JsonSchemaFormat(Struct):
    """The schema of a response format, by OpenAI's names."""

    name: str | None = None
    description: str | None = None
    schema: Raw = _NULL
    strict: bool | None = None
    """False: what the server does not know of the schema is ignored, not refused."""


class ResponseFormat(Struct):
    """What the answer must match; `type` (text, json_object, json_schema or structural_tag) says
    which of the other fields holds it."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: Raw = _NULL
    """Of json_object, as llama.cpp has it."""
    structures: Raw = _NULL
    triggers: Raw = _NULL
    format: Raw = _NULL


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """What the answer must match, by vLLM's names: one of the first six."""

    json: Raw = _NULL
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Raw = _NULL
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None
    """Accepted: there is no other way to fall back to."""


class Part(Struct, forbid_unknown_fields=True):
    """A piece of a message's content. The fields after `refusal` are there so that the pieces that
    need them can be refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Raw = _NULL
    input_audio: Raw = _NULL
    audio_url: Raw = _NULL
    video_url: Raw = _NULL
    file: Raw = _NULL


class FunctionCallIn(Struct):
    """The function of an earlier answer's call."""

    name: str
    arguments: str | dict[str, Raw] | None = None
    """JSON text, or the object itself."""


class ToolCallIn(Struct):
    """A call of an earlier answer."""

    function: FunctionCallIn
    id: str | None = None
    type: str | None = None
    """`function`, also where it is not said."""


class MessageIn(Struct, forbid_unknown_fields=True):
    """A message of a conversation: what reaches the chat template."""

    role: str
    content: str | list[Part | str] | None = None
    """A string among parts is a text, as in vLLM: LangChain sends lists of strings."""
    name: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None
    """Of the call whose result this is."""
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The same, by the name of DeepSeek, SGLang and llama.cpp."""


class FunctionIn(Struct, omit_defaults=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Raw] | None = None
    """A JSON schema of its arguments."""
    strict: bool | None = None
    """Forced arguments keep to all of the schema; a keyword that is not known is refused."""


class ToolIn(Struct, omit_defaults=True):
    """A tool."""

    type: Literal["function"]
    function: FunctionIn


class NamedFunction(Struct):
    """The name of a function."""

    name: str


class NamedTool(Struct, tag_field="type", tag="function"):
    """A choice of one tool."""

    function: NamedFunction


class AllowedTools(Struct):
    """Which of the tools may be called."""

    tools: list[NamedTool]
    mode: Literal["auto", "required"] = "auto"


class AllowedToolsChoice(Struct, tag_field="type", tag="allowed_tools"):
    """A choice of some of the tools."""

    allowed_tools: AllowedTools


if TYPE_CHECKING:
    Scalars = Struct
else:
    Scalars = defstruct(
        "Scalars",
        [(parameter.name, parameter.type | None, None) for parameter in HTTP_SCALARS],
        kw_only=True,
        forbid_unknown_fields=True,
    )


class Request(Scalars, forbid_unknown_fields=True, kw_only=True):
    """What both generation endpoints accept, besides the scalars of the table of parameters, which
    go through unseen: `requests/sampling.py` reads them by name."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    echo: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Raw = _NULL
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structural_tag: Raw = _NULL
    json_schema: Raw = _NULL
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    user: str | None = None
    metadata: Raw = _NULL
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class CompletionRequest(Request, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    suffix: str | None = None


class ChatRequest(Request, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[MessageIn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Raw] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: str | NamedTool | AllowedToolsChoice | None = None
    """`none`, `auto`, `required`, or one function."""
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """For the chat template; `none` switches reasoning off."""
    include_reasoning: bool | None = None
    """False: the reasoning is not shown."""
    thinking_token_budget: int | None = None
    """Tokens of reasoning after which it is ended."""


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize, of either a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageIn] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Raw] | None = None
    tools: list[ToolIn] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
