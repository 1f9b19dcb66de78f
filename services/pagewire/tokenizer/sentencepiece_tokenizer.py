"""Builds a `tokenizers.Tokenizer` from a sentencepiece model: BPE with or without byte fallback,
and unigram.

It follows sentencepiece itself: the text is normalized by the model's own rules, spaces become ▁,
then pieces are merged by score. Which tokens stand outside the model, and what is put before a
text, is the caller's choice.
"""

from collections.abc import Sequence
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .merges import merges_of
from .sentencepiece_model import BPE, CONTROL, KINDS, NORMAL, UNIGRAM, UNKNOWN, USER_DEFINED, Model

SPACE: Final = "▁"
Added = Sequence[tuple[AddedToken, int]]


class UnsupportedModel(ValueError):
    """A type of sentencepiece model that is not supported."""


def build(model: Model, added: Added = (), prefix_first_only: bool = False) -> Tokenizer:
    """The tokenizer. `added`: tokens outside the model, with their ids. The space that the model
    may put before a text comes before each part between added tokens, or, with `prefix_first_only`,
    only at the very start. Raises UnsupportedModel."""
    if model.model_type == BPE:
        tokenizer = Tokenizer(_bpe(model, added))
    elif model.model_type == UNIGRAM:
        tokenizer = Tokenizer(_unigram(model))
    else:
        model_type = KINDS.get(model.model_type, str(model.model_type))
        raise UnsupportedModel(
            f"a sentencepiece model of type {model_type} is not supported; BPE and unigram are"
        )
    tokenizer.normalizer = _normalizer(model, model.dummy_prefix and not prefix_first_only)
    if model.dummy_prefix and prefix_first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if model.dummy_prefix else steps
    )
    _add(tokenizer, model, added)
    return tokenizer


def _bpe(model: Model, added: Added) -> models.BPE:
    vocab = {piece: index for index, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.unk] if 0 <= model.unk < len(model.pieces) else None
    best_first = sorted(range(len(model.pieces)), key=lambda index: -model.scores[index])
    merged = [
        piece
        for piece in (model.pieces[index] for index in best_first)
        if _is_merged(piece, model.kinds[vocab[piece]])
    ]
    merges = merges_of({piece: rank for rank, piece in enumerate(merged)})
    vocab.update((token.content, index) for token, index in added)
    return models.BPE(
        vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
    )


def _is_merged(piece: str, piece_type: int) -> bool:
    """User-defined pieces are found in the text before all merging, but for those with spaces,
    which are no spaces yet by then."""
    return piece_type == NORMAL or (piece_type == USER_DEFINED and SPACE in piece)


def _unigram(model: Model) -> models.Unigram:
    scored = list(zip(model.pieces, model.scores, strict=True))
    return models.Unigram(scored, model.unk if model.unk >= 0 else None, model.byte_fallback)


def _normalizer(model: Model, prefixed: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = (
        [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    )
    if model.remove_extra_spaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if prefixed:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _add(tokenizer: Tokenizer, model: Model, added: Added) -> None:
    """Control pieces are never made from text by sentencepiece, but here they are names that a
    template may use."""
    pieces = [
        (piece, piece_type)
        for piece, piece_type in zip(model.pieces, model.kinds, strict=True)
        if piece_type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens(
        [
            AddedToken(piece, normalized=False, special=True)
            for piece, piece_type in pieces
            if piece_type != USER_DEFINED
        ]
    )
    words = [
        piece for piece, piece_type in pieces if piece_type == USER_DEFINED and SPACE not in piece
    ]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in words])
    for token, index in sorted(added, key=lambda entry: entry[1]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != index:
            raise UnsupportedModel(
                f"token {token.content!r} should have id {index}, but the tokenizer's model gives it another"
            )
