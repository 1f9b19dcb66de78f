"""The bodies of answers, in OpenAI's two shapes. Knows what a choice holds, not how it got there or how it is sent."""

import time
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct
from pagewire_protocol.parts import TokenLogprobs

from .params import Plan

LOWEST: Final = -9999.0
"""Stands for minus infinity, which JSON does not have."""
Json = dict[str, Any]


class Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ChoiceData(Struct):
    """What a choice says: all of it, or what is new in one chunk."""

    index: int
    text: str = ""
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    reason: str | None = None
    stop_reason: int | str | None = None
    prompt_ids: list[int] | None = None
    """Only where they are to be shown."""
    offset: int = 0
    """Characters in the token texts of earlier chunks."""


class Shape:
    """What all chunks of one answer share."""

    def __init__(self, plan: Plan, response_id: str, model: str) -> None:
        self.plan = plan
        self.head: Json = {"id": response_id, "created": int(time.time()), "model": model}

    def whole(self, choices: list[ChoiceData], usage: Usage) -> Json:
        kind = "chat.completion" if self.plan.chat else "text_completion"
        body: Json = {**self.head, "object": kind, "choices": [self._choice(choice, False) for choice in choices], "usage": usage.body()}
        if self.plan.chat and choices[0].prompt_ids is not None:
            body["prompt_token_ids"] = choices[0].prompt_ids
        return body

    def chunk(self, choice: ChoiceData | None, usage: Usage | None = None, role: bool = False) -> Json:
        """One event of a stream; without a choice, the one that tells the usage."""
        kind = "chat.completion.chunk" if self.plan.chat else "text_completion"
        body: Json = {**self.head, "object": kind, "choices": [] if choice is None else [self._choice(choice, True, role)]}
        if self.plan.chat and choice and choice.prompt_ids is not None:
            body["prompt_token_ids"] = choice.prompt_ids
        if self.plan.include_usage or self.plan.continuous_usage:
            body["usage"] = usage.body() if usage else None
        return body

    def _choice(self, choice: ChoiceData, delta: bool, role: bool = False) -> Json:
        body: Json = {"index": choice.index}
        if not self.plan.chat:
            body["text"] = choice.text
        elif delta:
            body["delta"] = self._delta(choice, role)
        else:
            body["message"] = {"role": "assistant", "content": choice.text}
        body["logprobs"] = None if delta and not choice.logprobs else self._logprobs(choice)
        body["finish_reason"] = choice.reason
        if choice.reason or not self.plan.chat:
            body["stop_reason"] = choice.stop_reason
        if self.plan.return_token_ids:
            body["token_ids"] = list(choice.tokens)
            if not self.plan.chat and choice.prompt_ids is not None:
                body["prompt_token_ids"] = choice.prompt_ids
        return body

    def _delta(self, choice: ChoiceData, role: bool) -> Json:
        if role:
            return {"role": "assistant", "content": ""}
        return {} if choice.reason and not choice.text else {"content": choice.text}

    def _logprobs(self, choice: ChoiceData) -> Json | None:
        if not self.plan.logprobs:
            return None
        return chat_logprobs(choice.logprobs) if self.plan.chat else completion_logprobs(choice.logprobs, choice.offset)


def token_text(entry: TokenLogprobs, candidate: int = 0) -> str:
    """What a candidate is called: its text, or its id where there is no tokenizer to tell."""
    return entry.texts[candidate].decode("utf-8", "replace") or f"token_id:{entry.ids[candidate]}"


def _candidates(entry: TokenLogprobs) -> list[tuple[str, float, bytes]]:
    return [(token_text(entry, i), max(value, LOWEST), raw) for i, (raw, value) in enumerate(zip(entry.texts, entry.values, strict=True))]


def completion_logprobs(entries: Sequence[TokenLogprobs], offset: int) -> Json:
    offsets: list[int] = []
    tokens: list[str] = []
    values: list[float] = []
    tops: list[dict[str, float]] = []
    for entry in entries:
        candidates = _candidates(entry)
        offsets.append(offset)
        tokens.append(candidates[0][0])
        values.append(candidates[0][1])
        tops.append({text: value for text, value, _ in reversed(candidates)})
        offset += len(candidates[0][0])
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def chat_logprobs(entries: Sequence[TokenLogprobs]) -> Json:
    content: list[Json] = []
    for entry in entries:
        shown = [{"token": text, "logprob": value, "bytes": list(raw)} for text, value, raw in _candidates(entry)]
        content.append({**shown[0], "top_logprobs": shown[1:]})
    return {"content": content}
