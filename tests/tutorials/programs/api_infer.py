"""The first model that a server lists, asked for a text with no more than a prompt. The server's
URL is the argument."""

import sys

from openai import OpenAI

client = OpenAI(api_key="EMPTY", base_url=sys.argv[1])
model = client.models.list().data[0].id
prompt = "描述一下北京的秋天"
completion = client.completions.create(model=model, prompt=prompt)
res = completion.choices[0].text.strip()
print(f"Model: {model}\nPrompt: {prompt}\nResponse: {res!r}")
print(f"Reason: {completion.choices[0].finish_reason}, {completion.usage.completion_tokens}")
