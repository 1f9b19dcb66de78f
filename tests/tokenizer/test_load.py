"""Tokenizers from directories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pagewire.tokenizer.load import NoTokenizer, load
from tokenizers import Tokenizer


@pytest.fixture
def directory(tmp_path: Path, bpe: Tokenizer) -> Path:
    bpe.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_tokenizer_json_alone(directory: Path, bpe: Tokenizer):
    loaded = load(directory)
    assert loaded.tokenizer.encode("hello 12").ids == bpe.encode("hello 12").ids
    assert loaded.chat_template == "" and loaded.names == {}


def test_configured_names_and_template(directory: Path):
    write(directory, "special_tokens_map.json", {"bos_token": {"content": "<|im_start|>"}, "pad_token": "P", "extra": ["x"]})
    write(directory, "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": None, "chat_template": "from config"})
    loaded = load(directory)
    assert loaded.chat_template == "from config"
    assert loaded.names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write(
        directory, "tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
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
    with pytest.raises(NoTokenizer, match=r"has no tokenizer\.json; .*--tokenizer.*--skip-tokenizer-init"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_named(directory: Path, name: str):
    write(directory, name, "{ no json")
    with pytest.raises(NoTokenizer, match=name):
        load(directory)


def test_old_formats_without_torch(tmp_path: Path, bpe: Tokenizer):
    """GPT-2's vocab.json and merges.txt go through transformers, in a process that must not load torch for it."""
    pytest.importorskip("transformers")
    bpe.model.save(str(tmp_path))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    code = (
        "import sys, pathlib; from pagewire.tokenizer.load import load; found = load(pathlib.Path(sys.argv[1]));"
        "ids = found.tokenizer.encode('hello world 你').ids; assert found.tokenizer.decode(ids) == 'hello world 你', ids;"
        "assert found.names['eos_token'] == '<|endoftext|>'; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr


def test_opt_begins_texts_with_its_own_token(tmp_path: Path, bpe: Tokenizer):
    """OPT has GPT-2's files, and says in its configuration that a text begins with a token."""
    pytest.importorskip("transformers")
    bpe.model.save(str(tmp_path))
    names = {"bos_token": "<|im_end|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "add_bos_token": True}
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **names})
    code = (
        "import sys, pathlib; from pagewire.tokenizer.load import load; found = load(pathlib.Path(sys.argv[1])).tokenizer;"
        "print(found.encode('hello').ids, found.encode('hello', add_special_tokens=False).ids)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    plain = bpe.encode("hello").ids
    assert done.stdout.splitlines()[-1:] == [f"{[bpe.token_to_id('<|im_end|>'), *plain]} {plain}"], done.stderr


def test_tokenizers_of_code_are_refused_in_one_line(tmp_path: Path):
    """In a process of its own: transformers is imported for it, without torch."""
    pytest.importorskip("transformers")
    write(tmp_path, "vocab.json", "{}")
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}})
    code = "import sys, pathlib; from pagewire.tokenizer.load import load; load(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert "has no tokenizer.json but a OwnTokenizer of its repository's own code" in done.stderr.strip().splitlines()[-1]
