"""Two questions to a chat model as plain prompts, printed as the tutorial prints them. The model's
directory is the argument."""

import sys

from pagewire import LLM, SamplingParams

prompts = ["你好，你是谁？", "法国的首都在哪里？"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=100)
llm = LLM(model=sys.argv[1], trust_remote_code=True, max_model_len=4096)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
