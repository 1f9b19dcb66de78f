"""The connections of pipeline stages, by two ranks on two GPUs: checked, then timed.

    python bench/stage_links.py [--json FILE]
    python bench/stage_links.py --one-gpu      the checks alone, by ranks that share a GPU
    python bench/stage_links.py --dry-run      order and times alone, by gloo on the CPU

It starts its ranks itself. Checked: that tensors of all sizes arrive in their order, that a sender
goes on to compute while nobody receives, and that a rank which waits for one that stopped says its
name. Timed: as much as a decode or prefill step hands on, by the receiver. The exit status is 0 when
every check passed.
"""

import argparse
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROWS: Final = (1, 16, 256, 2048, 8192)
WIDTH: Final = 4096
ROUNDS: Final = 30
REPEATS: Final = 20
PAUSE_S: Final = 2.0
"""How long the receiver stays away from a sender that goes on."""
LIMIT_S: Final = 1.0
TIMEOUT_S: Final = 240.0

Report = dict[str, Any]


def main() -> int:
    options = parse()
    device = "cpu" if options.dry_run else "cuda"
    if options.one_gpu:
        os.environ["PAGEWIRE_RANKS_SHARE_A_GPU"] = "1"
    reports = run_ranks(device, options.one_gpu)
    if options.json:
        Path(options.json).write_text(json.dumps(reports, indent=1))
    failures = [line for report in reports for line in report["failures"]]
    if len(reports) < 2:
        failures.append(f"{2 - len(reports)} ranks reported nothing")
    print("\n".join(failures))
    for report in reports:
        for row in report.get("times", []):
            print(f"{row['rows']} x {WIDTH} bf16: {row['us']:.1f} us, {row['gb_s']:.1f} GB/s")
    print(f"{sum(report['checks'] for report in reports)} checks, {len(failures)} failures")
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, by gloo")
    parser.add_argument("--one-gpu", action="store_true", help="checks alone, of ranks on one GPU")
    return parser.parse_args()


def run_ranks(device: str, one_gpu: bool) -> list[Report]:
    """A process for each rank; what each reports, by rank."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_main, args=(rank, device, one_gpu, folder, results))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        try:
            while len(reports) < 2:
                reports.append(results.get(timeout=TIMEOUT_S))
        except queue.Empty:
            print(f"only {len(reports)} of 2 ranks came to their end in {TIMEOUT_S:g} s")
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return sorted(reports, key=lambda report: report["rank"])


def rank_main(rank: int, device: str, one_gpu: bool, folder: str, results: Any) -> None:
    """A rank's whole life; an error is part of its report."""
    report: Report = {"rank": rank, "checks": 0, "failures": []}
    try:
        rank_work(rank, device, one_gpu, folder, report)
    except BaseException:
        report["failures"].append(traceback.format_exc())
    results.put(report)
    results.close()
    results.join_thread()
    os._exit(0)  # a stream may wait for ever


def rank_work(rank: int, device: str, one_gpu: bool, folder: str, report: Report) -> None:
    from pagewire.process.group import Place
    from pagewire.worker.communicators import connect_ranks
    from torch._C._distributed_c10d import FileStore

    place = Place("bench", rank, 2, "life", 0, (), ())
    ranks = connect_ranks(FileStore(f"{folder}/store", 2), place, device, 2)
    link: Any = ranks.links.following or ranks.links.previous
    sends = rank == 0
    in_order(link, sends, device, report)
    ranks.wait()
    if one_gpu:
        return
    if device == "cuda":
        goes_on(link, sends, device, report)
        ranks.wait()
    if sends:
        for rows in ROWS:
            send_all(link, rows, device)
    else:
        report["times"] = [received(link, rows, device) for rows in ROWS]
    ranks.wait()
    if device == "cpu":  # gloo notices that a rank is silent after minutes
        return
    if not sends:
        left_alone(link, device, report)
    ranks.wait()  # so long the sender is there, and silent


def in_order(link: Any, sends: bool, device: str, report: Report) -> None:
    """Each tensor has a value of its own; the sender computes on meanwhile."""
    import torch

    for number in range(ROUNDS):
        for rows in ROWS:
            wanted = torch.full((rows, WIDTH), number % 100 + rows % 7, dtype=torch.bfloat16)
            if sends:
                link.send(wanted.to(device))
                (
                    wanted.to(device) @ torch.ones(WIDTH, 8, dtype=torch.bfloat16, device=device)
                ).sum()
                continue
            x = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device=device)
            link.recv(x)
            report["checks"] += 1
            if not torch.equal(x.cpu(), wanted):
                report["failures"].append(f"round {number}: {rows} rows are not those sent")


def goes_on(link: Any, sends: bool, device: str, report: Report) -> None:
    """Two steps' tensors leave while nobody receives: neither host nor stream of the sender waits."""
    import torch

    x = torch.ones(2048, WIDTH, dtype=torch.bfloat16, device=device)
    torch.cuda.synchronize()
    if not sends:
        time.sleep(PAUSE_S)
        for _ in range(4):
            link.recv(x)
        torch.cuda.synchronize()
        return
    began = time.monotonic()
    for _ in range(4):
        link.send(x.clone())
        x @ x.T
    launched_s = time.monotonic() - began
    torch.cuda.current_stream().synchronize()
    computed_s = time.monotonic() - began
    report["checks"] += 2
    for what, seconds in (("host", launched_s), ("stream", computed_s)):
        if seconds > PAUSE_S / 2:
            report["failures"].append(f"the sender's {what} waited {seconds:.2f} s")


def send_all(link: Any, rows: int, device: str) -> None:
    """What `received` receives."""
    import torch

    x = torch.ones(rows, WIDTH, dtype=torch.bfloat16, device=device)
    for _ in range(REPEATS + 3):
        link.send(x)
    if device == "cuda":
        torch.cuda.synchronize()


def received(link: Any, rows: int, device: str) -> dict[str, float]:
    """Time of a tensor of `rows` rows, of several behind each other."""
    import torch

    x = torch.empty(rows, WIDTH, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        link.recv(x)
    seconds = seconds_on_cpu if device == "cpu" else seconds_on_gpu
    us = seconds(lambda: link.recv(x)) * 1e6 / REPEATS
    return {"rows": rows, "us": us, "gb_s": x.nbytes / us / 1e3}


def seconds_on_gpu(receive: Callable[[], None]) -> float:
    """Of REPEATS calls, by the stream's clock."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        receive()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds_on_cpu(receive: Callable[[], None]) -> float:
    """Of REPEATS calls."""
    began = time.monotonic()
    for _ in range(REPEATS):
        receive()
    return time.monotonic() - began


def left_alone(link: Any, device: str, report: Report) -> None:
    """The other rank sends nothing more. The last check: this stream waits for ever."""
    import torch
    from pagewire_kernels.communicator import CommunicatorFailed

    link.serve()
    link._limit_s = LIMIT_S
    link.recv(torch.empty(1, device=device))
    time.sleep(2 * LIMIT_S)
    report["checks"] += 1
    try:
        link.check()
        report["failures"].append("nobody was missed")
    except CommunicatorFailed as error:
        if "receiving from rank 0" not in str(error):
            report["failures"].append(str(error))


if __name__ == "__main__":
    sys.exit(main())
