"""What a request's sampling columns may say, checked where they are made (tokenizer) and again
before a worker sees them (scheduler).

Bounds of single values are the wire type's. Here: columns that fit each other, and token ids that
the model has, since an id beyond its logits would end the worker for everyone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagewire_protocol.sampling import MAX_BIAS_VALUE, Sampling


class Fault(NamedTuple):
    """What is wrong, with the numbers, and the parameter at fault."""

    message: str
    param: str


def fault(sampling: Sampling, vocab_size: int) -> Fault | None:
    """What is wrong with `sampling` for a model of `vocab_size` tokens; None when nothing is.
    vocab_size 0: not known yet."""
    if not (
        sampling.bias_ids or sampling.bias_values or sampling.allowed_ids or sampling.bad_words
    ):
        return None
    return next(_faults(sampling, vocab_size), None)


def _faults(sampling: Sampling, vocab_size: int) -> Iterator[Fault]:
    for name, columns in (
        ("logit_bias", (sampling.bias_ids, sampling.bias_values)),
        ("allowed_token_ids", (sampling.allowed_ids,)),
        ("bad_words", sampling.bad_words),
    ):
        if any(len(column) % 4 for column in columns):
            yield Fault(
                f"{name} must come as columns of 4 bytes a value; a length is no multiple of 4",
                name,
            )
            return
    yield from _bias(sampling)
    if not all(sampling.bad_words):
        yield Fault("bad_words: a word has no tokens", "bad_words")
        return
    words = [np.frombuffer(word, np.int32) for word in sampling.bad_words]
    allowed = np.frombuffer(sampling.allowed_ids, np.int32)
    yield from _foreign("logit_bias", np.frombuffer(sampling.bias_ids, np.int32), vocab_size)
    yield from _foreign("allowed_token_ids", allowed, vocab_size)
    yield from _foreign("bad_words", np.concatenate([np.zeros(0, np.int32), *words]), vocab_size)
    banned = np.array([word[0] for word in words if len(word) == 1], np.int32)
    if len(allowed) and np.isin(allowed, banned).all():
        yield Fault(
            "allowed_token_ids: bad_words forbids every one of them, so no token could be sampled",
            "allowed_token_ids",
        )


def _bias(sampling: Sampling) -> Iterator[Fault]:
    count = len(sampling.bias_ids) // 4
    values = np.frombuffer(sampling.bias_values, np.float32)
    if count != len(values):
        yield Fault(f"logit_bias has {count} token ids and {len(values)} values", "logit_bias")
    if not (np.abs(values) <= MAX_BIAS_VALUE).all():
        yield Fault(
            f"logit_bias values must lie between -{MAX_BIAS_VALUE:.0f} and {MAX_BIAS_VALUE:.0f}",
            "logit_bias",
        )


def _foreign(name: str, ids: NDArray[np.int32], vocab_size: int) -> Iterator[Fault]:
    outside = ids[(ids < 0) | (ids >= (vocab_size or 2**31))]
    if len(outside):
        yield Fault(
            f"{name}: token id {outside[0]} is outside the model's vocabulary of {vocab_size} tokens",
            name,
        )
