"""gpt-oss, in OpenAI's harmony format."""

from ..format import AnswerFormat, HarmonyCalls

FORMAT = AnswerFormat(
    name="gpt_oss",
    parser_names=("openai", "gpt-oss", "gpt_oss", "harmony"),
    calls=HarmonyCalls(),
    signs=("<|channel|>", "<|message|>"),
)
