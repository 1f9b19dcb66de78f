"""How many answers a request wants, and found in which way: n, the best of several, or beam search,
under the rules that SamplingParams of vLLM 0.4 had for them. Knows nothing of prompts."""

from typing import Final, Literal

from msgspec import Struct

from pagewire.requests.beam_search import MAX_WIDTH

from ..requests.errors import bad
from .limits import within
from .openai import Request
from .sampling import is_greedy

MAX_N: Final = 128
MAX_LENGTH_PENALTY: Final = 100.0


class Beams(Struct, frozen=True):
    width: int
    length_penalty: float
    early_stopping: bool | Literal["never"]


class Choices(Struct, frozen=True):
    """`per_prompt` are generated, the best `n` of them shown."""

    n: int
    per_prompt: int
    beams: Beams | None = None

    @property
    def cost(self) -> int:
        """Executions at a time, for each prompt."""
        return self.beams.width if self.beams else self.per_prompt


def choices_of(request: Request) -> Choices:
    n = within("n", request.n, 1, MAX_N, 1)
    best_of = within("best_of", request.best_of, 1, MAX_N, n)
    if best_of < n:
        raise bad(
            f"best_of must be greater than or equal to n, got n={n} and best_of={best_of}.",
            "best_of",
        )
    if request.use_beam_search:
        return Choices(n, n, _beams(request, best_of))
    if request.length_penalty not in (None, 1.0):
        text = "length_penalty is not effective and must be the default value of 1.0 when not using beam search."
        raise bad(text, "length_penalty")
    if request.early_stopping not in (None, False):
        raise bad(
            "early_stopping is not effective and must be False when not using beam search.",
            "early_stopping",
        )
    if is_greedy(request) and n > 1:
        raise bad(f"n must be 1 when using greedy sampling, got {n}.", "n")
    if is_greedy(request) and best_of > 1:
        raise bad(f"best_of must be 1 when using greedy sampling. Got {best_of}.", "best_of")
    if request.stream and best_of > n:
        raise bad(
            f"`best_of`={best_of} cannot be streamed with n={n}: the best are known only at the end.",
            "best_of",
        )
    return Choices(n, best_of)


_INEFFECTIVE: Final = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "logit_bias",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "stop",
)
"""Parameters that beam search would ignore, since it goes by the model's own log-probabilities and
by token ids."""
_OFF: Final[tuple[object, ...]] = (None, 0, [], {}, "")


def _beams(request: Request, width: int) -> Beams:
    if width == 1:
        raise bad("best_of must be greater than 1 when using beam search. Got 1.", "best_of")
    if width > MAX_WIDTH:
        raise bad(
            f"best_of must be at most {MAX_WIDTH} when using beam search. Got {width}.", "best_of"
        )
    if request.temperature is not None and not is_greedy(request):
        raise bad("temperature must be 0 when using beam search.", "temperature")
    if request.top_p not in (None, 1.0):
        raise bad("top_p must be 1 when using beam search.", "top_p")
    if request.top_k not in (None, -1, 0):
        raise bad("top_k must be -1 when using beam search.", "top_k")
    _check_effective(request)
    stopping = False if request.early_stopping is None else request.early_stopping
    if not isinstance(stopping, bool) and stopping != "never":
        raise bad(
            f"early_stopping must be True, False, or 'never' when using beam search. Got {stopping[:32]}.",
            "early_stopping",
        )
    penalty = within(
        "length_penalty", request.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY, 1.0
    )
    return Beams(width, penalty, stopping)


def _check_effective(request: Request) -> None:
    for name in _INEFFECTIVE:
        value = getattr(request, name)
        if value not in _OFF and not (name == "repetition_penalty" and value == 1.0):
            raise bad(f"`{name}` is not supported together with beam search.", name)
    if request.prompt_logprobs is not None:
        raise bad(
            "`prompt_logprobs` is not supported together with beam search.", "prompt_logprobs"
        )
