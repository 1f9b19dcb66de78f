"""Published figures to set ours beside: vLLM 0.26.0 on one H200 (bf16, random weights, defaults and
its best front end), and our goals.

Only for the models and workloads that were measured; nothing is scaled or guessed. Rates in tokens
a second, times in milliseconds.
"""

import json
from pathlib import Path
from typing import Any

KNOWN = {
    # (model type, hidden size, layers): name
    ("llama", 4096, 32): "8B",
    ("qwen3", 1024, 28): "0.6B",
}
NAMES = {"llama-3.1-8b": "8B", "qwen3-0.6b": "0.6B"}

PEERS: dict[tuple[str, str, str], tuple[str, float]] = {
    # (model, workload, figure): (vLLM, goal)
    ("8B", "mixed", "out tok/s"): ("9,640", 11_500),
    ("8B", "single", "out tok/s"): ("203", 250),
    ("8B", "wide", "out tok/s"): ("15,300", 18_000),
    ("8B", "long", "in tok/s"): ("34,000", 38_000),
    ("8B", "shared", "out tok/s"): ("8,390", 16_000),
    ("8B", "start", "ready s"): ("106", 15),
    ("0.6B", "mixed", "out tok/s"): ("22,800", 30_000),
    ("0.6B", "single", "out tok/s"): ("540", 1_300),
    ("0.6B", "wide", "out tok/s"): ("41,500", 80_000),
    ("0.6B", "long", "in tok/s"): ("167,000", 250_000),
    ("0.6B", "shared", "out tok/s"): ("15,800", 45_000),
    ("0.6B", "start", "ready s"): ("102", 10),
    ("8B", "1x128/256", "TPOT p50"): ("4.7", 4.0),
    ("8B", "1x128/256", "TTFT p50"): ("16-18", 10),
    ("8B", "256x128/128", "out tok/s"): ("12,100-13,200", 17_000),
    ("8B", "256x128/128", "gap p99"): ("90-127", 30),
    ("8B", "256x512/128+1024", "out tok/s"): ("5,800", 9_000),
    ("8B", "256x512/128+1024", "gap p99"): ("210", 30),
    ("8B", "poisson32x512/128", "TTFT p50"): ("43", 30),
    ("8B", "poisson32x512/128", "TTFT p99"): ("90", 60),
    ("8B", "poisson32x512/128", "TPOT p50"): ("8.9", 6.5),
    ("8B", "1024x64/64", "out tok/s"): ("12,000-13,100", 17_000),
    ("0.6B", "1x128/256", "TPOT p50"): ("1.57-1.60", 0.8),
    ("0.6B", "1x128/256", "TTFT p50"): ("12", 5),
    ("0.6B", "256x128/128", "out tok/s"): ("19,900-27,000", 60_000),
    ("0.6B", "256x128/128", "gap p99"): ("25-32", 15),
    ("0.6B", "256x512/128+1024", "out tok/s"): ("13,600-16,000", 26_000),
    ("0.6B", "256x512/128+1024", "gap p99"): ("33-42", 20),
    ("0.6B", "poisson32x512/128", "TTFT p50"): ("25-35", 12),
    ("0.6B", "poisson32x512/128", "TTFT p99"): ("52-75", 30),
    ("0.6B", "poisson32x512/128", "TPOT p50"): ("2.5-3.1", 1.5),
    ("0.6B", "1024x64/64", "out tok/s"): ("16,100-19,000", 60_000),
}


def identify(model: str) -> str:
    """The short name of a model that figures are known for, by its configuration or its name; else
    ""."""
    try:
        config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return next((short for name, short in NAMES.items() if name in model.lower()), "")
    return KNOWN.get(
        (
            config.get("model_type", ""),
            config.get("hidden_size", 0),
            config.get("num_hidden_layers", 0),
        ),
        "",
    )


def beside(model: str, workload: str, figure: str) -> list[str]:
    """The cells of the columns "vLLM" and "goal"."""
    peer, goal = PEERS.get((model, workload, figure), ("", None))
    return [peer, f"{goal:,g}" if goal is not None else ""]
