"""`pagewire bench kernels`: checks every GPU kernel against a float32 oracle and times it beside
other libraries' kernels.

Times are medians over replays of a CUDA graph of many launches that rotate through inputs larger
than the L2 cache. Other processes compile first, so that compilation uses all cores.
"""

import argparse
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from ..cli import Parser, new_parser, positive
from . import machine
from .options import say
from .stats import table, write_json

if TYPE_CHECKING:
    from .ops.case import Job

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
TOLERANCE = 0.02
"""Of the relative error of a kernel in bf16; five times what rounding explains."""
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """The command's exit status: 1 where a kernel's results are wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not has_gpu():
        raise OSError(
            "the kernels run on a GPU only, and torch sees none here; `pagewire doctor` says more"
        )
    from .ops.jobs import jobs

    all_jobs = jobs()
    only = options.only.split(",") if options.only else []
    chosen = [job for job in all_jobs if not only or job.name in only]
    if not chosen:
        names = ", ".join(sorted({job.name for job in all_jobs}))
        parser.error(f"argument --only: {options.only}: one of {names} is needed")
    if options.part:
        compile_part(chosen, options)
        return 0
    compile_all(options)
    rows = measure_all(chosen, options)
    print(full_table(rows), short_table(rows), sep="\n\n")
    return 1 if any("failed" in row for row in rows) else 0


def _parser() -> Parser:
    parser = new_parser(
        "bench kernels", "Check every GPU kernel against a float32 oracle and time it. Needs a GPU."
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="LIST",
        help="names of kernels, like decode,gemm (default: all)",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="try launch shapes as well, and print the best ones"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=12,
        metavar="N",
        help="that compile at once (default: 12)",
    )
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "--json",
        default="",
        metavar="FILE",
        help="also write the figures to this file, after each kernel",
    )
    return parser


def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


# --- compiling ---


def compile_all(options: argparse.Namespace) -> None:
    command = [
        sys.executable,
        "-m",
        "pagewire",
        "bench",
        "kernels",
        *(["--sweep"] if options.sweep else []),
        "--only",
        options.only,
    ]
    running = [
        subprocess.Popen([*command, "--part", f"{i}/{options.processes}"])
        for i in range(options.processes)
    ]
    for process in running:
        process.wait()
    say("compiled")


def compile_part(chosen: "list[Job]", options: argparse.Namespace) -> None:
    """This process's share. A whole layer has kernels that other jobs compile, cuBLAS has none to
    compile."""
    import torch

    from .ops import inputs

    part, parts = map(int, options.part.split("/"))
    work = [
        (job, config)
        for job in chosen
        if job.name not in ("layer", "product")
        for config in [None, *shapes_of(job, options.sweep)]
    ]
    for job, config in work[part::parts]:
        try:
            job.make().launch(0, config)
            torch.cuda.synchronize()
        except Exception as problem:
            say(f"compiling {job.name} {job.shape} {config or ''}: {str(problem)[:200]}")
        inputs.forget()


def shapes_of(job: "Job", sweep: bool) -> list[Any]:
    """Launch shapes are searched where there is a target or a peer; other shapes take what those
    found."""
    return (
        job.configs
        if sweep and (job.target is not None or job.name in ("gemm", "decode", "prefill"))
        else []
    )


# --- measuring ---


def measure_all(chosen: "list[Job]", options: argparse.Namespace) -> list[Row]:
    import torch

    torch.manual_seed(int(time.time()))
    rows: list[Row] = []
    for job in chosen:
        row: Row = {
            "name": job.name,
            "shape": job.shape,
            "target": job.target,
            "unit": job.unit,
            "peer": job.peer,
        }
        rows.append(row)
        try:
            row |= measure(job, options.sweep)
        except Exception as problem:
            row["failed"] = str(problem)[:300]
        torch.cuda.empty_cache()
        if options.json:
            write_json(
                options.json,
                {
                    "kind": "kernels",
                    "machine": machine.describe() if len(rows) == len(chosen) else {},
                    "rows": rows,
                },
            )
    say(f"measured {len(rows)} kernels on {torch.cuda.get_device_name()}")
    return rows


def measure(job: "Job", sweep: bool) -> Row:
    from .ops.case import graph_us

    case = job.make()
    wrong = case.check()
    us = graph_us(case.launch, case.sets)
    row: Row = {"us": us, "rate": job.work / us / 1e6, "error": wrong}
    if job.peer:
        row["peer_us"] = graph_us(case.other, case.sets)
    tried: list[tuple[float, str]] = []
    for config in shapes_of(job, sweep):
        try:
            bad = case.check(config)
            tried.append(
                (
                    graph_us(lambda i, config=config: case.launch(i, config), case.sets, 1500.0),
                    f"{config} error {bad:.1e}",
                )
            )
        except Exception as problem:
            say(f"{job.name} {job.shape} {config}: {str(problem)[:100]}")
    for us, text in sorted(tried):
        say(f"{job.name} {job.shape} {us:8.1f} us {text}")
    return row


# --- tables ---


def full_table(rows: list[Row]) -> str:
    lines: list[list[Any]] = []
    for row in rows:
        if "failed" in row:
            lines.append([row["name"], row["shape"], row["failed"], "", "", "", "", ""])
        else:
            rate = f"{row['rate']:.2f} {row['unit']}"
            wrong = f"{row['error']:.1e}"
            lines.append(
                [
                    row["name"],
                    row["shape"],
                    row["us"],
                    row["target"] or "",
                    rate,
                    wrong,
                    row.get("peer_us", ""),
                    row["peer"],
                ]
            )
    return table(
        "kernels", ("kernel", "shape", "us", "target", "rate", "error", "us", "peer"), lines
    )


def short_table(rows: list[Row]) -> str:
    """The kernels that something is known to compare with, and those that failed or are wrong."""
    lines: list[list[Any]] = []
    for row in rows:
        key = row["name"], row["shape"]
        known, whose = (
            (ELSEWHERE[key], "FA3") if key in ELSEWHERE else (row.get("peer_us", ""), row["peer"])
        )
        if "failed" in row:
            lines.append([" ".join(key), row["failed"][:60], "", "", "", "", ""])
        elif is_wrong(row) or row["target"] or (known and not row["shape"].endswith(("M2", "M4"))):
            wrong = f"error {row['error']}" if is_wrong(row) else ""
            lines.append(
                [
                    " ".join(key),
                    row["us"],
                    row["target"] or "",
                    known,
                    whose,
                    f"{row['rate']:.2f} {row['unit']}",
                    wrong,
                ]
            )
    return table(
        "kernels, microseconds",
        ("kernel", "us", "target", "other", "whose", "rate", "wrong"),
        lines,
    )


def is_wrong(row: Row) -> bool:
    """A NaN is, and so is what JSON made of it."""
    return row["error"] is None or not row["error"] <= TOLERANCE
