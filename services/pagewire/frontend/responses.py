"""The bodies of answers, in OpenAI's two forms: chats and completions. Knows what a choice holds,
not how it got there or how it is sent."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

from msgspec import Raw, Struct
from msgspec.structs import replace
from pagewire_protocol.structs import TokenLogprobs

from ..requests.answers import ContentDelta, Delta, Output, ReasoningDelta, ToolCallDelta
from .logprobs import (
    CompletionToken,
    PromptScore,
    chat_logprobs,
    chat_token,
    completion_logprobs,
    completion_token,
)
from .rendering import Rendering

Json = dict[str, Any]
_ABSENT: Final = ("prompt_logprobs", "prompt_token_ids")
"""Fields of whole answers that vLLM has as null where they were not asked for."""


class Usage(Struct):
    """Token counts of a choice or of a whole answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were in the prefix cache."""
    reasoning_tokens: int | None = None
    """Generated tokens that were reasoning; None where answers have no parts."""

    def body(self) -> Json:
        """OpenAI's `usage` object."""
        body: Json = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            body["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return body


class ChoiceData(Struct):
    """What a body shows of one choice: all of it, or what is new in one chunk."""

    index: int
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    """By their index: whole calls, or what one chunk adds to calls."""
    tokens: Sequence[int] = ()
    logprobs: Sequence[Any] = ()
    """TokenLogprobs, or what `ResponseFormatter.token` made of them."""
    reason: str | None = None
    stop_reason: int | str | None = None
    prompt_ids: list[int] | None = None
    """Only where the client asked for them."""
    offset: int = 0
    """Characters of the answer before the generated text."""
    score: PromptScore | None = None
    """Log-probabilities of the prompt, where the client asked for them."""
    blocks: list[Delta] = []
    """The parts of all of an answer in the order in which they came, for the APIs that show it."""

    def set_end(
        self, reason: str, stop_reason: int | str | None, *, called_tools: bool = False
    ) -> None:
        """Fill in why the choice ended. An answer that called tools and ended by itself waits for
        their results: clients know that by its reason."""
        self.reason = "tool_calls" if called_tools and reason == "stop" else reason
        self.stop_reason = stop_reason

    def add_all(self, outputs: Iterable[Output]) -> None:
        """Append all of an answer."""
        texts: list[list[str]] = []
        for output in outputs:
            for delta in (ContentDelta(output),) if isinstance(output, str) else output:
                if not self.blocks or block_of(self.blocks[-1]) != block_of(delta):
                    self.blocks.append(delta)
                    texts.append([])
                texts[-1].append(text_of(delta))
        self.blocks = [
            _with_text(block, "".join(pieces))
            for block, pieces in zip(self.blocks, texts, strict=True)
        ]
        for block in self.blocks:
            self.add(block)

    def add(self, delta: Delta) -> None:
        """Append one part."""
        match delta:
            case ContentDelta(text):
                self.content += text
            case ReasoningDelta(text):
                self.reasoning += text
            case ToolCallDelta():
                self._add_tool_call(delta)

    def _add_tool_call(self, delta: ToolCallDelta) -> None:
        for position, call in enumerate(self.tool_calls):
            if call.index == delta.index:
                arguments = call.arguments + delta.arguments
                self.tool_calls[position] = replace(call, arguments=arguments)
                return
        self.tool_calls.append(delta)


def block_of(delta: Delta) -> tuple[type[Delta], int]:
    """Deltas that follow each other and have the same one are one part of the answer."""
    return type(delta), delta.index if isinstance(delta, ToolCallDelta) else 0


def text_of(delta: Delta) -> str:
    """What it adds to its part."""
    return delta.arguments if isinstance(delta, ToolCallDelta) else delta.text


def _with_text(delta: Delta, text: str) -> Delta:
    if isinstance(delta, ToolCallDelta):
        return replace(delta, arguments=text)
    return replace(delta, text=text)


class ResponseFormatter(ABC):
    """Makes the bodies of one answer. A formatter is chosen once, by the endpoint; nothing else
    asks whether an answer is a chat's or a completion's."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    """`object` of a whole answer."""
    chunk_object: ClassVar[str]
    """`object` of one event of a stream."""

    def __init__(self, rendering: Rendering, request_id: str, model: str) -> None:
        self.rendering = rendering
        self.head: Json = {
            "id": self.id_prefix + request_id,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[ChoiceData], usage: Usage) -> Json:
        """The body of an answer that is not streamed."""
        return {
            **self.head,
            "object": self.whole_object,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage.body(),
            **self._absent_fields(),
            **self._prompt_fields(choices[0]),
        }

    def chunk(self, choice: ChoiceData, usage: Usage | None = None) -> Json:
        """One event of a stream. `usage`: the counts so far, where each event reports them."""
        return self._event([self._chunk_choice(choice)], usage, self._prompt_fields(choice))

    def usage_chunk(self, usage: Usage) -> Json:
        """The event without choices that reports the counts at a stream's end."""
        return self._event([], usage, {})

    @abstractmethod
    def token(self, entry: TokenLogprobs) -> Any:
        """What an answer shows of one token's log-probabilities: the work of showing them, done
        ahead."""

    @property
    @abstractmethod
    def has_first_chunks(self) -> bool:
        """Whether a stream has events before any generated text."""

    @abstractmethod
    def first_chunks(self, choices: Sequence[ChoiceData], usage: Usage | None) -> list[Json]:
        """The events before any generated text. `choices`: the content of each is what its answer
        begins with, empty in most."""

    @abstractmethod
    def _whole_choice(self, choice: ChoiceData) -> Json: ...

    @abstractmethod
    def _chunk_choice(self, choice: ChoiceData) -> Json: ...

    def _absent_fields(self) -> Json:
        """What a whole answer has beside its choices as null, where it was not asked for."""
        return {}

    def _prompt_fields(self, choice: ChoiceData) -> Json:
        """What a body says of the prompt beside its choices."""
        return {}

    def _event(self, choices: list[Json], usage: Usage | None, prompt: Json) -> Json:
        body: Json = {**self.head, "object": self.chunk_object, "choices": choices, **prompt}
        if self.rendering.include_usage:
            body["usage"] = usage.body() if usage else None
        return body


class ChatFormatter(ResponseFormatter):
    """Chat completions: messages, and deltas of messages."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def token(self, entry: TokenLogprobs) -> Raw:
        """An object of OpenAI's `content`."""
        return chat_token(entry, self.rendering.ids_as_text)

    @property
    def has_first_chunks(self) -> bool:
        """The role comes first."""
        return True

    def first_chunks(self, choices: Sequence[ChoiceData], usage: Usage | None) -> list[Json]:
        """An event with the role for each choice, and the prompt's token ids where they are known;
        then, where the answer continues a message that is to be shown, an event with that message
        for each choice."""
        chunks: list[Json] = []
        for choice in choices:
            delta = {"role": self.rendering.role, "content": ""}
            body = self._from_delta(ChoiceData(choice.index), delta)
            chunks.append(self._event([body], usage, self._prompt_fields(choice)))
        chunks += [
            self.chunk(ChoiceData(choice.index, choice.content), usage)
            for choice in choices
            if choice.content
        ]
        return chunks

    def _whole_choice(self, choice: ChoiceData) -> Json:
        message: Json = {"role": self.rendering.role, "content": choice.content, "refusal": None}
        message |= _reasoning(choice)
        if choice.tool_calls:
            message["content"] = choice.content or None
            message["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
        logprobs = self._logprobs(choice) if self.rendering.logprobs >= 0 else None
        return self._finish_choice(choice, {"message": message}, logprobs)

    def _chunk_choice(self, choice: ChoiceData) -> Json:
        delta = _reasoning(choice)
        if choice.tool_calls:
            delta["tool_calls"] = [_tool_call_delta(call) for call in choice.tool_calls]
        if choice.content or not (delta or choice.reason):
            delta["content"] = choice.content
        return self._from_delta(choice, delta)

    def _from_delta(self, choice: ChoiceData, delta: Json) -> Json:
        logprobs = None
        if self.rendering.logprobs >= 0 and choice.logprobs:
            logprobs = self._logprobs(choice)
        return self._finish_choice(choice, {"delta": delta}, logprobs)

    def _logprobs(self, choice: ChoiceData) -> Json:
        body = chat_logprobs(choice.logprobs, self.rendering.ids_as_text)
        return {**body, "refusal": None}

    def _finish_choice(self, choice: ChoiceData, message: Json, logprobs: Json | None) -> Json:
        """`message`: the message or delta, under its name."""
        body: Json = {
            "index": choice.index,
            **message,
            "logprobs": logprobs,
            "finish_reason": choice.reason,
        }
        if choice.reason:
            body["stop_reason"] = choice.stop_reason
        if self.rendering.return_token_ids:
            body["token_ids"] = list(choice.tokens)
        return body

    def _absent_fields(self) -> Json:
        return dict.fromkeys(_ABSENT)

    def _prompt_fields(self, choice: ChoiceData) -> Json:
        fields: Json = {}
        if choice.prompt_ids is not None:
            fields["prompt_token_ids"] = choice.prompt_ids
        if self.rendering.prompt_logprobs >= 0 and choice.score:
            fields["prompt_logprobs"] = choice.score.rows
        return fields


class CompletionFormatter(ResponseFormatter):
    """Completions: plain text. Reasoning and tool calls do not occur."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def token(self, entry: TokenLogprobs) -> CompletionToken:
        """An entry of each of OpenAI's lists."""
        return completion_token(entry, self.rendering.ids_as_text)

    @property
    def has_first_chunks(self) -> bool:
        """An echoed prompt comes first, unless it waits for its log-probabilities."""
        return self.rendering.echo and not self.rendering.scores_echo

    def first_chunks(self, choices: Sequence[ChoiceData], usage: Usage | None) -> list[Json]:
        """The echoed prompt of each choice."""
        if not self.has_first_chunks:
            return []
        return [self.chunk(choice, usage) for choice in choices]

    def _whole_choice(self, choice: ChoiceData) -> Json:
        body = self._choice(choice, self._logprobs(choice, len(choice.content)))
        for name in _ABSENT:
            body.setdefault(name, None)
        return body

    def _chunk_choice(self, choice: ChoiceData) -> Json:
        has_logprobs = choice.logprobs or (self.rendering.echo and choice.score)
        return self._choice(choice, self._logprobs(choice) if has_logprobs else None)

    def _logprobs(self, choice: ChoiceData, length: int | None = None) -> Json | None:
        rendering = self.rendering
        if rendering.logprobs < 0:
            return None
        score = choice.score if rendering.echo else None
        return completion_logprobs(
            choice.logprobs, choice.offset, rendering.ids_as_text, score, length
        )

    def _choice(self, choice: ChoiceData, logprobs: Json | None) -> Json:
        rendering = self.rendering
        body: Json = {
            "index": choice.index,
            "text": choice.content,
            "logprobs": logprobs,
            "finish_reason": choice.reason,
            "stop_reason": choice.stop_reason,
        }
        if rendering.return_token_ids:
            body["token_ids"] = list(choice.tokens)
            if choice.prompt_ids is not None:
                body["prompt_token_ids"] = choice.prompt_ids
        if rendering.prompt_logprobs >= 0 and choice.score:
            body["prompt_logprobs"] = choice.score.rows
        return body


def _reasoning(choice: ChoiceData) -> Json:
    """Under both names that clients read: vLLM's, and the one of DeepSeek, SGLang and
    llama.cpp."""
    if not choice.reasoning:
        return {}
    return {"reasoning": choice.reasoning, "reasoning_content": choice.reasoning}


def _tool_call(call: ToolCallDelta) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _tool_call_delta(call: ToolCallDelta) -> Json:
    """Id, type and name come with a call's first delta alone."""
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_tool_call(call)}


def formatter_for(rendering: Rendering, request_id: str, model: str) -> ResponseFormatter:
    """The formatter of a request's endpoint."""
    kind = ChatFormatter if rendering.chat else CompletionFormatter
    return kind(rendering, request_id, model)
