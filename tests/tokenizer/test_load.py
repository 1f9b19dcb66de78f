"""Tokenizers from directories."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from msgspec.structs import replace
from pagewire.checkpoint.errors import Unsupported
from pagewire.config import ModelConfig, TokenizerConfig
from pagewire.tokenizer.load import NoTokenizer, load
from pagewire.tokenizer.service import load_text
from pagewire.tokenizer.template import ChatTemplate
from pagewire_protocol.messages import Chat
from pagewire_protocol.structs import ChatMessage
from tokenizers import Tokenizer


@pytest.fixture
def directory(tmp_path: Path, bpe: Tokenizer) -> Path:
    bpe.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


DEFAULT = "\n{% for m in messages %}{{ m.content }}\n{% endfor %}  "
TOOL_USE = """  {%- set list = tools | tojson %}
{{ list }}
{% for m in messages %}{{ m.content }};{% endfor %}

"""


@pytest.mark.parametrize("in_files", [False, True])
def test_the_template_for_requests_with_tools(directory: Path, in_files: bool):
    """As transformers chooses between templates named default and tool_use."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if in_files:
        (directory / "additional_chat_templates").mkdir()
        write(directory, "chat_template.jinja", DEFAULT)
        write(directory, "additional_chat_templates/tool_use.jinja", TOOL_USE)
    else:
        named = {"default": DEFAULT, "tool_use": TOOL_USE, "rag": "r"}
        entries = [{"name": name, "template": text} for name, text in named.items()]
        write(directory, "tokenizer_config.json", {"chat_template": entries})
    template = ChatTemplate(load(directory).chat_template, {})
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    messages = [{"role": "user", "content": "hi"}]
    for source, given in ((DEFAULT, None), (TOOL_USE, tools)):
        chat = Chat(
            (ChatMessage("user", "hi"),), tools=json.dumps(given).encode() if given else b""
        )
        (wanted,), _ = render_jinja_template([messages], tools=given, chat_template=source)
        assert template.render(chat) == wanted


PRINTS_TOOLS = "{{ tools | tojson }}: {{ messages[0].content }}"


@pytest.mark.parametrize("with_tools", [False, True])
def test_the_templates_of_a_gguf_file(tmp_path: Path, with_tools: bool):
    plain = "{{ messages[0].content }}"
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0] * 4)
    named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": PRINTS_TOOLS}]
    writer.add_chat_template(named if with_tools else plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    template = ChatTemplate(load(tmp_path / "m.gguf").chat_template, {})
    chat = Chat((ChatMessage("user", "hi"),))
    tools = b'[{"type": "function", "function": {"name": "now"}}]'
    assert template.render(chat) == "hi"
    rendered = template.render(replace(chat, tools=tools))
    assert (rendered == f"{tools.decode()}: hi") == with_tools


def test_tokenizer_json_alone(directory: Path, bpe: Tokenizer):
    loaded = load(directory)
    assert loaded.tokenizer.encode("hello 12").ids == bpe.encode("hello 12").ids
    assert loaded.chat_template == "" and loaded.names == {}


def test_configured_names_and_template(directory: Path):
    write(
        directory,
        "special_tokens_map.json",
        {"bos_token": {"content": "<|im_start|>"}, "pad_token": "P", "extra": ["x"]},
    )
    write(
        directory,
        "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "pad_token": None, "chat_template": "from config"},
    )
    loaded = load(directory)
    assert loaded.chat_template == "from config"
    assert loaded.names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write(
        directory,
        "tokenizer_config.json",
        {
            "chat_template": [
                {"name": "rag", "template": "r"},
                {"name": "default", "template": "d"},
            ]
        },
    )
    assert load(directory).chat_template == "d"
    write(directory, "chat_template.json", {"chat_template": "from json"})
    assert load(directory).chat_template == "from json"
    write(directory, "chat_template.jinja", "from jinja")
    assert load(directory).chat_template == "from jinja"


def test_truncation_of_the_training_set_up_is_off(tmp_path: Path, bpe: Tokenizer):
    copy = Tokenizer.from_str(bpe.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=64)
    copy.save(str(tmp_path / "tokenizer.json"))
    assert len(load(tmp_path).tokenizer.encode("1234567").ids) == 7


def test_a_directory_with_one_gguf(tmp_path: Path, make_gguf):
    (tmp_path / "m.gguf").write_bytes(make_gguf().read_bytes())
    loaded = load(tmp_path)
    assert loaded.names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert "<|im_start|>" in loaded.chat_template


def test_nothing_there(tmp_path: Path):
    with pytest.raises(NoTokenizer, match="holds no model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        NoTokenizer, match=r"has no tokenizer\.json; .*--tokenizer.*--skip-tokenizer-init"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_named(directory: Path, name: str):
    write(directory, name, "{ no json")
    with pytest.raises(NoTokenizer, match=name):
        load(directory)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges_as_transformers(
    kind: str, tmp_path: Path, bpe: Tokenizer, texts: list[str]
):
    transformers = pytest.importorskip("transformers")
    bpe.model.save(str(tmp_path))
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    size = bpe.get_vocab_size()
    added = {
        str(size): {"content": "<tool>", "special": False},
        str(size + 1): {"content": "<end>", "special": True},
    }
    write(
        tmp_path,
        "tokenizer_config.json",
        {"tokenizer_class": kind, **names, "added_tokens_decoder": added},
    )
    loaded, theirs = load(tmp_path), getattr(transformers, kind).from_pretrained(str(tmp_path))
    assert loaded.names == names
    for text in [*texts, "a<tool>b<end>", "  ab\u0301 12 "]:
        wanted = theirs(text)["input_ids"]
        assert loaded.tokenizer.encode(text).ids == wanted, text
        assert loaded.tokenizer.decode(wanted, skip_special_tokens=False) == theirs.decode(wanted)


def test_opt_begins_texts_with_its_own_token(tmp_path: Path, bpe: Tokenizer):
    """OPT has GPT-2's files, and says in its configuration that a text begins with a token."""
    bpe.model.save(str(tmp_path))
    names = {
        "bos_token": {"content": "<|im_end|>"},
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
    }
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **names})
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer.encode("hello").ids == [
        bpe.token_to_id("<|im_end|>"),
        *bpe.encode("hello").ids,
    ]
    assert tokenizer.encode("hello", add_special_tokens=False).ids == bpe.encode("hello").ids


