"""Prompts through a function that makes its own LLM, with ModelScope as the place to download from.
The model is the argument."""

import os
import sys

from pagewire import LLM, SamplingParams

os.environ["VLLM_USE_MODELSCOPE"] = "True"


def get_completion(
    prompts, model, tokenizer=None, max_tokens=512, temperature=0.8, top_p=0.95, max_model_len=2048
):
    stop_token_ids = [151329, 151336, 151338]
    sampling_params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop_token_ids=stop_token_ids
    )
    llm = LLM(model=model, tokenizer=tokenizer, max_model_len=max_model_len, trust_remote_code=True)
    return llm.generate(prompts, sampling_params)


if __name__ == "__main__":
    text = ["你好，帮我介绍一下什么时大语言模型。", "可以给我将一个有趣的童话故事吗？"]
    outputs = get_completion(
        text,
        sys.argv[1],
        tokenizer=None,
        max_tokens=512,
        temperature=1,
        top_p=1,
        max_model_len=2048,
    )
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
