"""LLM: generation for a program, without HTTP. It starts the same services as `pagewire serve` and
ends them with the program."""

import contextlib
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs
from pagewire_protocol.sampling import SamplingDefaults

from ..config import DEMO_MODEL, template_defaults
from ..process.errors import missing_package
from ..requests.model_facts import model_facts
from ..requests.retries import REQUESTS_AHEAD
from . import settings as program_settings
from .engine import Engine, EngineError
from .generation import Batch, OfflineContext
from .outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from .prompts import Entry, as_chats, as_params, as_prompts, with_priority
from .sampling_params import BeamSearchParams, SamplingParams
from .translate import beam_template, job_templates

if TYPE_CHECKING:
    from .local_tokenizer import CallTemplate

__all__ = ["LLM", "EngineError"]

Params = SamplingParams | Sequence[SamplingParams] | None
Progress = bool | Callable[..., Any]


class LLM:
    """A model ready to generate. Beside the arguments named here, `settings` takes every flag of
    `pagewire serve` that concerns the tokenizer, scheduler or worker, with underscores
    (`device="cpu"`, `num_kv_blocks=512`, ...), and vLLM's: those that change no result are accepted
    with a line, others refused.

    Raises ValueError or TypeError for wrong settings, `pagewire.hub.huggingface.ModelNotFound` when
    the model cannot be had and EngineError when a service does not start. Use as a context manager,
    or call `shutdown`; the end of the program does it as well.
    """

    def __init__(
        self,
        model: str = DEMO_MODEL,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float = 0.9,
        *,
        max_model_len: int | str | None = None,
        download_dir: str | None = None,
        load_format: str = "auto",
        chat_template: str | None = None,
        enforce_eager: bool = False,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        **settings: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "settings")}
        self._config = program_settings.configure({**settings, **named}, _print_line)
        self._random = random.Random(self._config.model.seed)
        self._next_request_number = 0
        self._tokenizer: Any = None
        self._engine = Engine(self._config, _print_line)
        self._finalizer = weakref.finalize(self, self._engine.close)
        try:
            self._roster = self._engine.wait_ready()
        except BaseException:
            self.shutdown()
            raise
        scheduler = self._config.scheduler
        facts = model_facts(self._roster)
        self._sampling_defaults = facts.sampling_defaults
        self._context = OfflineContext(
            self._engine,
            # SamplingParams say everything; the model's defaults are those of a call without any.
            structs.replace(facts, sampling_defaults=SamplingDefaults()),
            REQUESTS_AHEAD * scheduler.num_seqs() * self._config.num_workers,
            self._random.getrandbits,
            self._new_request_id,
        )

    def generate(
        self,
        prompts: Any = None,
        sampling_params: Params = None,
        prompt_token_ids: Any = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt: str, token ids, {"prompt": str}, {"prompt_token_ids": [int]} or a
        list of these. `prompt_token_ids` is the older way to give ids, instead of `prompts` or
        beside them. Results are in the order of the prompts. Raises ValueError when the stack
        refuses a prompt, with the reason; none of the others is then returned."""
        _refuse(lora_request=lora_request)
        entries = as_prompts(prompts, prompt_token_ids)
        if priority is not None:
            if len(priority) != len(entries):
                raise ValueError(
                    f"{len(entries)} prompts but {len(priority)} priorities; give one for each"
                )
            entries = [
                with_priority(entry, number, index)
                for index, (entry, number) in enumerate(zip(entries, priority, strict=True))
            ]
        self._check_text(entries)
        return self.batch(entries, self._params(sampling_params, len(entries))).run(use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"}) or each of a list of them, with
        the model's chat template or, for this call, the one given: a template, a file with one, or
        the name of a built-in one, whose ends of turns end the answers too. `tools` are shown to
        the model; a call that it makes is in the text, as the model writes it."""
        _refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        if chat_template_content_format not in ("auto", "string"):
            raise ValueError(
                f"chat_template_content_format={chat_template_content_format!r} is not supported; "
                "'auto' and 'string' are"
            )
        template = self._template_of_call(chat_template)
        entries = as_chats(
            messages,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs,
            template.render if template else None,
            tools,
        )
        params = self._params(sampling_params, len(entries))
        if template:
            model_ends = self._context.model.eos_token_ids
            ends = [token for token in template.end_token_ids if token not in model_ends]
            params = [each.stopping_at(ends) for each in params]
        return self.batch(entries, params).run(use_tqdm)

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: Progress = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, by the rules of transformers' beam
        search. At most `concurrency_limit` prompts are searched at a time."""
        _refuse(lora_request=lora_request)
        entries = as_prompts(prompts)
        self._check_text(entries)
        template = beam_template(params, self._context.model)
        size = concurrency_limit or max(1, len(entries))
        outputs: list[BeamSearchOutput] = []
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            batch = Batch(self._context, part, [template] * len(part), with_prompt_text=True)
            batch.run(use_tqdm)
            outputs += [
                _hypotheses(run.prompt_text, group.output) for run, group in batch.searches.items()
            ]
        return outputs

    def batch(
        self, entries: Sequence[Entry], params: Sequence[SamplingParams], *, timed: bool = False
    ) -> Batch:
        """One call of `generate`, not run yet; `timed` notes the moment of every token. Raises
        ValueError where the model cannot serve the parameters."""
        templates = job_templates(params, self._context.model)
        return Batch(self._context, entries, templates, timed=timed)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as one of transformers' (imported now), with the chat template that
        this LLM uses."""
        if self._tokenizer is None:
            self._need_text()
            with _named_packages():
                from .local_tokenizer import as_transformers

                self._tokenizer = as_transformers(
                    self._engine.tokenizer_path, self._config.model.chat_template
                )
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """New parameters with the defaults of the model's generation_config.json, and Pagewire's
        for what it does not say (all of them with `generation_config="vllm"`)."""
        stated = structs.asdict(self._sampling_defaults)
        return SamplingParams(
            **{name: value for name, value in stated.items() if value is not None}
        )

    def stats(self) -> dict[str, float]:
        """The scheduler's gauges and counters, by the names that /metrics shows."""
        with self._engine.held():
            self._engine.refresh()
            roster = self._engine.roster
        return dict(roster.stats) if roster else {}

    def pids(self) -> dict[str, int]:
        """The services' process ids by name."""
        return self._engine.pids()

    def shutdown(self) -> None:
        """End the services. Does nothing the second time."""
        self._finalizer()

    def _params(self, params: Params, count: int) -> list[SamplingParams]:
        return as_params(self.get_default_sampling_params() if params is None else params, count)

    def _new_request_id(self) -> str:
        number = self._next_request_number
        self._next_request_number += 1
        return str(number)

    def _check_text(self, entries: Sequence[Entry]) -> None:
        if any(entry.prompt.text is not None for entry in entries):
            self._need_text()

    def _need_text(self) -> None:
        if self._config.model.skip_tokenizer_init:
            raise ValueError(
                "text prompts need a tokenizer; with skip_tokenizer_init=True give {'prompt_token_ids': [...]}"
            )

    def _template_of_call(self, chat_template: str | None) -> "CallTemplate | None":
        """None: the model's own. Raises ValueError where it has none."""
        if chat_template is None:
            if not self._roster.has_chat_template:
                raise ValueError(
                    f"{self._config.model.model} has no chat template; "
                    "give one as LLM(..., chat_template=FILE)"
                )
            return None
        self._need_text()
        with _named_packages():
            from .local_tokenizer import call_template

            defaults = template_defaults(self._config.tokenizer)
            return call_template(self._engine.tokenizer_path, chat_template, defaults)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _refuse(**unsupported: Any) -> None:
    for name, value in unsupported.items():
        if value:
            raise ValueError(f"{name} is not supported in this version")


def _hypotheses(prompt_text: str, output: RequestOutput) -> BeamSearchOutput:
    return BeamSearchOutput(
        [
            BeamSearchSequence(
                tokens=output.prompt_token_ids + completion.token_ids,
                logprobs=completion.logprobs or [],
                cum_logprob=completion.cumulative_logprob or 0.0,
                text=(prompt_text or output.prompt or "") + completion.text,
                finish_reason=completion.finish_reason,
                stop_reason=completion.stop_reason,
            )
            for completion in output.outputs
        ]
    )


@contextlib.contextmanager
def _named_packages() -> Iterator[None]:
    """Within the context, the error of a missing package says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing_package(error), name=error.name) from None


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
