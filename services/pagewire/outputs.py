"""What a generation returns to a program, with vLLM's field names. Plain data: no logic of the stack lives here."""

from dataclasses import dataclass, field


@dataclass
class Logprob:
    """One candidate for one position: its natural log probability, its rank from 1 (None: not known) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's `n` continuations. `finish_reason` is "stop" or "length"; `stop_reason` the stop string or stop token id that was
    met, None for the model's own end."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Moments on the monotonic clock, in seconds; 0 when not reached."""

    arrival_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: None = None
    num_cached_tokens: int | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
