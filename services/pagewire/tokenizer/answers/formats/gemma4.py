"""Gemma 4: `call:NAME{key:value}`, with strings between `<|"|>` tokens."""

from ..format import AnswerFormat, BraceCalls

FORMAT = AnswerFormat(
    name="gemma4",
    parser_names=("gemma4",),
    calls=BraceCalls(begin="<|tool_call>", end="<tool_call|>", quote='<|"|>'),
    signs=("<|tool_call>",),
)
