"""`pagewire bench offline`: LLM.generate over random token ids."""

import itertools
import random
import sys
import time
from typing import Any

from ..cli import add_model, new_parser, read_all, take_model
from ..config import ModelConfig, SchedulerConfig, WorkerConfig, add_flags
from .figures import FIRST_ID, add_load, percentile, table, write_json


def main(arguments: list[str]) -> int:
    parser = new_parser("bench offline", "Generate from random token ids through LLM.")
    structs = (ModelConfig, SchedulerConfig, WorkerConfig)
    add_model(parser)
    add_flags(parser, *structs)
    add_load(parser, num_prompts=16)
    options = parser.parse_args(arguments)
    take_model(parser, options)
    read_all(parser.error, structs, options)
    own = ("num_prompts", "input_len", "output_len", "vocab", "json")
    settings = {key: value for key, value in vars(options).items() if key not in own}
    figures = measure(settings, options.num_prompts, options.input_len, options.output_len, options.vocab)
    print(table(f"{settings.get('model', 'demo')}: {options.num_prompts} prompts", figures))
    if options.json:
        write_json(options.json, figures)
    return 0


def measure(settings: dict[str, Any], prompts: int, input_len: int, output_len: int, vocab: int = 16_000) -> dict[str, float]:
    """Figures of one batch, after a small one to warm up; latencies in milliseconds."""
    from ..llm import LLM, Batch
    from ..params import SamplingParams
    from ..prompts import as_params, as_prompts

    make = random.Random(0)
    ids = [[make.randrange(FIRST_ID, vocab) for _ in range(input_len)] for _ in range(prompts)]
    began = time.monotonic()
    with LLM(**settings) as llm:
        ready = time.monotonic() - began
        llm.generate(
            {"prompt_token_ids": ids[0][::-1]}, SamplingParams(temperature=0, max_tokens=min(8, output_len), ignore_eos=True), False
        )
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=not settings.get("skip_tokenizer_init"))
        batch = Batch(llm, as_prompts(ids), as_params(params, prompts), timed=True)
        began = time.monotonic()
        outputs = batch.run(use_tqdm=sys.stderr.isatty())
        seconds = time.monotonic() - began
    moments = [collector.moments for collector in batch.collectors]
    first = [1000 * (m[0] - began) for m in moments]
    gaps = [1000 * (b - a) for m in moments for a, b in itertools.pairwise(m)]
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "ready_s": ready,
        "seconds": seconds,
        "input_tokens_per_s": prompts * input_len / seconds,
        "output_tokens_per_s": tokens / seconds,
        "ttft_ms_p50": percentile(first, 0.5),
        "ttft_ms_p99": percentile(first, 0.99),
        "tpot_ms_p50": percentile([1000 * (m[-1] - m[0]) / (len(m) - 1) for m in moments if len(m) > 1], 0.5),
        "gap_ms_p50": percentile(gaps, 0.5),
        "gap_ms_p99": percentile(gaps, 0.99),
    }