def test_damaged_vocabularies_are_named(tmp_path: Path, bpe: Tokenizer):
    bpe.model.save(str(tmp_path))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    write(tmp_path, "vocab.json", "{ no json")
    with pytest.raises(NoTokenizer, match=r"vocab\.json and merges\.txt cannot be read"):
        load(tmp_path)


def test_other_formats_without_torch(tmp_path: Path):
    """BERT's vocab.txt goes through transformers, in a process that must not load torch for it."""
    pytest.importorskip("transformers")
    write(
        tmp_path,
        "vocab.txt",
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld"]),
    )
    write(
        tmp_path,
        "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "sep_token": "[SEP]"},
    )
    code = (
        "import sys, pathlib; from pagewire.tokenizer.load import load; found = load(pathlib.Path(sys.argv[1]));"
        "assert found.tokenizer.encode('Hello world', add_special_tokens=False).ids == [5, 6, 7];"
        "assert found.names['sep_token'] == '[SEP]'; assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr


def test_tokenizers_of_code_are_refused_in_one_line(tmp_path: Path):
    """In a process of its own: transformers is imported for it, without torch."""
    pytest.importorskip("transformers")
    write(tmp_path, "vocab.json", "{}")
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
        },
    )
    code = "import sys, pathlib; from pagewire.tokenizer.load import load; load(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (
        "has no tokenizer.json but a OwnTokenizer of its repository's own code"
        in done.stderr.strip().splitlines()[-1]
    )


@pytest.mark.parametrize("offered", [None, "qwen.txt"])
def test_that_the_model_cannot_be_served_comes_before_its_missing_tokenizer(
    offered: str | None, tmp_path: Path
) -> None:
    write(tmp_path, "config.json", {"model_type": "nonsense"})
    if offered:
        (tmp_path / offered).write_text("no vocabulary")
    with pytest.raises(Unsupported, match="model_type 'nonsense' is known neither here"):
        load_text(ModelConfig(model=str(tmp_path)), TokenizerConfig())
    write(tmp_path, "config.json", {"model_type": "llama"})
    with pytest.raises(NoTokenizer, match=r"has no tokenizer\.json"):
        load_text(ModelConfig(model=str(tmp_path)), TokenizerConfig())
