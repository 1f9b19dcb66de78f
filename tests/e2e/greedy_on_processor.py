"""What a CPU worker does on the processor it is started on, as JSON: `python greedy_on_processor.py
MODEL DTYPE TOKENS '[[PROMPT_ID, ...], ...]'`. MODEL is a GGUF file, or a directory with a
configuration, for random weights of 4 bits.

A program of its own, since qemu runs whole processes.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.worker.cpu.runner import Runner
from pagewire.worker.device import processor
from pagewire.worker.load import precision
from pagewire_kernels import cpu_native, cpu_target
from pagewire_protocol.messages import Admission, Step, pack, unpack
from pagewire_protocol.sampling import Sampling

BLOCKS = 4


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def greedy(runner: Runner, prompt: list[int], count: int) -> list[int]:
    sampling = Sampling(seed=0, max_tokens=count, temperature=0.0)
    admit = (
        Admission(
            0, 0, pack("i", prompt), pack("i", []), pack("i", list(range(BLOCKS))), 0, sampling
        ),
    )
    out: list[int] = []
    while len(out) < count:
        run = len(prompt) if admit else 1
        result = runner.execute(
            Step(1, len(out), admit=admit, run_slots=pack("i", [0]), run_counts=pack("i", [run]))
        )
        out += unpack("i", result.tokens)
        admit = ()
    runner.execute(Step(1, count, retire=pack("i", [0])))
    return out


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def main(path: str, dtype: Any, count: int, prompts: list[list[int]]) -> None:
    log = Lines()
    logging.getLogger("pagewire.worker").addHandler(log)
    logging.getLogger("pagewire.worker").setLevel(logging.INFO)
    file = path.endswith(".gguf")
    model = ModelConfig(
        max_model_len=64,
        load_format="auto" if file else "dummy",
        quantization="" if file else "int4",
    )
    config = WorkerConfig(device="cpu", dtype=dtype, num_kv_blocks=BLOCKS)
    runner = Runner(Path(path), model, SchedulerConfig(max_num_seqs=1), config)
    for name in cpu_native.FOR_ALL:
        cpu_native.address(name)  # which of them a run needs depends on what is fast there
    look = processor.look()
    found = {
        "half": cpu_target.converts_half(),
        "tokens": [greedy(runner, prompt, count) for prompt in prompts],
        "lines": log.lines,
        "refusal": refusal(lambda: precision.choose("bfloat16", "bfloat16", look)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
