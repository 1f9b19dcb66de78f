"""SamplingParams and BeamSearchParams: how a program says what it wants generated, with vLLM's
names, defaults and order, past and present.

Values are checked when the object is made, by the table that HTTP requests are checked by, so that
a mistake is an error at its own line and not an answer from a service.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pagewire_protocol.grammar import Grammar
from pagewire_protocol.sampling import GREEDY_BELOW

from ..requests.choices import early_stopping_of
from ..requests.errors import RequestError
from ..requests.grammars import structured_grammar
from ..requests.parameters import BEAM_WIDTH, PARAMETERS, checked, effective_temperature
from ..requests.sampling import check_parameters
from ..requests.seeds import NO_SEED

UNSUPPORTED = ("logits_processors", "extra_args")
"""Known elsewhere, not here: refused by name unless they are None or empty."""


@dataclass
class StructuredOutputsParams:
    """What an answer must match: exactly one of the first six. Raises ValueError."""

    json: str | dict[str, Any] | None = None
    """A JSON schema, as text or as an object."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """In GBNF (`name ::= ...`) or in llguidance's Lark dialect."""
    json_object: bool | None = None
    disable_fallback: bool = False
    """Accepted: there is no other way to fall back to."""
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    """What may stand between the parts of JSON: by default at most four spaces, tabs and line
    ends."""
    structural_tag: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        grammar_of(self, "structured_outputs")


@dataclass
class GuidedDecodingParams(StructuredOutputsParams):
    """StructuredOutputsParams under its former name."""

    backend: str | None = None
    """Accepted: there is one."""
    backend_was_auto: bool = False

    @staticmethod
    def from_optional(
        json: Any = None,
        regex: str | None = None,
        choice: list[str] | None = None,
        grammar: str | None = None,
        json_object: bool | None = None,
        backend: str | None = None,
        whitespace_pattern: str | None = None,
        structural_tag: str | None = None,
    ) -> "GuidedDecodingParams | None":
        """None where nothing is asked for."""
        forms = (json, regex, choice, grammar, json_object, structural_tag)
        if not any(form is not None and form is not False for form in forms):
            return None
        return GuidedDecodingParams(
            json=json,
            regex=regex,
            choice=choice,
            grammar=grammar,
            json_object=json_object,
            whitespace_pattern=whitespace_pattern,
            structural_tag=structural_tag,
            backend=backend,
        )


def grammar_of(outputs: object, param: str) -> Grammar | None:
    """Of StructuredOutputsParams, or what has its attributes. Raises ValueError."""
    try:
        return structured_grammar(outputs, param)
    except RequestError as error:
        raise ValueError(error.message) from None


@dataclass
class SamplingParams:
    """Raises ValueError naming the field, its value and its bounds."""

    n: int = 1
    best_of: int | None = None
    """So many are generated and the `n` with the highest cumulative log-probability returned, best
    first. With beam search the width."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 and 0 are off."""
    min_p: float = 0.0
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as the context holds."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    seed: int | None = None
    """None and -1: one for each prompt, drawn from the engine's seed, so a program that is run
    again gets the same. Further choices derive theirs from it."""
    min_tokens: int = 0
    detokenize: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    """Keep the last so many tokens of the prompt; -1: as many as the context holds beside
    max_tokens."""
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[Any] | None = None
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    guided_decoding: GuidedDecodingParams | dict[str, Any] | None = None
    """`structured_outputs` under its former name; one of the two."""
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r:.80} is not supported in this version"
                )
        if isinstance(self.structured_outputs, dict):
            self.structured_outputs = StructuredOutputsParams(**self.structured_outputs)
        if isinstance(self.guided_decoding, dict):
            self.guided_decoding = GuidedDecodingParams(**self.guided_decoding)
        if self.structured_outputs is not None and self.guided_decoding is not None:
            raise ValueError("structured_outputs and guided_decoding exclude each other")
        self.grammar()
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(self.stop_token_ids or ())
        self.bad_words = list(self.bad_words or ()) or None
        self.seed = None if self.seed == NO_SEED else self.seed
        try:
            check_parameters(self)
        except RequestError as error:
            raise ValueError(error.message) from None
        bias = self.logit_bias or {}
        self.logit_bias = {int(token): float(value) for token, value in bias.items()} or None
        self.temperature = effective_temperature(self.temperature)

    def grammar(self) -> Grammar | None:
        """What the answer must match. Raises ValueError."""
        if self.guided_decoding is not None:
            return grammar_of(self.guided_decoding, "guided_decoding")
        return grammar_of(self.structured_outputs, "structured_outputs")

    def stopping_at(self, tokens: Iterable[int]) -> "SamplingParams":
        """A copy that ends a text at `tokens` as well, unless it goes on behind all ends."""
        if self.ignore_eos:
            return self
        stops = dict.fromkeys((*(self.stop_token_ids or ()), *tokens))
        return replace(self, stop_token_ids=list(stops))

    def clone(self) -> "SamplingParams":
        """A copy that shares nothing with this object."""
        return copy.deepcopy(self)


@dataclass
class BeamSearchParams:
    """Of `LLM.beam_search`. Raises ValueError naming the field, its value and its bounds."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | Literal["never"] = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        try:
            checked(BEAM_WIDTH, self.beam_width)
            checked(PARAMETERS["max_tokens"], self.max_tokens)
            checked(PARAMETERS["length_penalty"], self.length_penalty)
            early_stopping_of(self.early_stopping)
        except RequestError as error:
            raise ValueError(error.message) from None
        if self.temperature >= GREEDY_BELOW:
            raise ValueError(
                f"temperature={self.temperature}: beams follow the model's own log-probabilities, so only 0 is supported"
            )
