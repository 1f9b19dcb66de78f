"""`python -m pagewire.entrypoints.openai.api_server --model X`: the spelling that older guides use for `pagewire serve`."""

import sys

from ...cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
