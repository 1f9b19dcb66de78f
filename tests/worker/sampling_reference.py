"""Sampling by transformers' own logits processors, one row at a time: what the worker's sampling is
measured against."""

from collections.abc import Callable

import torch
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.sampling import Sampling
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

INF = float("inf")


def words(*sequences: list[int]) -> tuple[bytes, ...]:
    return tuple(pack("i", sequence) for sequence in sequences)


def bias(values: dict[int, float]) -> dict[str, bytes]:
    return {"bias_ids": pack("i", values.keys()), "bias_values": pack("f", values.values())}


def restricted(
    logits: Tensor, prompt: list[int], output: list[int], given: Sampling, eos: tuple[int, ...]
) -> Tensor:
    """logits [V] as the model gave them -> what is sampled from, before temperature."""
    x, said, whole = (
        logits.float()[None].clone(),
        torch.tensor([output], dtype=torch.int64),
        torch.tensor([prompt + output]),
    )
    if given.allowed_ids:
        mask = torch.full_like(x, -INF)
        mask[0, unpack("i", given.allowed_ids).tolist()] = 0.0
        x = x + mask
    if given.bad_words:
        # transformers 5.17 passes over sequences longer than what was said, also when all but their
        # last token was; so say one more.
        longer = torch.tensor([[-1, *output]], dtype=torch.int64)
        x = NoBadWordsLogitsProcessor([unpack("i", word).tolist() for word in given.bad_words])(
            longer, x
        )
    ends = [token for token in (*eos, *given.stop_token_ids) if token < len(logits)]
    if given.min_tokens and ends:
        x = MinNewTokensLengthLogitsProcessor(len(prompt), given.min_tokens, ends)(whole, x)
    if given.bias_ids:
        ids, values = unpack("i", given.bias_ids).tolist(), unpack("f", given.bias_values).tolist()
        x = SequenceBiasLogitsProcessor(
            [[[token], value] for token, value in zip(ids, values, strict=True)]
        )(whole, x)
    if given.repetition_penalty != 1:
        x = RepetitionPenaltyLogitsProcessor(given.repetition_penalty)(whole, x)
    counts = torch.bincount(said[0], minlength=len(logits))
    return (x - given.frequency_penalty * counts - given.presence_penalty * (counts > 0))[0]


def continued(
    logits_of: Callable[[list[int]], Tensor],
    prompt: list[int],
    given: Sampling,
    eos: tuple[int, ...],
    count: int,
) -> list[int]:
    """The greedy continuation. logits_of(tokens) -> [len(tokens), V]."""
    output: list[int] = []
    for _ in range(count):
        output.append(
            int(restricted(logits_of(prompt + output)[-1], prompt, output, given, eos).argmax())
        )
    return output


def scored(
    logits: Tensor, tokens: list[int], top: int
) -> list[tuple[int, int, list[tuple[int, float]]]]:
    """(position, rank, [(id, value), ...]) of each token from the second on: its own first, then
    the `top` most likely ones."""
    exact = torch.log_softmax(logits.double(), -1)
    found: list[tuple[int, int, list[tuple[int, float]]]] = []
    for position in range(1, len(tokens)):
        row, own = exact[position - 1], tokens[position]
        order = row.argsort(descending=True)[:top].tolist()
        rank = 1 + int((row > row[own]).sum())
        found.append((position, rank, [(i, row[i].item()) for i in (own, *order)]))
    return found
