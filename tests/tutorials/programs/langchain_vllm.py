"""LangChain's own class for vLLM, unchanged, over Pagewire: one call, and a chain with a template.

`langchain.prompts` and `langchain.chains` are called langchain_classic since LangChain 1.0.
"""

import warnings

import pagewire.as_vllm  # noqa: F401

warnings.simplefilter("ignore")

from langchain_classic.chains import LLMChain  # noqa: E402
from langchain_classic.prompts import PromptTemplate  # noqa: E402
from langchain_community.llms import VLLM  # noqa: E402

llm = VLLM(
    model="microsoft/phi-1_5",
    trust_remote_code=True,
    max_new_tokens=128,
    top_k=10,
    top_p=0.95,
    temperature=0.8,
)
response = llm.invoke("What is the capital of France?")
print(repr(response))

template = """Question: {question}

Answer: Let's think step by step."""
prompt = PromptTemplate(template=template, input_variables=["question"])
chain = LLMChain(prompt=prompt, llm=llm)
result = chain.run("What is machine learning?")
print(repr(result))
