"""`pagewire fetch`: a model downloaded ahead of time."""

import signal
import sys

from ..cli import add_model, new_parser, read_all, take_model
from ..config import ModelConfig, add_flags
from ..hub import huggingface
from ..process.parent import die_with_parent


def main(arguments: list[str]) -> int:
    """`pagewire fetch`: prints the path of the model's files, and of the tokenizer's where they are
    others."""
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = new_parser("fetch", "Download a model and print where its files are.")
    add_model(parser)
    add_flags(parser, ModelConfig)
    options = parser.parse_args(arguments)
    take_model(parser, options)
    model: ModelConfig = read_all(parser.error, (ModelConfig,), options)[0]

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    print(huggingface.resolve(model, say))
    if huggingface.has_own_tokenizer(model):
        print(huggingface.resolve(huggingface.tokenizer_model(model), say))
    return 0
