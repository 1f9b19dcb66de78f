"""Collective operations on all GPUs of this machine: checked, then timed beside torch's and NCCL's.

    python bench/collectives.py [--ranks 2] [--json FILE]
    python bench/collectives.py --dry-run      the checks alone, in Triton's interpreter
    python bench/collectives.py --one-gpu      the checks alone, by ranks that share a GPU

It starts its ranks itself. Checked: every kernel against its oracle, the same bits on all ranks,
and the same bits again from replays of a captured graph; last, that ranks which wait for one that
stopped end with its name. Timed: as much as a decode or prefill step adds up, in captured graphs,
the slowest rank. The table comes last; the exit status is 0 when every check passed.
"""

import argparse
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
TESTS: Final = ROOT / "tests"
sys.path.insert(0, str(TESTS))

WIDTH: Final = 8192
ROWS: Final = (1, 16, 64, 256, 2048)
TARGETS_US: Final = {(1, 2): 6.5, (1, 4): 7.5, (64, 2): 10.0, (64, 4): 14.0}
"""All-reduce, addition and norm, by rows and ranks. 2048 rows: as NCCL, or better."""
EPS: Final = 1e-5
REPEATS: Final = 50
LIMIT_S: Final = 1.0
TIMEOUT_S: Final = 480.0
BUFFER_BYTES: Final = 1 << 25

Report = dict[str, Any]


def main() -> int:
    options = parse()
    if options.dry_run:
        return dry_run(options.ranks or 2)
    import torch

    ranks = options.ranks or (2 if options.one_gpu else torch.cuda.device_count())
    if ranks < 2 or (ranks > torch.cuda.device_count() and not options.one_gpu):
        print(
            f"{torch.cuda.device_count()} GPUs here, and {ranks} ranks asked for; at least 2 are needed"
        )
        return 2
    reports = run_ranks(ranks, options.one_gpu)
    if options.json:
        Path(options.json).write_text(json.dumps(reports, indent=1))
    failures = judge(reports, ranks)
    print("\n".join(failures[:40]))
    if reports and reports[0].get("times"):
        print(table(reports[0], ranks))
    print(f"{len(failures)} failures of checks")
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, help="default: all GPUs")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, checks alone")
    parser.add_argument("--one-gpu", action="store_true", help="checks alone, of ranks on one GPU")
    return parser.parse_args()


