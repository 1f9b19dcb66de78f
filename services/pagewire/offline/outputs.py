"""What a generation returns to a program, with vLLM's field names. Plain data: no logic of the
stack lives here."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One candidate for one position: its natural log probability, its rank from 1 (None: not
    known) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PromptLogprobs = list[dict[int, Logprob] | None]
"""For each prompt token its own entry first, then the most likely ones; None for the first token,
which nothing precedes."""


@dataclass
class CompletionOutput:
    """One of a request's `n` continuations. `finish_reason` is "stop" or "length"; `stop_reason`
    the stop string or stop token id that was met, None for the model's own end."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None

    def finished(self) -> bool:
        """All of it is there."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Moments in seconds since the epoch, as `time.time()` gives them; 0 when not reached.
    `time_in_queue` is a duration."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    finished_time: float = 0.0

    @property
    def time_in_queue(self) -> float:
        """Seconds from the arrival to the first slot on a worker."""
        return max(0.0, self.first_scheduled_time - self.arrival_time)


@dataclass
class RequestOutput:
    """`prompt` is the text as given, for a chat as the model's template renders it, None for token
    ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None


@dataclass
class BeamSearchSequence:
    """One hypothesis. `tokens` and `text` begin with the prompt; `cum_logprob` is without the
    length penalty. `logprobs`: an entry for each generated token."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """The best hypotheses of one prompt, best first."""

    sequences: list[BeamSearchSequence]
