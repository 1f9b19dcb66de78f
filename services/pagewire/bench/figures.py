"""From samples to figures, and figures to a table."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli import positive
from .load import Sample

FIRST_ID = 100
"""Smallest token id of a prompt: ids below are often special."""


def add_load(parser: argparse.ArgumentParser, num_prompts: int) -> None:
    """The flags that both kinds of measurement have."""
    parser.add_argument("--num-prompts", type=positive, default=num_prompts, help=f"requests to send (default: {num_prompts})")
    parser.add_argument("--input-len", type=positive, default=128, help="tokens in a prompt (default: 128)")
    parser.add_argument("--output-len", type=positive, default=64, help="tokens to generate (default: 64)")
    about = f"prompts are random token ids from {FIRST_ID} to this (default: 16000)"
    parser.add_argument("--vocab", type=_vocabulary, default=16_000, help=about)
    parser.add_argument("--json", default="", help="also write the figures to this file")


def _vocabulary(text: str) -> int:
    if positive(text) <= FIRST_ID:
        raise argparse.ArgumentTypeError(f"{text}: more than {FIRST_ID} is needed")
    return int(text)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed; NaN when there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def summarize(samples: list[Sample], input_len: int) -> dict[str, float]:
    """Throughput in tokens and requests a second, latencies in milliseconds."""
    good = [sample for sample in samples if not sample.error]
    seconds = max((s.last for s in good), default=0.0) - min((s.began for s in good), default=0.0)
    tokens = sum(s.tokens for s in good)
    figures: dict[str, float] = {
        "requests": len(good),
        "failed": len(samples) - len(good),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds if seconds else math.nan,
        "input_tokens_per_s": len(good) * input_len / seconds if seconds else math.nan,
        "output_tokens_per_s": tokens / seconds if seconds else math.nan,
        "chunks_per_token": sum(max(0, s.chunks - 1) for s in good) / tokens if tokens else math.nan,
    }
    latencies = {
        "ttft_ms": [1000 * (s.first - s.began) for s in good if s.first],
        "tpot_ms": [1000 * (s.last - s.first) / (s.tokens - 1) for s in good if s.tokens > 1],
        "gap_ms": [1000 * gap for s in good for gap in s.gaps],
    }
    for name, values in latencies.items():
        figures |= {f"{name}_p50": percentile(values, 0.5), f"{name}_p99": percentile(values, 0.99)}
    return figures


def table(title: str, figures: dict[str, Any]) -> str:
    width = max(map(len, figures), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {_number(value)}" for name, value in figures.items())])


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:,.2f}"
    return str(value)


def write_json(path: str, figures: dict[str, Any]) -> None:
    clean = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in figures.items()}
    Path(path).write_text(json.dumps(clean, indent=2) + "\n")
