"""`python -m pagewire.entrypoints.openai.run_batch -i FILE -o FILE --model X`: the spelling that
vLLM's guides use for `pagewire run-batch`."""

import sys

from ...cli import main as command


def main() -> int:
    return command(["run-batch", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
