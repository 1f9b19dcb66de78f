"""How many answers a request wants, and found in which way: n, the best of several, or beam search,
under the rules and in the words that vLLM's SamplingParams had for them."""

from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace
from pagewire_protocol.sampling import GREEDY_BELOW, Sampling

from .beam_search import MAX_WIDTH, EarlyStopping
from .errors import invalid
from .parameters import PARAMETERS, checked
from .seeds import choice_seed


class BeamOptions(Struct, frozen=True):
    """What a beam search has beside a request's sampling: `count` is how many hypotheses to return.
    Where there are fewer, the search fails, unless `fewer_allowed`."""

    width: int
    count: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    fewer_allowed: bool = False


class Choices(Struct, frozen=True):
    """`per_prompt` answers are generated for each prompt, the best `n` of them returned."""

    n: int
    per_prompt: int
    beams: BeamOptions | None = None

    @property
    def executions(self) -> int:
        """How many run at a time, for each prompt."""
        return self.beams.width if self.beams else self.per_prompt

    @property
    def ranked(self) -> bool:
        """The best of several: ranking needs the log-probabilities of their tokens."""
        return self.per_prompt > self.n


def choices_of(source: object) -> Choices:
    """Read from the attributes of `source` that are named as the parameters; one that is missing
    counts as None. Raises RequestError."""
    n: int = checked(PARAMETERS["n"], getattr(source, "n", None))
    best_of: int = checked(PARAMETERS["best_of"], getattr(source, "best_of", None)) or n
    if best_of < n:
        raise invalid(
            f"best_of must be greater than or equal to n, got n={n} and best_of={best_of}.",
            "best_of",
        )
    if getattr(source, "use_beam_search", None):
        return Choices(n, n, _beams(source, n, best_of))
    _check_no_beam_options(source)
    if n > 1 and is_greedy(source):
        raise invalid(f"n must be 1 when using greedy sampling, got {n}.", "n")
    if best_of > 1 and is_greedy(source):
        # No space after the full stop: people search for vLLM's words as they are.
        raise invalid(f"best_of must be 1 when using greedy sampling.Got {best_of}.", "best_of")
    return Choices(n, best_of)


def is_greedy(source: object) -> bool:
    """Whether a request says so itself: no temperature means the default one."""
    temperature = getattr(source, "temperature", None)
    return temperature is not None and temperature < GREEDY_BELOW


def samplings_of(
    sampling: Sampling, choices: Choices, base: int, *, score_each: bool = False
) -> list[Sampling]:
    """What each choice of one prompt runs with, its seed derived from `base`. The prompt is scored
    once, by the first choice, unless `score_each`: the choices of a stream wait for no other. A
    beam search is one job, whatever its width."""
    if choices.beams:
        return [replace(sampling, seed=base)]
    if choices.ranked and sampling.logprobs < 0:
        sampling = replace(sampling, logprobs=0)
    scored = sampling.prompt_logprobs
    return [
        replace(
            sampling,
            seed=choice_seed(base, choice),
            prompt_logprobs=scored if choice == 0 or score_each else -1,
        )
        for choice in range(choices.per_prompt)
    ]


def _check_no_beam_options(source: object) -> None:
    if getattr(source, "early_stopping", None) not in (None, False):
        raise invalid(
            "early_stopping is not effective and must be False when not using beam search.",
            "early_stopping",
        )
    if getattr(source, "length_penalty", None) not in (None, 1.0):
        raise invalid(
            "length_penalty is not effective and must be the default value of 1.0 "
            "when not using beam search.",
            "length_penalty",
        )


def _beams(source: object, n: int, width: int) -> BeamOptions:
    if width == 1:
        raise invalid("best_of must be greater than 1 when using beam search. Got 1.", "best_of")
    if width > MAX_WIDTH:
        raise invalid(
            f"best_of must be at most {MAX_WIDTH} when using beam search. Got {width}.", "best_of"
        )
    if getattr(source, "temperature", None) is not None and not is_greedy(source):
        raise invalid("temperature must be 0 when using beam search.", "temperature")
    if getattr(source, "top_p", None) not in (None, 1.0):
        raise invalid("top_p must be 1 when using beam search.", "top_p")
    if getattr(source, "top_k", None) not in (None, -1, 0):
        raise invalid("top_k must be -1 when using beam search.", "top_k")
    for parameter in PARAMETERS.values():
        if parameter.ignored_by_beams and not _is_neutral(source, parameter.name):
            raise invalid(
                f"`{parameter.name}` is not supported together with beam search.", parameter.name
            )
    return BeamOptions(
        width,
        n,
        float(checked(PARAMETERS["length_penalty"], getattr(source, "length_penalty", None))),
        early_stopping_of(getattr(source, "early_stopping", None)),
    )


_EMPTY: Final[tuple[Any, ...]] = ([], {}, (), "")


def _is_neutral(source: object, name: str) -> bool:
    value = getattr(source, name, None)
    return value is None or value == PARAMETERS[name].default or value in _EMPTY


def early_stopping_of(value: Any) -> EarlyStopping:
    """Raises RequestError."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if value != "never":
        raise invalid(
            f"early_stopping must be True, False, or 'never', got {str(value)[:32]}.",
            "early_stopping",
        )
    return "never"
