"""langchain-openai, as the tutorials use it: invoke, stream, batch, chains."""

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_openai import ChatOpenAI, OpenAI


def chat(endpoint: Any, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=endpoint.base, api_key=endpoint.key, model=endpoint.model, max_retries=0, **options
    )


def test_a_chat_is_invoked(endpoint: Any) -> None:
    result = chat(endpoint, max_tokens=16).invoke(input="你可以做什么？")
    assert result.content and result.response_metadata["finish_reason"] == "length"
    assert result.usage_metadata["output_tokens"] == 16


def test_a_chat_is_streamed(endpoint: Any) -> None:
    llm = chat(endpoint, max_tokens=16, temperature=0, stream_usage=True)
    pieces = list(llm.stream("What can you do?"))
    assert (
        "".join(piece.content for piece in pieces) == llm.invoke("What can you do?").content != ""
    )
    assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) == 16


def test_chats_run_in_batches_and_without_waiting(endpoint: Any) -> None:
    llm = chat(endpoint, max_tokens=8)
    assert all(result.content for result in llm.batch([f"Question {i}" for i in range(8)]))
    assert asyncio.run(llm.ainvoke("And one more")).content


def test_a_chain_with_a_key(guarded: Any) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "Tell me about {topic}")]) | chat(
        guarded, max_tokens=8
    )
    assert chain.invoke({"topic": "Mexico"}).content
    system = ChatPromptTemplate.from_messages(
        [("system", "Be brief."), ("human", "{topic}")]
    ) | chat(guarded, max_tokens=8)
    with pytest.raises(openai.BadRequestError, match="System role not supported"):
        system.invoke({"topic": "Mexico"})


def test_a_completion_model(endpoint: Any) -> None:
    llm = OpenAI(
        base_url=endpoint.base,
        api_key=endpoint.key,
        model=endpoint.model,
        max_tokens=8,
        temperature=0,
        max_retries=0,
    )
    chain = (
        PromptTemplate.from_template("Question: {question}\n\nAnswer: Let's think step by step.")
        | llm
    )
    whole = chain.invoke({"question": "What is machine learning?"})
    assert whole and "".join(chain.stream({"question": "What is machine learning?"})) == whole
