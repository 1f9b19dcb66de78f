"""Prompts that are varied in script, form and length, for comparisons with transformers. Knows
neither tests nor models."""

from typing import Any

TOPICS = (
    "the sea", "a clock", "winter", "bread", "the moon", "a bridge", "rivers", "a letter", "glass", "trains", "honey", "a garden", "maps",
    "the desert", "music", "stones",
)  # fmt: skip
FIXED = (
    "Once upon a time",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "法国的首都是哪里？请用一句话回答。",
    "今天天气很好，我们去公园散步，看到了很多花。",
    "🙂🙃😉 What do these emoji mean? 🎉🚀",
    "SELECT name, COUNT(*) FROM users GROUP BY name HAVING",
    "1, 1, 2, 3, 5, 8, 13,",
    "Ünïcödé çharacters — “quotes” … naïve café",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "   leading spaces and\t\ttabs\n\n\nand blank lines",
    "for (int i = 0; i < 10; i++) {",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "Q: What is 17 + 25?\nA:",
    "Привет, как дела? Меня зовут",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows):\n",
    "A",
)
OPENINGS = ("Write two sentences about {}.", "{} was first", "Dear friend, yesterday {}")
SHORT = [*FIXED, *(opening.format(topic) for topic in TOPICS for opening in OPENINGS)][:62]
LONG_TOKENS = 2000

Tokens = list[int]


def long_text(tokenizer: Any) -> Tokens:
    """More than LONG_TOKENS + 100 tokens."""
    return tokenizer(" ".join(SHORT) * 4).input_ids


def greedy_prompts(tokenizer: Any) -> list[Tokens]:
    """64 different ones, the last two of LONG_TOKENS."""
    long = long_text(tokenizer)
    made = [tokenizer(text).input_ids for text in SHORT] + [
        long[:LONG_TOKENS],
        long[100 : 100 + LONG_TOKENS],
    ]
    assert len(made) == 64 and len({tuple(ids) for ids in made}) == 64
    return made