def dry_run(ranks: int) -> int:
    """The checks by processes of the CPU."""
    paths = [str(ROOT / part) for part in ("protocol", "kernels", "services")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(TESTS / "ops/collective_ranks.py"), str(ranks)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    reports = [
        {"rank": rank, "checks": [line for line in lines if line["rank"] == rank]}
        for rank in range(ranks)
    ]
    failures = judge(reports, ranks)
    if done.returncode:
        failures.append(f"the ranks ended with status {done.returncode}")
    print("\n".join(failures))
    print(f"{len(lines)} checks of {ranks} ranks, {len(failures)} failures")
    return 1 if failures else 0


def run_ranks(ranks: int, one_gpu: bool) -> list[Report]:
    """A process for each rank; what each reports, by rank."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=rank_main, args=(rank, ranks, one_gpu, f"{folder}/store", results)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        reports: list[Report] = []
        try:
            while len(reports) < ranks:
                reports.append(results.get(timeout=TIMEOUT_S))
        except queue.Empty:
            print(f"only {len(reports)} of {ranks} ranks came to their end in {TIMEOUT_S:g} s")
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return sorted(reports, key=lambda report: report["rank"])


def rank_main(rank: int, ranks: int, one_gpu: bool, store: str, results: Any) -> None:
    """A rank's whole life; an error is part of its report."""
    report: Report = {"rank": rank, "checks": []}
    try:
        rank_work(rank, ranks, one_gpu, store, report)
    except BaseException:
        report["error"] = traceback.format_exc()
    results.put(report)


def rank_work(rank: int, ranks: int, one_gpu: bool, store: str, report: Report) -> None:
    import torch
    from ops import collective_cases  # pyright: ignore[reportMissingImports]
    from pagewire_kernels import cuda_communicator
    from pagewire_kernels.symmetric_communicator import SymmetricCommunicator
    from pagewire_kernels.symmetric_memory import Layout
    from torch._C._distributed_c10d import FileStore

    device = torch.device("cuda", 0 if one_gpu else rank)
    layout = Layout(ranks, buffer_bytes=BUFFER_BYTES)
    connect = cuda_communicator.connect_on_one_gpu if one_gpu else cuda_communicator.connect
    communicator = connect(FileStore(store, ranks), rank, ranks, device, layout)
    if not isinstance(communicator, SymmetricCommunicator):
        raise RuntimeError("no symmetric memory here: everything would go through NCCL")
    report["sums"] = list(communicator.sums.ways)
    report["gathers"] = list(communicator.gathers.ways)
    memory = communicator.memory
    for case in collective_cases.CASES:
        if case != "many generations":  # it sets the generation, so it is the last
            report["checks"].append(
                collective_cases.run(memory, device, collective_cases.REAL, case)
            )
    torch.use_deterministic_algorithms(False)
    report["checks"].append(replayed(communicator, device))
    if not one_gpu:
        report["times"] = times(communicator, device)
    report["checks"].append(
        collective_cases.run(memory, device, collective_cases.REAL, "many generations")
    )
    report["checks"].append(stopped(communicator))


def replayed(communicator: Any, device: Any) -> Report:
    """Three sums with norms in a graph, so that buffers alternate between replays too: with new
    inputs each time, as the same operations outside; twice with the same."""
    import hashlib

    import torch
    from pagewire_kernels import reference
    from pagewire_kernels.symmetric_communicator import SUMS

    failures: list[str] = []
    digest = hashlib.sha256()
    for way, kernel in SUMS.items():
        generator = torch.Generator().manual_seed(1)
        x = torch.zeros(3, WIDTH, dtype=torch.bfloat16, device=device)
        kernel(communicator.memory, x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [kernel(communicator.memory, x * factor) for factor in (1, 2, 4)]
        for number in range(100):
            parts = [
                torch.randn(3, WIDTH, generator=generator).bfloat16().to(device)
                for _ in range(communicator.size)
            ]
            wanted = reference.all_reduce(parts)
            for again in (1, 2):
                x.copy_(parts[communicator.rank])
                for out in outs:
                    out.fill_(float("nan"))
                graph.replay()
                for factor, out in zip((1, 2, 4), outs, strict=True):
                    if not torch.equal(out, wanted * factor):  # exact: powers of two
                        failures.append(f"{way}: replay {number}.{again}, factor {factor}")
                    digest.update(out.cpu().view(torch.uint8).numpy().tobytes())
    return {"case": "replayed", "failures": failures, "digest": digest.hexdigest()}


def stopped(communicator: Any) -> Report:
    """The last rank stays away."""
    import torch
    from pagewire_kernels.communicator import CommunicatorFailed

    communicator.memory.set_timeout(LIMIT_S)
    torch.cuda.synchronize()
    failures: list[str] = []
    last = communicator.size - 1
    if communicator.rank != last:
        x = torch.ones(4, WIDTH, dtype=torch.bfloat16, device="cuda")
        for _ in range(10):
            communicator.all_reduce(x)
        torch.cuda.synchronize()
        try:
            communicator.check()
            failures.append(f"rank {communicator.rank}: nobody was missed")
        except CommunicatorFailed as error:
            if f"for rank {last}:" not in str(error):
                failures.append(f"rank {communicator.rank}: {error}")
    return {"case": "stopped", "failures": failures, "digest": ""}


def times(communicator: Any, device: Any) -> list[dict[str, Any]]:
    """Microseconds of each way by rows."""
    from pagewire_kernels.cuda_communicator import time_captured

    return [
        {
            "rows": rows,
            **{
                name: round(time_captured(call, REPEATS) * 1e6, 2)
                for name, call in timed_calls(communicator, device, rows).items()
            },
        }
        for rows in ROWS
    ]


def timed_calls(communicator: Any, device: Any, rows: int) -> dict[str, Callable[[], Any]]:
    """Each way by its name, over the same inputs."""
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem
    from pagewire_kernels import norm
    from pagewire_kernels.all_reduce import AddNorm, takes_low_latency
    from pagewire_kernels.symmetric_communicator import SUMS

    group: Any = dist.group.WORLD
    memory = communicator.memory
    weight = torch.ones(WIDTH, dtype=torch.bfloat16, device=device)
    x = torch.randn(rows, WIDTH, device=device).bfloat16()
    residual = torch.randn(rows, WIDTH, device=device).bfloat16()
    shared: Any = symm_mem.empty(rows, WIDTH, dtype=torch.bfloat16, device=device)
    symm_mem.rendezvous(shared, group.group_name)
    shared.copy_(x)

    def then_norm(all_reduce: Callable[[Any], Any]) -> Any:
        return norm.add_rms_norm(all_reduce(x), residual, weight, EPS)

    def torch_sum(name: str) -> Any:
        return getattr(torch.ops.symm_mem, name)(shared, "sum", group.group_name)

    after = AddNorm(residual, weight, EPS)
    calls: dict[str, Callable[[], Any]] = {}
    for way, kernel in SUMS.items():
        if way != "low-latency" or takes_low_latency(memory, x):
            calls[way] = lambda kernel=kernel: kernel(memory, x, after)
            calls[f"{way} alone"] = lambda kernel=kernel: kernel(memory, x)
    calls["chosen"] = lambda: communicator.all_reduce_add_norm(x, residual, weight, EPS)
    calls["chosen, norm apart"] = lambda: then_norm(communicator.all_reduce)
    calls["nccl, norm apart"] = lambda: then_norm(communicator.library.all_reduce)
    calls["nccl alone"] = lambda: communicator.library.all_reduce(x)
    calls["torch one-shot"] = lambda: torch_sum("one_shot_all_reduce")
    calls["torch two-shot"] = lambda: torch_sum("two_shot_all_reduce_")
    return calls


def judge(reports: list[Report], ranks: int) -> list[str]:
    """What was wrong, in lines."""
    failures = [str(report["error"]) for report in reports if report.get("error")]
    if len(reports) < ranks:
        failures.append(f"{ranks - len(reports)} ranks reported nothing")
    digests: dict[str, set[str]] = {}
    for report in reports:
        for check in report["checks"]:
            failures += check.get("failures", [])
            digests.setdefault(check["case"], set()).add(check.get("digest", ""))
    failures += [
        f"{case}: ranks have other bits" for case, each in digests.items() if len(each) > 1
    ]
    return failures


def table(report: Report, ranks: int) -> str:
    """Columns of the ways, rows of the sizes, and what was aimed at."""
    names = list(dict.fromkeys(name for row in report["times"] for name in row))
    lines = [
        f"all-reduce from bytes on: {report['sums']}",
        f"all-gather from bytes on: {report['gathers']}",
        f"microseconds of [rows, {WIDTH}] bfloat16 on {ranks} GPUs, the slowest rank; target: chosen",
        " | ".join([*names, "target"]),
    ]
    for row in report["times"]:
        target: Any = TARGETS_US.get((row["rows"], ranks), "")
        if row["rows"] == ROWS[-1]:
            target = f"nccl {row['nccl, norm apart']}"
        lines.append(" | ".join([*(str(row.get(name, "-")) for name in names), str(target)]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
