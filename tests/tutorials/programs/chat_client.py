"""Chats with a model that takes no system message, and without its key; prints what came of each as
JSON.

python chat_client.py BASE_URL KEY MODEL
"""

import json
import sys

import openai
from openai import OpenAI

base_url, key, model = sys.argv[1:]
client = OpenAI(api_key=key, base_url=base_url, max_retries=0)
question = {"role": "user", "content": "Tell me in one sentence what Mexico is famous for"}
told = {"version": openai.__version__}
chat_response = client.chat.completions.create(model=model, messages=[question])
told["content"] = chat_response.choices[0].message.content
told["reason"] = chat_response.choices[0].finish_reason
try:
    client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": "You're a helpful assistant."}, question],
    )
except openai.BadRequestError as error:
    told["system"] = f"{type(error).__name__}: {error}"
    told["body"] = error.response.json()
try:
    OpenAI(api_key="EMPTY", base_url=base_url, max_retries=0).completions.create(
        model=model, prompt="JupySQL is", max_tokens=20
    )
except openai.AuthenticationError as error:
    told["keyless"] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
