"""What of a checkpoint's files counts: which tokens end a text, which files hold the weights, what is
refused before torch is there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from pagewire.checkpoint import end_tokens, gguf_files, model_types
from pagewire.checkpoint.chat_templates import read_option
from pagewire.config import ModelConfig
from pagewire.worker.load import loader
from pagewire.worker.load.gguf_architectures import LAYER_NAMES, TOP_NAMES
from pagewire.worker.models import FAMILIES
from pagewire.worker.models.architecture import Unsupported
from safetensors.torch import load_file, save_file
from worker.gguf_sizes import add_sizes

CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"

# --- end tokens


def ends(path: Path, **files: object) -> tuple[int, ...]:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text)
    return loader.open_model(path, ModelConfig(load_format="dummy"))[2]


IM_END = {"41": {"content": "<|im_end|>", "special": True}}
TOKENIZER = {
    "added_tokens": [{"id": 41, "content": "<|im_end|>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "</s>": 7}, "merges": []},
}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", 0.0]]}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (2,)),
        ({"generation_config__json": {"eos_token_id": [5, 2]}}, (2, 5)),
        ({"generation_config__json": {"eos_token_id": [5, None]}}, (2, 5)),
        # an eos that only the tokenizer names, with its id in each place that may have it
        (
            {"tokenizer_config__json": {"eos_token": "<|im_end|>", "added_tokens_decoder": IM_END}},
            (2, 41),
        ),
        (
            {
                "tokenizer_config__json": {"eos_token": {"content": "<|im_end|>"}},
                "tokenizer__json": TOKENIZER,
            },
            (2, 41),
        ),
        (
            {
                "special_tokens_map__json": {"eos_token": "<|im_end|>"},
                "added_tokens__json": {"<|im_end|>": 41},
            },
            (2, 41),
        ),
        (
            {
                "tokenizer_config__json": {"eos_token": "</s>", "chat_template": "{{ messages }}"},
                "tokenizer__json": TOKENIZER,
            },
            (2, 7),
        ),
        # without a template of its own a model is used with another one
        ({"tokenizer__json": TOKENIZER}, (2, 41)),
        ({"tokenizer_config__json": {"added_tokens_decoder": IM_END}}, (2, 41)),
        ({"tokenizer_config__json": {"eos_token": "</s>"}, "tokenizer__json": UNIGRAM}, (1, 2)),
        ({"tokenizer_config__json": {"eos_token": "z"}, "vocab__json": {"z": 9}}, (2, 9)),
        ({"tokenizer_config__json": {"eos_token": "nowhere"}}, (2,)),
        # what a chat template ends turns with, wherever the template is
        ({"chat_template__jinja": CHATML, "tokenizer__json": TOKENIZER}, (2, 41)),
        (
            {"tokenizer_config__json": {"chat_template": CHATML, "added_tokens_decoder": IM_END}},
            (2, 41),
        ),
        ({"chat_template__jinja": "{{ messages }}", "tokenizer__json": TOKENIZER}, (2,)),
    ],
)
def test_every_file_that_names_an_end_counts(files, expected, tmp_path):
    config = {"model_type": "llama", "vocab_size": 50, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ends(tmp_path, **files) == expected


def test_ids_that_the_model_cannot_generate_are_no_ends(tmp_path):
    config = {"model_type": "llama", "vocab_size": 50, "eos_token_id": [-1, 49, 50]}
    assert ends(tmp_path, config__json=config) == (49,)


def test_the_ends_of_a_tokenizer_that_comes_from_elsewhere(tmp_path):
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    for path in (model, tokenizer):
        path.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 50}')
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": IM_END}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    settings = ModelConfig(load_format="dummy", tokenizer=str(tokenizer))
    assert loader.open_model(model, settings)[2] == (41,)
    writer = gguf_of([f"t{n}" for n in range(50)], tmp_path / "m.gguf")
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    close(writer)
    assert loader.open_model(tmp_path / "m.gguf", settings)[2] == (3, 41)


TURNS = {"<|im_end|>": 41, "<end_of_turn>": 42, "<|eot_id|>": 43, "<|end|>": 44, "[EOT]": 45}
ENDS_BY_TEMPLATE = [
    ("chatml", (2, 41, 43)),
    ("{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}", (2, 42, 43)),
    ("{{ messages[0].content }}<|eot_id|>", (2, 43)),
    ("{{ messages[0].content }}<|end|>[EOT]", (2, 43, 44, 45)),
    # ends of other vocabularies
    ("{{ messages[0].content }}<|end_of_turn|>", (2, 43)),
]
"""--chat-template, and the ends of a model whose own template ends turns with <|eot_id|>."""


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("template", "expected"), ENDS_BY_TEMPLATE)
def test_the_end_of_a_turn_in_another_template(template, expected, own, tmp_path):
    """Also of a tokenizer that comes from elsewhere."""
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    for path in (model, tokenizer):
        path.mkdir()
    config = {"model_type": "llama", "vocab_size": 50, "eos_token_id": 2}
    (model / "config.json").write_text(json.dumps(config))
    files = model if own else tokenizer
    tokens = {str(token): {"content": text, "special": True} for text, token in TURNS.items()}
    settings = {"added_tokens_decoder": tokens, "chat_template": "{{ messages }}<|eot_id|>"}
    (files / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "t.jinja").write_text(read_option(template))
    for option in (template, str(tmp_path / "t.jinja")):
        settings = ModelConfig(
            load_format="dummy", chat_template=option, tokenizer="" if own else str(tokenizer)
        )
        assert loader.open_model(model, settings)[2] == expected
    writer = gguf_of([f"t{n}" for n in range(50)], tmp_path / "m.gguf")
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    close(writer)
    if not own:
        assert loader.open_model(tmp_path / "m.gguf", settings)[2] == expected


@pytest.mark.parametrize(
    ("tokens", "keys", "expected"),
    [
        # a base model's end of text where the chat ends its turns with another token
        (["a", "<|endoftext|>", "<|im_end|>"], {"eos": 1}, (1, 2)),
        (["a", "b", "c"], {"eos": 0, "eot": 1, "eom": 2}, (0, 1, 2)),
        (
            ["a", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "</s>"],
            {},
            (1, 2, 3, 4, 5),
        ),
        (["<|end|>", "<|return|>", "<|call|>"], {}, (1, 2)),
        (["a", "<|im_end", "im_end|>"], {}, ()),
    ],
)
def test_ends_of_a_gguf_vocabulary(tokens, keys, expected, tmp_path):
    writer = gguf_of(tokens, tmp_path / "m.gguf")
    for name, token in keys.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    close(writer)
    assert loader.open_model(tmp_path / "m.gguf", ModelConfig(load_format="dummy"))[2] == expected


def gguf_of(tokens: list[str], path: Path) -> gguf.GGUFWriter:
    """A model in name alone, with this vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_embedding_length(8)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    return writer


