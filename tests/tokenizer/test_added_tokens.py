"""Tokens that files name beside tokenizer.json, against transformers where it knows them too."""

import json
from pathlib import Path

import pytest
from pagewire.checkpoint import json_files
from pagewire.checkpoint.errors import Unsupported
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import Encoder
from pagewire.tokenizer.load import NoTokenizer, load
from pagewire_protocol.columns import pack, unpack
from tokenizers import Tokenizer, models, pre_tokenizers

CHAT = "<|im_start|>user\nhello<|im_end|>\n"
MARKS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture
def plain(tmp_path: Path, bpe: Tokenizer) -> Path:
    """A directory whose tokenizer.json lists no added token, though two of them are in its
    vocabulary."""
    document = json.loads(bpe.to_str())
    document["added_tokens"] = []
    write(tmp_path, "tokenizer.json", document)
    return tmp_path


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(json.dumps(content))


def ids_of(directory: Path, text: str) -> list[int]:
    return load(directory).tokenizer.encode(text, add_special_tokens=False).ids


def decoder_entries(**ids: int) -> dict:
    return {
        "added_tokens_decoder": {
            str(token): {"content": text, "special": True} for text, token in ids.items()
        }
    }


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(i + 1): {"content": m} for i, m in enumerate(MARKS)}},
        ),
        ("tokenizer_config.json", {"additional_special_tokens": list(MARKS)}),
        ("tokenizer_config.json", {"extra_special_tokens": dict(zip("ab", MARKS, strict=True))}),
        ("tokenizer_config.json", {"bos_token": MARKS[0], "eos_token": {"content": MARKS[1]}}),
        ("added_tokens.json", {m: i + 1 for i, m in enumerate(MARKS)}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": m} for m in MARKS]}),
    ],
)
def test_tokens_of_the_vocabulary_that_another_file_adds(file, content, plain, bpe):
    assert len(ids_of(plain, CHAT)) > len(bpe.encode(CHAT).ids)
    write(plain, file, content)
    assert ids_of(plain, CHAT) == bpe.encode(CHAT).ids


def test_as_transformers_where_it_reads_the_same_files(plain: Path):
    import transformers

    write(
        plain,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            **decoder_entries(**{"<|im_start|>": 1, "<|new|>": 400}),
        },
    )
    text = CHAT + "<|new|> and <|im_end|>"
    theirs = transformers.AutoTokenizer.from_pretrained(str(plain), local_files_only=True)
    assert ids_of(plain, text) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("spm", [False, True])
def test_new_tokens_get_the_ids_that_the_files_say_with_gaps(spm, tmp_path, bpe):
    if spm:
        pieces = [("<unk>", 0.0), *((c, -float(i)) for i, c in enumerate("▁abc"))]
        tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    write(tmp_path, "added_tokens.json", {"<|a|>": size + 7, "<|b|>": size + 3})
    write(
        tmp_path,
        "tokenizer_config.json",
        {"bos_token": "<|bos|>", **decoder_entries(**{"<|c|>": size + 5, "<|a|>": size + 7})},
    )
    loaded = load(tmp_path).tokenizer
    names = {token: loaded.token_to_id(f"<|{token}|>") - size for token in ("a", "b", "c", "bos")}
    assert names == {"a": 7, "b": 3, "c": 5, "bos": 8}
    ids = loaded.encode("ab<|a|>c<|b|>", add_special_tokens=False).ids
    assert ids[-1] == size + 3 and size + 7 in ids
    # Ids beyond the count of tokens are no strangers, and those of no token have no text.
    encoder, column = Encoder(loaded, None), pack("i", [size + 7, size + 4, size + 3])
    if not spm:
        assert encoder.decode(column, False) == "<|a|><|b|>"
        assert Decoding(loaded).decode([size + 7, size + 4, size + 3], False) == "<|a|><|b|>"
    assert unpack("i", column).tolist()[0] < Decoding(loaded).size


def test_ids_of_tokenizer_json_itself_with_gaps(tmp_path: Path, bpe: Tokenizer):
    document = json.loads(bpe.to_str())
    document["added_tokens"].append(
        {**document["added_tokens"][0], "id": 1000, "content": "<|far|>"}
    )
    write(tmp_path, "tokenizer.json", document)
    assert ids_of(tmp_path, "12<|far|>")[-1] == 1000


def test_a_token_without_an_id_is_no_more_than_the_model_has(plain: Path):
    write(plain, "special_tokens_map.json", {"pad_token": "<|pad|>", "cls_token": "<|cls|>"})
    write(plain, "config.json", {"vocab_size": 401})
    loaded = load(plain)
    assert (
        loaded.tokenizer.token_to_id("<|cls|>") is None
        or loaded.tokenizer.token_to_id("<|pad|>") is None
    )
    assert load(plain).names == {"pad_token": "<|pad|>", "cls_token": "<|cls|>"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"1": "<|im_start|>"}, "'<|im_start|>' for '1'"),
        ({"1": {"special": True}}, "for '1'"),
        ({"x": {"content": "<|im_start|>"}}, "for 'x'"),
        ([{"content": "<|im_start|>"}], "no object"),
    ],
)
def test_entries_of_another_form_are_named(entries, words, plain):
    settings = {"added_tokens_decoder": entries}
    write(plain, "tokenizer_config.json", settings)
    with pytest.raises(NoTokenizer, match="added_tokens_decoder") as told:
        load(plain)
    assert words in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(Unsupported, match="added_tokens_decoder"):
        json_files.added_tokens(settings)
