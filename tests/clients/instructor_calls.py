"""What instructor asks of a server in each of its modes that mean OpenAI's and Anthropic's APIs; run by
test_agents.py with the versions that it wants. Prints the outcome of each mode as JSON.

A mode whose form stands in the prompt alone gets what the model likes to write: its request must be
answered, and what is wrong must be found by instructor itself.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any, Literal

import anthropic
import instructor
import openai
from instructor.v2.core.mode import Mode
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather."""

    unit: Literal["celsius", "fahrenheit"]
    days: Literal[1, 2, 3]


ASK: list[Any] = [{"role": "user", "content": "What is the weather?"}]
OPENAI = (
    Mode.TOOLS,
    Mode.TOOLS_STRICT,
    Mode.PARALLEL_TOOLS,
    Mode.JSON_SCHEMA,
    Mode.JSON,
    Mode.MD_JSON,
    Mode.RESPONSES_TOOLS,
    Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS,
)
ANTHROPIC = (
    Mode.ANTHROPIC_TOOLS,
    Mode.ANTHROPIC_PARALLEL_TOOLS,
    Mode.ANTHROPIC_REASONING_TOOLS,
    Mode.ANTHROPIC_JSON,
)
PARALLEL = (Mode.PARALLEL_TOOLS, Mode.ANTHROPIC_PARALLEL_TOOLS)


def outcome(client: Any, mode: Mode) -> str:
    """`right`, or what was raised, the cause first."""
    options: dict[str, Any] = {"messages": ASK, "max_retries": 0, "max_tokens": 400}
    model: Any = Iterable[Weather] if mode in PARALLEL else Weather
    try:
        answer = client.create(model="caller", response_model=model, **options)
        answers = list(answer) if mode in PARALLEL else [answer]
        assert answers and all(isinstance(item, Weather) for item in answers)
    except Exception as error:
        causes = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        return " < ".join(f"{type(cause).__name__}: {str(cause)[:200]}" for cause in causes[::-1])
    return "right"


def main() -> None:
    url = sys.argv[1]
    by_openai = openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0)
    by_anthropic = anthropic.Anthropic(base_url=url, api_key="EMPTY", max_retries=0)
    outcomes: dict[str, str] = {}
    for mode in OPENAI:
        shaped = instructor.from_openai(by_openai, mode=mode)
        outcomes[mode.name] = outcome(shaped, mode)
    for mode in ANTHROPIC:
        shaped = instructor.from_anthropic(by_anthropic, mode=mode)
        outcomes[mode.name] = outcome(shaped, mode)
    shaped = instructor.from_openai(by_openai, mode=Mode.TOOLS)
    pieces = list(
        shaped.create_partial(
            model="caller", messages=ASK, response_model=Weather, max_retries=0, max_tokens=400
        )
    )
    outcomes["a stream"] = "right" if Weather.model_validate(pieces[-1].model_dump()) else "wrong"
    print(json.dumps({"versions": [openai.__version__, instructor.__version__], **outcomes}))


if __name__ == "__main__":
    main()
