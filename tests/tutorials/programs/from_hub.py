"""A model by its repository's name, revision and a directory for downloads; prints whether it
generated.

python from_hub.py REPOSITORY REVISION DIRECTORY
"""

import sys

from pagewire import LLM, SamplingParams

repository, revision, directory = sys.argv[1:]
llm = LLM(model=repository, revision=revision, download_dir=directory, load_format="auto")
(output,) = llm.generate("Hello", SamplingParams(max_tokens=3, ignore_eos=True))
print(len(output.outputs[0].token_ids))
