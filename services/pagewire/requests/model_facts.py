"""What the owner of a request must know of the model, as the scheduler's roster tells it."""

from msgspec import Struct
from pagewire_protocol.messages import Roster
from pagewire_protocol.sampling import SamplingDefaults


class ModelFacts(Struct, frozen=True):
    """What a request must fit. The defaults mean: not known yet."""

    max_model_len: int = 0
    """The context, in tokens."""
    vocab_size: int = 0
    has_text: bool = True
    """False under --skip-tokenizer-init: token ids only."""
    has_chat_template: bool = True
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    longest_token: int = 0
    """Most characters of a text that one token can stand for; 0: any number."""
    has_reasoning: bool = False
    """Answers of chats begin with reasoning, or may."""
    tool_format: str = ""
    """How the model's answers call tools."""


def model_facts(roster: Roster) -> ModelFacts:
    """The model that the ready services of `roster` run."""
    return ModelFacts(
        roster.max_model_len,
        roster.vocab_size,
        roster.has_text,
        roster.has_chat_template,
        roster.eos_token_ids,
        roster.sampling_defaults,
        roster.longest_token,
        roster.has_reasoning,
        roster.tool_format,
    )
