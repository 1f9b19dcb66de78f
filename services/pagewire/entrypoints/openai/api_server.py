"""`python -m pagewire.entrypoints.openai.api_server --model X`: the spelling that older guides use
for `pagewire serve`."""

import sys

from ...cli import main as command


def main() -> int:
    return command(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
