"""The bodies of answers, in OpenAI's two shapes. Knows what a choice holds, not how it got there or
how it is sent."""

import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from pagewire_protocol.structs import TokenLogprobs

from .logprobs import PromptScore, chat_logprobs, completion_logprobs
from .params import Plan

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
    score: PromptScore | None = None
    """Of the prompt, where it is to be shown."""


class Shape:
    """What all chunks of one answer share."""

    def __init__(self, plan: Plan, response_id: str, model: str) -> None:
        self.plan = plan
        self.head: Json = {"id": response_id, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[ChoiceData], usage: Usage) -> Json:
        kind = "chat.completion" if self.plan.chat else "text_completion"
        body: Json = {
            **self.head,
            "object": kind,
            "choices": [self._choice(choice, False) for choice in choices],
            "usage": usage.body(),
        }
        if self.plan.chat and choices[0].prompt_ids is not None:
            body["prompt_token_ids"] = choices[0].prompt_ids
        if self.plan.chat and self.plan.prompt_logprobs >= 0 and choices[0].score:
            body["prompt_logprobs"] = choices[0].score.rows
        return body

    def chunk(
        self, choice: ChoiceData | None, usage: Usage | None = None, role: bool = False
    ) -> Json:
        """One event of a stream; without a choice, the one that tells the usage."""
        kind = "chat.completion.chunk" if self.plan.chat else "text_completion"
        body: Json = {
            **self.head,
            "object": kind,
            "choices": [] if choice is None else [self._choice(choice, True, role)],
        }
        if self.plan.chat and choice and choice.prompt_ids is not None:
            body["prompt_token_ids"] = choice.prompt_ids
        if self.plan.include_usage or self.plan.continuous_usage:
            body["usage"] = usage.body() if usage else None
        return body

    def _choice(self, choice: ChoiceData, delta: bool, role: bool = False) -> Json:
        plan, body = self.plan, Json(index=choice.index)
        if not plan.chat:
            body["text"] = choice.text
        elif delta:
            body["delta"] = self._delta(choice, role)
        else:
            body["message"] = {"role": plan.role, "content": choice.text}
        body["logprobs"] = self._logprobs(choice, delta)
        body["finish_reason"] = choice.reason
        if choice.reason or not plan.chat:
            body["stop_reason"] = choice.stop_reason
        if plan.return_token_ids:
            body["token_ids"] = list(choice.tokens)
            if not plan.chat and choice.prompt_ids is not None:
                body["prompt_token_ids"] = choice.prompt_ids
        if plan.prompt_logprobs >= 0 and not plan.chat and choice.score:
            body["prompt_logprobs"] = choice.score.rows
        return body

    def _delta(self, choice: ChoiceData, role: bool) -> Json:
        if role:
            return {"role": self.plan.role, "content": choice.text}
        return {} if choice.reason and not choice.text else {"content": choice.text}

    def _logprobs(self, choice: ChoiceData, delta: bool) -> Json | None:
        plan, score = self.plan, choice.score if self.plan.echo else None
        if plan.logprobs < 0 or (delta and not choice.logprobs and not score):
            return None
        if plan.chat:
            return chat_logprobs(choice.logprobs, plan.ids_as_text)
        return completion_logprobs(choice.logprobs, choice.offset, plan.ids_as_text, score)
