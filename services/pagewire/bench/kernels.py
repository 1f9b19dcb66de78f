"""`pagewire bench kernels`: the table of the kernels' times beside other libraries' on the same kind of GPU."""

from typing import Any

from .figures import table

ELSEWHERE = {
    # (kernel, shape): microseconds of FlashAttention-3 with pages of 16, on one H200
    ("decode", "1x1024 32q d128"): 10.6,
    ("decode", "8x1024 32q d128"): 14.4,
    ("decode", "64x1024 32q d128"): 76.0,
    ("decode", "256x1024 32q d128"): 276.0,
    ("decode", "1x16384 32q d128"): 27.0,
    ("decode", "8x16384 32q d128"): 133.0,
    ("decode", "8x32768 32q d128"): 256.0,
    ("decode", "256x1024 16q d128"): 275.0,
    ("prefill", "4x512 of 512 32q d128"): 37.0,
    ("prefill", "4x2048 of 2048 32q d128"): 304.0,
    ("prefill", "1x8192 of 8192 32q d128"): 973.0,
    ("prefill", "4x512 of 8192 32q d128"): 502.0,
    ("prefill", "1x8192 of 8192 16q d128"): 505.0,
}


def short_table(rows: list[dict[str, Any]]) -> str:
    """The kernels that something is known to compare with, and those that failed."""
    lines: list[list[Any]] = []
    for row in rows:
        key = row["name"], row["shape"]
        if "failed" in row:
            lines.append([" ".join(key), row["failed"][:60], "", "", "", ""])
        elif row.get("target") or row.get("peer_us") or key in ELSEWHERE:
            known = ELSEWHERE.get(key) or row.get("peer_us") or ""
            whose = "FA3" if key in ELSEWHERE else row.get("peer", "")
            lines.append([" ".join(key), row["us"], row.get("target") or "", known, whose, f"{row['rate']:.2f} {row['unit']}"])
    return table("kernels, microseconds", ("kernel", "us", "target", "other", "whose", "rate"), lines)
