"""`import pagewire.as_vllm`: programs and libraries that were written for vLLM, unchanged. Each in
a process of its own."""

import subprocess
import sys

import pytest
from printed import printed_text

NAMES = """
import pagewire.as_vllm, sys
assert not {"torch", "transformers", "zmq", "pagewire.offline.llm"} & set(sys.modules)
import vllm
import vllm.outputs, vllm.entrypoints.openai.api_server
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.entrypoints.llm import LLM as Same
from vllm.inputs import TextPrompt
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import BeamSearchParams
import pagewire, pagewire.as_vllm
assert LLM is Same is pagewire.LLM and SamplingParams is pagewire.SamplingParams and RequestOutput is pagewire.RequestOutput
from packaging.version import Version
assert vllm.__version__ == vllm.version.__version__ and Version("0.10") < Version(vllm.__version__) < Version("1")
assert vllm.__pagewire_version__ == pagewire.__version__ and BeamSearchParams(2, 3).beam_width == 2
import vllm.entrypoints.openai.run_batch
assert callable(vllm.entrypoints.openai.run_batch.main)
assert callable(vllm.entrypoints.openai.api_server.main) and TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]}
for broken in ("vllm.no_such", "from vllm import AsyncLLMEngine", "import vllm.lora"):
    try:
        exec(broken)
    except (AttributeError, ImportError) as error:
        assert "no_such" in str(error) or "AsyncLLMEngine" in str(error) or "vllm.lora" in str(error), error
    else:
        raise AssertionError(broken)
"""
TUTORIAL = """
import pagewire.as_vllm
from vllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is"]
if __name__ == "__main__":
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=4, stop_token_ids=[151329, 151336, 151338])
    llm = LLM(model=MODEL, tokenizer=None, max_model_len=256, trust_remote_code=True, tensor_parallel_size=1, gpu_memory_utilization=0.9)
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""
LANGCHAIN = """
import warnings
import pagewire.as_vllm
warnings.simplefilter("ignore")
from langchain_community.llms import VLLM
from langchain_core.prompts import PromptTemplate

if __name__ == "__main__":
    kwargs = {"max_model_len": 256, "swap_space": 4}
    sampling = {"max_new_tokens": 8, "top_k": 10, "top_p": 0.95, "temperature": 0}
    llm = VLLM(model=MODEL, trust_remote_code=True, dtype="float32", vllm_kwargs=kwargs, **sampling)
    print(repr(llm.invoke("The capital of France is")))
    print(repr(llm.invoke("1, 2, 3, 4,", stop=["7"])))
    chain = PromptTemplate.from_template("The capital of {country} is") | llm
    print(chain.batch([{"country": "France"}, {"country": "Italy"}]))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    from pagewire.config import DEMO_MODEL

    source = f"MODEL = {DEMO_MODEL!r}\n{program}"
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False
    )


def test_names_and_nothing_heavy_before_they_are_used() -> None:
    result = run(NAMES)
    assert result.returncode == 0, result.stderr


def test_the_tutorials_program() -> None:
    result = run(TUTORIAL)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    printed_text(first, "Prompt: 'Hello, my name is', Generated text: ")
    printed_text(second, "Prompt: 'The capital of France is', Generated text: ")
    assert "Processed prompts: 100%" in result.stderr
    lines = result.stderr.splitlines()
    ready = next(number for number, line in enumerate(lines) if line.startswith("ready in "))
    assert any(line.startswith("worker ") for line in lines[:ready])


def test_langchain_s_own_class() -> None:
    pytest.importorskip("langchain_community")
    result = run(LANGCHAIN)
    assert result.returncode == 0, result.stderr
    paris, count, both = result.stdout.splitlines()
    assert "Paris" in paris and count == "' 5, 6, '" and "Paris" in both and "Rome" in both
    assert "swap_space=4 has no effect" in result.stderr


def test_the_real_one_is_not_replaced_behind_its_back() -> None:
    result = run(
        "import sys, types\nsys.modules['vllm'] = types.ModuleType('vllm')\nimport pagewire.as_vllm"
    )
    assert result.returncode == 1 and "vllm itself is already imported" in result.stderr
