"""What a configuration says about rotary embedding, in one record. Knows no tensors: see rotary for
the factors themselves."""

import math
from dataclasses import dataclass
from typing import Any, Final

from ...checkpoint.errors import Unsupported

ROPE_KINDS: Final = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ROTATION: Final = ("rope_theta", "partial_rotary_factor")
"""Of `rope_parameters`, what is no scaling."""
OTHER_NAMES: Final = {"su": "longrope", "none": "default"}


@dataclass(frozen=True)
class Rope:
    """The first `size` dimensions of each head turn (0: none): i with i + size/2, or,
    `interleaved`, 2i with 2i + 1."""

    theta: float
    size: int
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    """Sines and cosines are multiplied by it."""
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()
    """One for each frequency, from files that bring them ready-made; replaces `kind`."""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


DEFAULT_THETA: Final = 10_000.0
"""Of files that name none."""

NO_ROPE: Final = Rope(theta=1.0, size=0)


def read_rope(
    config: dict[str, Any],
    head_dim: int,
    *,
    parameters: dict[str, Any] | None = None,
    **differences: Any,
) -> Rope:
    """Newer files keep everything under `rope_parameters`, older ones have `rope_theta` and
    `rope_scaling` (and `rotary_pct`). `parameters` replaces both where layers differ.
    Raises Unsupported for an unknown kind of scaling."""
    newer = parameters or _parameters(config)
    scaling: dict[str, Any] = newer or config.get("rope_scaling") or {}
    fields = {
        **_rotation(config, newer, head_dim),
        **_scaling(config, scaling),
        **differences,
    }
    rope = Rope(**fields)
    _check(rope, head_dim, config["model_type"])
    return rope


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`. A `rope_scaling` beside them was added by hand, as the cards of models say
    to for long contexts: it replaces the scaling that they have, as in transformers."""
    newer: dict[str, Any] = config.get("rope_parameters") or {}
    scaling: dict[str, Any] = config.get("rope_scaling") or {}
    if not newer or not scaling:
        return newer
    return {name: newer[name] for name in ROTATION if name in newer} | scaling


def _rotation(config: dict[str, Any], newer: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """How fast and how many of a head's dimensions rotate; `newer` goes before older names."""
    theta = newer.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        theta = config.get("rotary_emb_base", DEFAULT_THETA)
    share = newer.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share is None:
        share = config.get("rotary_pct", 1.0)
    return {"theta": float(theta), "size": int(head_dim * float(share))}


def _scaling(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """How frequencies are stretched beyond the context of training. Raises Unsupported."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = OTHER_NAMES.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise Unsupported(
            f"rope scaling {kind!r} of {config['model_type']} is not supported; there are {', '.join(ROPE_KINDS)}"
        )
    longest = int(config["max_position_embeddings"])
    original = int(
        scaling.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or longest
    )
    stretch = longest / original
    return {
        "kind": kind,
        "factor": float(scaling.get("factor") or stretch),
        "low_freq_factor": float(scaling.get("low_freq_factor", 1.0)),
        "high_freq_factor": float(scaling.get("high_freq_factor", 4.0)),
        "beta_fast": float(scaling.get("beta_fast") or 32),
        "beta_slow": float(scaling.get("beta_slow") or 1),
        "truncate": bool(scaling.get("truncate", True)),
        "original_max_position": original,
        "divisors": tuple(scaling.get("divisors", ())),
        "short_factors": tuple(scaling.get("short_factor", ())),
        "long_factors": tuple(scaling.get("long_factor", ())),
        "magnitude": _magnitude(kind, scaling, original, stretch),
    }


def _check(rope: Rope, head_dim: int, model_type: str) -> None:
    """Raises Unsupported for sizes that do not fit each other."""
    if rope.size % 2 or not 0 <= rope.size <= head_dim:
        raise Unsupported(
            f"rotating {rope.size} of {head_dim} dimensions of a head of {model_type} is not supported"
        )
    half = rope.size // 2
    counts = [len(rope.short_factors), len(rope.long_factors)]
    if rope.kind == "longrope" and counts != [half, half]:
        raise Unsupported(
            f"longrope of {model_type} has {counts} short and long factors, not {half} of each"
        )


def _magnitude(kind: str, scaling: dict[str, Any], original: int, stretch: float) -> float:
    """Of YaRN and LongRoPE, from the factor where the file does not give it."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = float(scaling.get("factor") or stretch)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    first = scaling.get("mscale")
    second = scaling.get("mscale_all_dim")
    return _yarn(factor, first) / _yarn(factor, second) if first and second else _yarn(factor, 1.0)


def _yarn(factor: float, share: float) -> float:
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0
