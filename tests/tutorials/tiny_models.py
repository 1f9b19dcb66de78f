"""The tutorials' models in small: the same architectures, files and tokenizers under the same
names, with random weights.

They are put where a download would have put them: in a Hugging Face cache, or in plain directories.
What they say means nothing; how it is said, where it ends and what is refused is what a reader of a
tutorial sees.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from worker import format_packers
from worker.remote_oracles import CASES, shapes

TEXT = Path(__file__).parents[2] / "LICENSE"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2, "max_position_embeddings": 2048}
GEMMA = {"head_dim": 32, "max_position_embeddings": 8192}
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}"
    "<｜{{ m['role'] | capitalize }}｜>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
HUB: dict[str, dict[str, Any]] = {
    # repository: family, what its configuration differs in, special tokens, chat template, form of
    # the tokenizer, type
    "facebook/opt-125m": {
        "family": "OPT",
        "config": OPT,
        "special": ("<pad>", "</s>", "</s2>"),
        "files": "gpt2",
        "dtype": "float32",
    },
    "google/gemma-2b": {"family": "Gemma", "config": GEMMA, "special": ("<pad>", "<bos>", "<eos>")},
    "google/gemma-2b-it": {
        "family": "Gemma",
        "config": GEMMA,
        "special": ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "template": GEMMA_TEMPLATE,
    },
    "microsoft/phi-1_5": {
        "family": "Phi",
        "config": {"max_position_embeddings": 2048, "num_key_value_heads": 4},
    },
    "mistralai/Mistral-7B-v0.1": {
        "family": "Mistral",
        "config": {"max_position_embeddings": 32768, "sliding_window": 4096},
    },
    "meta-llama/Llama-2-7b-chat-hf": {
        "family": "Llama",
        "config": {"max_position_embeddings": 4096},
        "special": ("<unk>", "<s>", "</s>"),
    },
    "TheBloke/Llama-2-7B-Chat-AWQ": {
        "family": "Llama",
        "config": {"max_position_embeddings": 4096},
        "special": ("<unk>", "<s>", "</s>"),
        "awq": True,
    },
    "gpt2": {
        "family": "GPT2",
        "config": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024},
        "files": "gpt2",
    },
    "Qwen/Qwen2-7B-Instruct": {
        "family": "Qwen2",
        "config": {"max_position_embeddings": 32768},
        "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "template": CHATML,
        "files": "qwen2",
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        "family": "Qwen2",
        "config": {"max_position_embeddings": 131072},
        "special": (
            "<pad>",
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
        ),
        "template": DEEPSEEK,
    },
}
CAUSAL = {"GPT2": "GPT2LMHeadModel"}
QWEN_SPECIAL = 208
CHAT_ENDS = 24
"""So many tokens end an answer of a chat model: one with random weights would else talk until its
context is full."""


def corpus() -> list[str]:
    """What tokenizers are trained on: a text that does not change, so that the same is said each
    time."""
    return TEXT.read_text().splitlines()


def bytes_bpe(special: tuple[str, ...]) -> Tokenizer:
    """Byte-level; any text comes back whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marked = [AddedToken(token, normalized=False, special=True) for token in special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=marked, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def save_tokenizer(
    path: Path, special: tuple[str, ...], template: str = "", files: str = ""
) -> int:
    """The tokenizer's files in `path`; gives the size of the vocabulary."""
    tokenizer = bytes_bpe(special)
    settings: dict[str, Any] = {
        "bos_token": special[1],
        "eos_token": special[2],
        "pad_token": special[0],
    }
    if template:
        settings["chat_template"] = template
    if files:
        tokenizer.model.save(str(path))
        settings["tokenizer_class"] = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}[files]
        settings["unk_token"] = special[2]
    else:
        tokenizer.save(str(path / "tokenizer.json"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def save_model(path: Path, repository: str) -> Path:
    """The files of `repository`, small, in `path`."""
    import transformers

    made = HUB[repository]
    special = made.get("special", ("<|pad|>", "<|start|>", "<|endoftext|>"))
    path.mkdir(parents=True)
    vocabulary = save_tokenizer(path, special, made.get("template", ""), made.get("files", ""))
    torch.manual_seed(7)
    family, kind = made["family"], getattr(torch, made.get("dtype", "bfloat16"))
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, "vocab_size": vocabulary, **made["config"]}
    )
    config.name_or_path = repository
    model = getattr(transformers, CAUSAL.get(family, f"{family}ForCausalLM"))(config).to(kind)
    chats = "template" in made or any(word in repository for word in ("chat", "phi"))
    model.generation_config.eos_token_id = [2, *range(10, 10 + CHAT_ENDS)] if chats else 2
    model.save_pretrained(path)
    if "awq" in made:
        quantize_with_awq(path)
    return path


def quantize_with_awq(path: Path) -> None:
    """Random codes in the place of the matrices, and the configuration in a file of its own, as
    AutoAWQ's first versions saved it."""
    random = np.random.default_rng(7)
    tensors = load_file(path / "model.safetensors")
    for name in sorted(tensors):
        if name.endswith("_proj.weight"):
            parts, _ = format_packers.awq(random, *tensors.pop(name).shape)
            tensors |= format_packers.on_module(parts, name.removesuffix(".weight"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (path / "quant_config.json").write_text(json.dumps(settings))


def in_hub_cache(home: Path, repository: str) -> Path:
    """`repository` where huggingface_hub keeps it, under HF_HOME; gives the snapshot."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abc")
    return save_model(folder / "snapshots" / "0123abc", repository)


def save_remote(path: Path, case: str, vocabulary: int, **changes: Any) -> Path:
    """A checkpoint of a family whose code lives in its repository, with any number of tokens."""
    config = CASES[case][1] | changes
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in shapes(config).items():
        noise = (
            torch.randn(
                tuple(vocabulary if size == 257 else size for size in shape), generator=generator
            )
            * 0.2
        )
        weights[name] = 1 + noise if len(shape) == 1 and not name.endswith("bias") else noise
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(
        json.dumps(config | {"vocab_size": vocabulary, "padded_vocab_size": vocabulary})
    )
    return path


def save_qwen1(path: Path) -> Path:
    """Qwen 1 as its repository has it: tiktoken's ranks, remote code that nobody may run, no chat
    template."""
    from pagewire.tokenizer.token_bytes import BYTE_OF

    vocab = bytes_bpe(()).get_vocab()
    ranks = {bytes(BYTE_OF[c] for c in token): index for token, index in vocab.items()}
    auto = {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    }
    save_remote(
        path,
        "qwen1",
        len(ranks) + QWEN_SPECIAL,
        seq_length=8192,
        eos_token_id=len(ranks),
        auto_map=auto,
    )
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (path / name).write_text("raise RuntimeError('code of the repository was run')\n")
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n"
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    (path / "qwen.tiktoken").write_text("".join(lines))
    settings = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [len(ranks), len(ranks) + 2, *range(10, 10 + CHAT_ENDS)]
    (path / "generation_config.json").write_text(
        json.dumps({"chat_format": "chatml", "eos_token_id": ends})
    )
    return path


def save_chatglm(path: Path) -> Path:
    """ChatGLM 3 as its repository has it: a sentencepiece model, remote code, no chat template."""
    import sentencepiece

    path.mkdir(parents=True)
    lines = [line for line in corpus() if line.strip()]
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 700,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path / "tokenizer"), **options
    )
    (path / "tokenizer.vocab").unlink()
    save_remote(path, "chatglm2", 720)
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}))
    return path
