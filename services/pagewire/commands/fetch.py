"""`pagewire fetch`: a model downloaded ahead of time."""

import signal
import sys

from ..cli import HUB_FILES, add_model, hide, new_parser, read_all, take_model, unread
from ..config import ModelConfig, add_flags
from ..hub import huggingface
from ..process.errors import EXPECTED, error_line
from ..process.parent import REASON_IN_OUTPUT, Started, die_with_parent


def main(arguments: list[str]) -> int:
    """`pagewire fetch`: prints the path of the model's files, and of the tokenizer's where they are
    others. A launcher that started it reads from its output why it failed too, and says so last."""
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = new_parser("fetch", "Download a model and print where its files are.")
    add_model(parser)
    add_flags(parser, ModelConfig)
    hide(parser, unread({ModelConfig: HUB_FILES}))
    options = parser.parse_args(arguments)
    take_model(parser, options)
    model: ModelConfig = read_all(parser.error, (ModelConfig,), options)[0]

    try:
        _print_places(model)
    except EXPECTED as error:
        if not Started.by_parent:
            raise
        print(error_line(error))
        return REASON_IN_OUTPUT
    return 0


def _print_places(model: ModelConfig) -> None:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    print(huggingface.resolve(model, say))
    if huggingface.has_own_tokenizer(model) and not model.skip_tokenizer_init:
        print(huggingface.resolve(huggingface.tokenizer_model(model), say))
