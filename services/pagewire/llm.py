"""LLM: generation for a program, without HTTP. It starts the same services as `pagewire serve` and ends them with the program."""

import argparse
import random
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import structs

from .collect import Bar, Collector, Group
from .config import DEMO_MODEL, BadSetting, ModelConfig, RunConfig, SchedulerConfig, TokenizerConfig, WorkerConfig, read
from .engine import Engine, EngineError
from .frontend.stream import Job, Stream
from .outputs import RequestOutput
from .params import SamplingParams
from .prompts import as_chats, as_params, as_prompts
from .stack import StackConfig

__all__ = ["LLM", "EngineError"]

AHEAD = 2
"""Requests sent, in multiples of what a worker runs at once; more would only lengthen queues."""
IGNORED = ("disable_log_stats", "disable_log_requests", "swap_space", "disable_custom_all_reduce")
"""Settings of other engines that change no result."""
STRUCTS = {"run": RunConfig, "model": ModelConfig, "tokenizer": TokenizerConfig, "scheduler": SchedulerConfig, "worker": WorkerConfig}
REPLICAS = ("num_tokenizers", "num_workers")


class LLM:
    """A model ready to generate. Beside the arguments named here, `settings` takes every flag of `pagewire serve` that concerns the
    tokenizer, scheduler or worker, with underscores (`device="cpu"`, `num_kv_blocks=512`, ...).

    Raises ValueError or TypeError for wrong settings, `pagewire.hub.ModelNotFound` when the model cannot be had and EngineError when a
    service does not start. Use as a context manager, or call `shutdown`; the end of the program does it as well.
    """

    def __init__(
        self,
        model: str = DEMO_MODEL,
        *,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        download_dir: str | None = None,
        load_format: str = "auto",
        enforce_eager: bool = False,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        **settings: Any,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "settings", *_REFUSED)}
        _refuse(tokenizer_mode, tensor_parallel_size, pipeline_parallel_size, quantization)
        self._config = configure({**settings, **given})
        self._random = random.Random(seed)
        self._counter = 0
        self._engine = Engine(self._config, _say)
        self._finalizer = weakref.finalize(self, self._engine.close)
        try:
            self._roster = self._engine.wait_ready()
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[RequestOutput]:
        """Continue each prompt: str, token ids, {"prompt": str}, {"prompt_token_ids": [int]} or a list of these. Results are in the order
        of the prompts. Raises ValueError when the stack refuses a prompt, with the reason; none of the others is then returned."""
        wire = as_prompts(prompts)
        if self._config.model.skip_tokenizer_init and any(prompt.text is not None for prompt in wire):
            raise ValueError("text prompts need a tokenizer; with skip_tokenizer_init=True give {'prompt_token_ids': [...]}")
        return Batch(self, wire, as_params(sampling_params, len(wire))).run(use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"}) or each of a list of them, with the model's chat template."""
        if not self._roster.has_chat_template:
            raise ValueError(f"{self._config.model.model} has no chat template; give one as LLM(..., chat_template=FILE)")
        wire = as_chats(messages, add_generation_prompt, continue_final_message)
        return Batch(self, wire, as_params(sampling_params, len(wire))).run(use_tqdm)

    def stats(self) -> dict[str, float]:
        """The scheduler's gauges and counters, by the names that /metrics shows."""
        self._engine.check_open()
        self._engine.refresh()
        roster = self._engine.roster
        return dict(roster.stats) if roster else {}

    def pids(self) -> dict[str, int]:
        """The services' process ids by name."""
        return self._engine.pids()

    def shutdown(self) -> None:
        """End the services. Does nothing the second time."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


_REFUSED = ("tokenizer_mode", "tensor_parallel_size", "pipeline_parallel_size", "quantization")


def _refuse(tokenizer_mode: str, tensor_parallel: int, pipeline_parallel: int, quantization: str | None) -> None:
    for name, value in (("tensor_parallel_size", tensor_parallel), ("pipeline_parallel_size", pipeline_parallel)):
        if value != 1:
            raise ValueError(f"{name}={value}: only 1 is supported in this version")
    if quantization is not None:
        raise ValueError(f"quantization={quantization!r} is not supported in this version; GGUF files bring their own")
    if tokenizer_mode not in ("auto", "hf"):
        raise ValueError(f"tokenizer_mode={tokenizer_mode!r} is not supported in this version; only 'auto' is")


def configure(given: dict[str, Any]) -> StackConfig:
    """The stack's settings from keyword arguments; None means the default. Raises TypeError for an unknown name, ValueError for a value."""
    given = {key: value for key, value in given.items() if value is not None and key not in IGNORED}
    known = {field.name for kind in STRUCTS.values() for field in structs.fields(kind)} - {"run_dir", "name"}
    unknown = set(given) - known - set(REPLICAS)
    if unknown:
        raise TypeError(f"LLM() has no setting {', '.join(sorted(unknown))}")
    counts = {key: given.pop(key) for key in REPLICAS if key in given}
    unwatched = {"max_step_ms": 0.0}  # nobody waits for single tokens here
    namespace = argparse.Namespace(**{"log_level": "warning", **unwatched, **given})
    try:
        return StackConfig(**{name: read(kind, namespace) for name, kind in STRUCTS.items()}, **counts)
    except BadSetting as error:
        raise ValueError(f"{error.name}={error.value!r}: {error.reason}") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Batch:
    """One call of `generate` or `chat`: keeps the stack fed, gathers what comes."""

    def __init__(self, llm: LLM, prompts: list[Any], params: list[SamplingParams], timed: bool = False) -> None:
        self._engine, self._model = llm._engine, llm._config.model
        self._limit = AHEAD * llm._config.scheduler.max_num_seqs * llm._config.num_workers
        self._groups: list[Group] = []
        self._ended: list[Collector] = []
        self._waiting: deque[tuple[Collector, Job]] = deque()
        for place, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
            group = Group(str(llm._counter), place, prompt, chosen)
            llm._counter += 1
            self._groups.append(group)
            for index in range(chosen.n):
                self._waiting.append(
                    (Collector(group, index, timed, self._ended.append), self._job(group, index, llm._random.getrandbits(63)))
                )
        self._running: dict[Collector, tuple[Stream, Job]] = {}
        self.collectors = [collector for collector, _ in self._waiting]

    def _job(self, group: Group, index: int, seed: int) -> Job:
        params = group.params
        sampling = params.sampling(seed)
        if index and params.seed is not None:
            sampling = structs.replace(sampling, seed=(sampling.seed + index) % 2**63)
        text = params.text_options(has_text=not self._model.skip_tokenizer_init)
        return Job(group.prompt, sampling, text, max_tokens_is_rest=params.max_tokens is None)

    def run(self, use_tqdm: bool | Callable[..., Any] = False) -> list[RequestOutput]:
        self._engine.check_open()
        bar = Bar(use_tqdm, len(self._groups))
        try:
            self._engine.refresh()
            while self._waiting or self._running:
                self._feed()
                self._engine.pump()
                self._gather(bar)
        finally:
            for stream, _ in self._running.values():
                self._engine.owner.cancel(stream)
            bar.close()
        return [group.output for group in self._groups]

    def _feed(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            collector, job = self._waiting[0]
            stream = self._engine.submit(job, collector)
            if stream is None:
                return
            self._waiting.popleft()
            self._running[collector] = (stream, job)

    def _gather(self, bar: Bar) -> None:
        ended, self._ended[:] = self._ended[:], []
        for collector in ended:
            stream, job = self._running.pop(collector)
            if collector.error is None:
                self._finish(stream, collector, bar)
            elif collector.error.status == 429:
                collector.error = None
                self._waiting.append((collector, job))
            else:
                self._raise(collector)

    def _finish(self, stream: Stream, collector: Collector, bar: Bar) -> None:
        group = collector.group
        collector.completion.token_ids = stream.out.tolist()
        group.unfinished -= 1
        if not group.unfinished:
            group.output.finished = True
            group.output.metrics.finished_time = time.monotonic()
            group.output.metrics.first_token_time = min(
                (c.moments[0] for c in self.collectors if c.group is group and c.moments), default=0.0
            )
            bar.done(group.output)

    def _raise(self, collector: Collector) -> None:
        error, place = collector.error, collector.group.place
        assert error is not None
        kind = ValueError if 400 <= error.status < 500 else EngineError
        raise kind(f"prompt {place}: {error.message}")
