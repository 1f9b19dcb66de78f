"""How the answer to one HTTP request is shown, whatever is run for it."""

from typing import Literal

from msgspec import Struct


class Rendering(Struct, frozen=True, kw_only=True):
    """What a client asked for beside the generation itself. `per_prompt` choices come for each
    prompt, the best `n` of them are shown."""

    chat: bool
    n: int
    per_prompt: int
    stream: bool
    include_usage: bool
    """A stream reports token counts in an event of their own at its end."""
    continuous_usage_stats: bool
    """As the client sent it; see `continuous_usage`."""
    logprobs: int
    """Candidates to show for each token; -1: no log-probabilities."""
    prompt_logprobs: int
    """The same for the prompt's tokens, in vLLM's shape."""
    return_token_ids: bool
    ids_as_text: bool
    """Tokens are called `token_id:123` in log-probabilities."""
    echo: bool = False
    """The prompt comes before the text, and its log-probabilities before the text's."""
    role: str = "assistant"
    api: Literal["openai", "responses", "messages"] = "openai"
    """Whose form the answer of a chat has."""
    echoed: bytes = b""
    """A JSON object with what an answer of the Responses API repeats of its request."""
    namespaces: dict[str, tuple[str, str]] = {}
    """Namespace and name of functions there, by the names that the model sees."""
    has_parts: bool = False
    """The answer comes in parts: reasoning, content, tool calls."""
    include_reasoning: bool = True
    """The reasoning is shown."""
    prefix: str = ""
    """What a chat's answer begins with: the message that it continues, under `echo`."""

    @property
    def continuous_usage(self) -> bool:
        """Each event of a stream reports the counts so far: only beside those at its end."""
        return self.include_usage and self.continuous_usage_stats

    @property
    def scores_echo(self) -> bool:
        """The echoed prompt comes with log-probabilities."""
        return self.echo and self.logprobs >= 0