def test_the_list_of_ends_has_no_repetition():
    assert len(set(end_tokens.END_OF_TURN)) == len(end_tokens.END_OF_TURN)


# --- which files hold the weights


@pytest.fixture
def copy(tiny, tmp_path):
    """copy(variant): a checkpoint to be changed, as a directory."""

    def make(variant: str) -> Path:
        path = tmp_path / variant
        shutil.copytree(tiny(variant).path, path)
        return path

    return make


def shard(path: Path, files: int = 2) -> dict[str, str]:
    """Cut model.safetensors in several files with an index; returns the index's map."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-{n + 1:05d}-of-{files:05d}.safetensors" for n in range(files)]
    shards = {tensor: names[i % files] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        part = {tensor: tensors[tensor] for tensor, file in shards.items() if file == name}
        save_file(part, path / name, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return shards


def spoil(path: Path, *names: str, like: str = "model.safetensors") -> None:
    """Further files with the tensors of `like`, and other values in them."""
    tensors = {name: tensor + 1 for name, tensor in load_file(path / like).items()}
    for name in names:
        save_file(tensors, path / name, {"format": "pt"})


def assert_serves(path: Path, tiny, harness, numbers, variant: str = "llama", **settings) -> None:
    tokens = numbers(12)
    logits, wanted = harness(path, **settings).logits(tokens, 12), tiny(variant).logits(tokens)
    assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


STRAY = ("model_old.safetensors", "consolidated.safetensors", "adapter_model.safetensors")


@pytest.mark.parametrize("variant", ["llama", "olmo2"])
def test_the_files_of_the_index_count_and_nothing_else(
    variant, request, tmp_path, harness, numbers, tiny
):
    if variant == "llama":
        path = tmp_path / variant
        shutil.copytree(tiny(variant).path, path)
        wanted = tiny(variant).logits(numbers(12))
    else:  # through transformers, which by itself would take model.safetensors
        import transformers

        torch.manual_seed(7)
        config = transformers.Olmo2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        model = transformers.Olmo2ForCausalLM(config).eval()
        path = tmp_path / variant
        model.save_pretrained(path)
        with torch.inference_mode():
            wanted = model(torch.tensor([[token % 97 for token in numbers(12)]])).logits[0]
    whole = path / "model.safetensors"
    spoil(path, "stale", *STRAY)
    shards = shard(path)
    (path / "stale").rename(whole)
    # a tensor that lies in another file than the index says, too
    first, second = sorted(set(shards.values()))
    moved = next(tensor for tensor, file in shards.items() if file == second)
    tensors = load_file(path / first)
    save_file(
        tensors | {moved: torch.zeros(3), "old": torch.zeros(3)}, path / first, {"format": "pt"}
    )
    tokens = [token % 97 if variant == "olmo2" else token for token in numbers(12)]
    logits = harness(path).logits(tokens, 12)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_without_an_index_the_usual_file_counts_alone(copy, tiny, harness, numbers):
    path = copy("llama")
    spoil(path, *STRAY, "model-00001-of-00002.safetensors")
    assert_serves(path, tiny, harness, numbers)


def test_stray_files_alone_are_no_weights(copy, harness):
    path = copy("llama")
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match=r"has no \.safetensors file"):
        harness(path)


def test_another_name_than_the_usual_one_serves(copy, tiny, harness, numbers):
    path = copy("llama")
    (path / "model.safetensors").rename(path / "weights.safetensors")
    assert_serves(path, tiny, harness, numbers)
    spoil(path, "zweights.safetensors", like="weights.safetensors")
    with pytest.raises(
        Unsupported,
        match=r"weights\.safetensors and zweights\.safetensors in .* both have a tensor",
    ):
        harness(path)


def test_numbered_files_without_an_index(copy, tiny, harness, numbers):
    path = copy("llama")
    shard(path, 3)
    (path / "model.safetensors.index.json").unlink()
    (path / "leftover.safetensors").write_bytes(b"")
    assert_serves(path, tiny, harness, numbers)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(Unsupported, match=r"lacks 1 of the 3 files .* model-00002-of-00003"):
        harness(path)


def test_a_broken_index_is_named(copy, harness):
    path = copy("llama")
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(Unsupported, match=r"index\.json is no index of weights .*; fetch it again"):
        harness(path)


def test_pytorch_files_beside_strays(copy, tiny, harness, numbers):
    path = copy("llama")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "pytorch_model_old.bin").write_bytes(b"no weights")
    assert_serves(path, tiny, harness, numbers)
    (path / "pytorch_model.bin").rename(path / "pytorch_model_new.bin")
    torch.save(tensors, path / "pytorch_model_old.bin")
    with pytest.raises(
        Unsupported,
        match=r"pytorch_model_new\.bin and pytorch_model_old\.bin in .* both have a tensor",
    ):
        harness(path)


# --- GGUF


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_qwen(path: Path, model, **keys: object) -> None:
    """A qwen2 or qwen3 model as GGUF, in one file or, with `split_max_tensors`, in parts."""
    config = model.config
    split = keys.pop("split_max_tensors", 0)
    writer = gguf.GGUFWriter(path, config.model_type, split_max_tensors=split)
    add_sizes(writer, config)
    writer.add_key_length(
        getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    )
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in keys.items():
        name = f"{config.model_type}.{key.replace('__', '.')}"
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    names = {v: k for k, v in (LAYER_NAMES | TOP_NAMES).items()}
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            number, _, part = stem.removeprefix("model.layers.").partition(".")
            writer.add_tensor(f"blk.{number}.{names[part]}.{suffix}", tensor.numpy())
        elif not (config.tie_word_embeddings and stem == "lm_head"):
            writer.add_tensor(f"{names[stem]}.{suffix}", tensor.numpy())
    close(writer)


def test_a_split_gguf_loads_from_any_of_its_parts(tiny, harness, numbers, tmp_path):
    write_qwen(tmp_path / "tiny.gguf", tiny("qwen2").model, split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"")
    for path in (parts[0], parts[1], tmp_path):
        assert_serves(path, tiny, harness, numbers, "qwen2")
    parts[1].unlink()
    with pytest.raises(Unsupported, match=rf"lacks 1 of the {len(parts)} parts .*{parts[1].name}"):
        harness(parts[0])


def test_several_gguf_models_in_a_directory(tiny, harness, tmp_path):
    write_qwen(tmp_path / "one.gguf", tiny("qwen2").model)
    write_qwen(tmp_path / "two.gguf", tiny("qwen2").model, split_max_tensors=20)
    with pytest.raises(
        Unsupported, match=r"has 2 GGUF models; give one of them, for example .*/one\.gguf"
    ):
        harness(tmp_path)
    assert gguf_files.parts(tmp_path / "one.gguf") == [tmp_path / "one.gguf"]


@pytest.mark.parametrize(
    "keys",
    [
        {"rope__scaling__factor": 4.0},
        {"rope__scale_linear": 4.0},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ],
)
def test_gguf_rope_scaling_is_linear_unless_it_says_otherwise(
    keys, tiny, harness, numbers, tmp_path
):
    import transformers

    source = tiny("qwen2").model
    config = transformers.Qwen2Config(**source.config.to_dict())
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.load_state_dict(source.state_dict())
    write_qwen(tmp_path / "m.gguf", model, **keys)
    tokens = numbers(40)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
    assert (harness(tmp_path).logits(tokens, 40) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_gguf_without_scaling_is_not_scaled(tiny, harness, numbers, tmp_path):
    keys = {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}
    write_qwen(tmp_path / "m.gguf", tiny("qwen2").model, **keys)
    assert_serves(tmp_path, tiny, harness, numbers, "qwen2")


# --- refused before torch is imported


def test_the_families_are_those_that_models_has_files_for():
    assert tuple(sorted(FAMILIES)) == model_types.FAMILIES


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonsense"}, "model_type 'nonsense' is known neither here nor to transf"),
        ({"model_type": "own", "auto_map": {"A": "c.C"}}, "model_type 'own' needs code from its"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel is no causal language"),
        ({"model_type": "t5"}, "t5 is an encoder with a decoder"),
        (
            {"model_type": "olmo2", "architectures": ["Q"], "is_encoder_decoder": True},
            "Q is an encoder with a decoder",
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "quip"}},
            "with 'quip' are",
        ),
        ({"model_type": "llama"}, "the configuration of this llama model has no 'num_attention_he"),
        ({}, "has no config.json; give a directory with a model"),
        (
            {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
            "has no .safetensors file",
        ),
    ],
)
def test_what_the_files_rule_out_is_said_without_torch(config, message, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import sys; from pathlib import Path; from pagewire.config import ModelConfig\n"
        "from pagewire.worker.load import early\n"
        "try: early.check(Path(sys.argv[1]), ModelConfig())\n"
        "except ValueError as error: print(error)\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    line, imported = done.stdout.splitlines()
    assert message in line
    assert imported == "set()"


def test_a_gguf_architecture_is_named_early(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    close(writer)
    with pytest.raises(Unsupported, match="GGUF architecture 'mamba' is not supported"):
        model_types.check(tmp_path / "m.gguf", False)
