"""The formats that are known, one a file, in the order in which their signs are looked for: the
more particular before the more common."""

from typing import Final

from ..format import AnswerFormat, Reasoning
from . import (
    deepseek_v3,
    deepseek_v31,
    deepseek_v32,
    functionary_v31,
    functionary_v32,
    functiongemma,
    gemma4,
    generic,
    glm45,
    gpt_oss,
    granite,
    hermes,
    kimi_k2,
    llama3_json,
    minimax_m1,
    minimax_m2,
    mistral,
    mistral_v11,
    olmo3,
    phi4_mini,
    pythonic,
    qwen3_coder,
)

GENERIC: Final = generic.FORMAT
FORMATS: Final[tuple[AnswerFormat, ...]] = (
    gpt_oss.FORMAT,
    minimax_m2.FORMAT,
    deepseek_v32.FORMAT,
    qwen3_coder.FORMAT,
    glm45.FORMAT,
    kimi_k2.FORMAT,
    deepseek_v3.FORMAT,
    deepseek_v31.FORMAT,
    mistral_v11.FORMAT,
    mistral.FORMAT,
    gemma4.FORMAT,
    functiongemma.FORMAT,
    granite.FORMAT,
    phi4_mini.FORMAT,
    minimax_m1.FORMAT,
    pythonic.FORMAT,
    olmo3.FORMAT,
    functionary_v31.FORMAT,
    functionary_v32.FORMAT,
    hermes.FORMAT,
    llama3_json.FORMAT,
    generic.FORMAT,
)
REASONING: Final[tuple[Reasoning, ...]] = (
    Reasoning("mistral", "[THINK]", "[/THINK]", ("mistral",)),
    Reasoning("kimi", "◁think▷", "◁/think▷", ("kimi",)),
    Reasoning("seed_oss", "<seed:think>", "</seed:think>", ("seed_oss",)),
    Reasoning("cohere", "<|START_THINKING|>", "<|END_THINKING|>", ("cohere_command3",)),
    Reasoning("gemma4", "<|channel>thought", "<channel|>", ("gemma4",)),
    Reasoning(
        "think",
        "<think>",
        "</think>",
        (
            "deepseek_r1",
            "qwen3",
            "deepseek_v3",
            "deepseek_v31",
            "glm45",
            "hunyuan_a13b",
            "holo2",
            "ernie45",
            "minimax_m2",
            "minimax_m2_append_think",
            "step3",
            "mimo",
            "nemotron_v3",
            "olmo3",
            "granite",
            "think",
        ),
    ),
    Reasoning("kimi_k2", "<think>", "</think>", ("kimi_k2",), calls_end_it=True),
)
"""How thinking is marked."""


def named_format(name: str) -> AnswerFormat | None:
    """The format that --tool-call-parser names."""
    return next((item for item in FORMATS if name in (item.name, *item.parser_names)), None)


def named_reasoning(name: str) -> Reasoning | None:
    """What --reasoning-parser names."""
    return next((item for item in REASONING if name in (item.name, *item.parser_names)), None)
