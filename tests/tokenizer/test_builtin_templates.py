"""Built-in chat templates: the text that each family was trained on, and which model gets which."""

import json
from pathlib import Path

import pytest
from pagewire.checkpoint import chat_templates
from pagewire.checkpoint.chat_templates import read_option
from pagewire.tokenizer.load import load
from pagewire.tokenizer.template import ChatTemplate, TemplateRefused
from pagewire_protocol.messages import Chat, ChatMessage

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "user_token": "<U>", "assistant_token": "<A>"}
TALK = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?")]
TOLD = [("system", "Be brief."), ("user", "Hi")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "vicuna": (
        f"<s>{VICUNA} USER: Hi ASSISTANT: Hello.</s>USER: Who? ASSISTANT:",
        "<s>Be brief. USER: Hi ASSISTANT:",
    ),
    "alpaca": (
        f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response:Hello.</s>\n\n### Instruction:\nWho?\n\n### Response:",
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:",
    ),
    "llama-2": (
        "<s>[INST] Hi [/INST] Hello. </s><s>[INST] Who? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    ),
    "chatglm2": (
        "[gMASK]<sop>[Round 1]\n\n问：Hi\n\n答：Hello.\n\n[Round 2]\n\n问：Who?\n\n答：",
        "[gMASK]<sop>Be brief.\n\n[Round 1]\n\n问：Hi\n\n答：",
    ),
    "chatglm3": (
        "[gMASK]<sop><|user|>\n Hi<|assistant|>\n Hello.<|user|>\n Who?<|assistant|>",
        "[gMASK]<sop><|system|>\n Be brief.<|user|>\n Hi<|assistant|>",
    ),
    "glm-4": (
        "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello.<|user|>\nWho?<|assistant|>",
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>",
    ),
    "phi-1_5": (
        "Alice: Hi\n\nBob: Hello.\n\nAlice: Who?\n\nBob:",
        "Be brief.\n\nAlice: Hi\n\nBob:",
    ),
    "phi-2": (
        "Instruct: Hi\nOutput: Hello.\nInstruct: Who?\nOutput:",
        "Be brief.\nInstruct: Hi\nOutput:",
    ),
    "baichuan": ("<U>Hi<A>Hello.<U>Who?<A>", "Be brief.<U>Hi<A>"),
}


def chat(messages: list[tuple[str, str]], **options) -> Chat:
    return Chat(tuple(ChatMessage(role, content) for role, content in messages), **options)


def test_every_template_is_tested():
    assert sorted(EXPECTED) == chat_templates.names()


@pytest.mark.parametrize("name", EXPECTED)
def test_text(name: str):
    template = ChatTemplate(read_option(name), NAMES)
    assert (template.render(chat(TALK)), template.render(chat(TOLD))) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_final_message_can_be_continued(name: str):
    found = ChatTemplate(read_option(name), NAMES).render(
        chat(
            [("user", "Hi"), ("assistant", "I am")],
            add_generation_prompt=False,
            continue_final_message=True,
        )
    )
    assert found.endswith("I am")


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "llama-2", "baichuan", "phi-1_5", "phi-2"])
def test_unknown_roles_are_refused(name: str):
    with pytest.raises(TemplateRefused, match=r"user and assistant.*system at the beginning"):
        ChatTemplate(read_option(name), NAMES).render(
            chat([("user", "Hi"), ("function", "x"), ("user", "y")])
        )


@pytest.mark.parametrize(
    ("folder", "config", "generation", "wanted"),
    [
        ("Qwen-1_8B-Chat", {"model_type": "qwen"}, {"chat_format": "chatml"}, "chatml"),
        ("Qwen-1_8B-Chat", {"model_type": "qwen"}, {}, "chatml"),
        ("Qwen-1_8B", {"model_type": "qwen"}, {"chat_format": "raw"}, ""),
        ("vicuna-7b-v1.5", {"model_type": "llama"}, {}, "vicuna"),
        ("alpaca-7b", {"model_type": "llama"}, {}, "alpaca"),
        (
            "models--meta-llama--Llama-2-7b-chat-hf/snapshots/0123",
            {"model_type": "llama"},
            {},
            "llama-2",
        ),
        ("Llama-2-7b-hf", {"model_type": "llama"}, {}, ""),
        ("m", {"model_type": "llama", "_name_or_path": "lmsys/vicuna-13b"}, {}, "vicuna"),
        ("m", {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm3-6b"}, {}, "chatglm3"),
        ("chatglm2-6b", {"model_type": "chatglm"}, {}, "chatglm2"),
        ("glm-4-9b-chat", {"model_type": "chatglm"}, {}, "glm-4"),
        ("chatglm3-6b-base", {"model_type": "chatglm"}, {}, ""),
        ("Baichuan2-7B-Chat", {"model_type": "baichuan"}, {"user_token_id": 195}, "baichuan"),
        ("Baichuan2-7B-Base", {"model_type": "baichuan"}, {}, ""),
        ("vicuna", {"model_type": "opt"}, {}, ""),
        ("models--microsoft--phi-1_5/snapshots/0123", {"model_type": "phi"}, {}, "phi-1_5"),
        ("phi-2", {"model_type": "phi"}, {}, "phi-2"),
        ("phi-1", {"model_type": "phi"}, {}, ""),
    ],
)
def test_which_model_gets_which(folder: str, config: dict, generation: dict, wanted: str):
    assert chat_templates.choose(Path("/models") / folder, config, generation) == wanted


def test_a_template_of_the_repository_comes_first(tmp_path: Path, bpe):
    path = tmp_path / "vicuna-tiny"
    path.mkdir()
    bpe.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load(path).chat_template == chat_templates.source("vicuna")
    (path / "chat_template.jinja").write_text("its own")
    assert load(path).chat_template == "its own"
