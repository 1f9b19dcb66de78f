"""The settings that vLLM has and Pagewire has not, in one table: what is accepted because it
changes no result, and what is refused.

Names are settings (`swap_space`); as flags they have dashes (`--swap-space`). A setting that a
service has is none of this table. Knows neither argparse nor processes.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any, Final, NamedTuple

ANY: Final = ("*",)
OFF: Final = ("", "none", "null", "false", "0", "0.0", "{}", "[]", "no")


class Foreign(NamedTuple):
    """`neutral`: the values that say what happens here anyway. Others are refused where `refused`,
    else accepted with a line. `switch`: a flag without a value."""

    why: str
    neutral: tuple[str, ...] = OFF
    refused: bool = False
    switch: bool = False
    short: tuple[str, ...] = ()


class Refused(ValueError):
    """A setting that would change results, or what the program can do."""

    def __init__(self, name: str, value: Any, why: str) -> None:
        super().__init__(why)
        self.name, self.value = name, value


def _each(names: str, why: str, **options: Any) -> dict[str, Foreign]:
    return {name: Foreign(why, **options) for name in names.split()}


BY_RANKS: Final = "a model is divided by --tensor-parallel-size and --pipeline-parallel-size alone in this version"
BY_RAY: Final = (
    "hosts are joined by `ray start`, and --distributed-executor-backend ray places ranks on them"
)
SEVERAL_STACKS: Final = "copies of a model on several hosts are several stacks"
NO_LORA: Final = "LoRA adapters are not supported in this version"
NO_TOOLS: Final = "tool calls are not supported in this version"
NO_IMAGES: Final = "only text is supported"
NO_SPECULATION: Final = "speculative decoding is not supported in this version"
QUANTIZATION: Final = "the checkpoint's own configuration says how its weights are quantized"
OWN_CHOICE: Final = "Pagewire has one implementation, chosen by the device"

HARMLESS: Final[dict[str, Foreign]] = {
    "disable_log_requests": Foreign(
        "requests are logged only with --enable-log-requests", switch=True
    ),
    **_each(
        "enable_auto_tool_choice enable_reasoning",
        "tool calls and reasoning are always told apart from content",
        switch=True,
    ),
    "exclude_tools_when_tool_choice_none": Foreign(
        "tools are left out of the prompt with tool_choice none in any case", switch=True
    ),
    "max_log_len": Foreign("prompts are never logged"),
    "uvicorn_log_level": Foreign("see --log-level"),
    "disable_uvicorn_access_log": Foreign("there is no access log", switch=True),
    "disable_access_log_for_endpoints": Foreign("there is no access log"),
    "log_config_file": Foreign("see --log-level"),
    **_each("enable_log_outputs enable_log_deltas", "answers are never logged", switch=True),
    **_each(
        "h11_max_incomplete_event_size h11_max_header_count",
        "a request's head may have 128 headers, and lines of 8,190 bytes",
    ),
    "swap_space": Foreign("preempted requests are computed again, not swapped"),
    **_each("cpu_offload_gb kv_offloading_size", "weights and KV blocks stay on the device"),
    "enable_chunked_prefill": Foreign("prefill always runs in chunks", ("true",), switch=True),
    **_each(
        "max_seq_len_to_capture max_context_len_to_capture max_cudagraph_capture_size",
        "CUDA graphs cover every length",
    ),
    **_each(
        "cudagraph_capture_sizes compilation_config optimization_level performance_mode", OWN_CHOICE
    ),
    **_each("attention_config kernel_config", OWN_CHOICE),
    **_each(
        "attention_backend moe_backend linear_backend mamba_backend model_impl guided_decoding_backend",
        OWN_CHOICE,
        neutral=("auto", *OFF),
    ),
    **_each(
        "disable_custom_all_reduce disable_nccl_for_dp_synchronization kv_sharing_fast_prefill enable_dbo",
        OWN_CHOICE,
        switch=True,
    ),
    **_each(
        "enable_expert_parallel",
        "ranks divide each expert between them",
        switch=True,
    ),
    **_each(
        "all2all_backend expert_placement_strategy eplb_config",
        "ranks divide each expert between them",
    ),
    **_each("enable_eplb", "ranks divide each expert between them", switch=True),
    "ray_workers_use_nsight": Foreign("no profiler is started; see --log-kernels", switch=True),
    **_each(
        "worker_use_ray engine_use_ray",
        "--distributed-executor-backend ray has Ray start the ranks",
        switch=True,
    ),
    **_each(
        "max_parallel_loading_workers num_scheduler_steps stream_interval renderer_num_workers",
        "there is nothing to set here",
    ),
    **_each(
        "use_v2_block_manager async_scheduling disable_async_output_proc enable_flashinfer_autotune "
        "disable_hybrid_kv_cache_manager log_error_stack aggregate_engine_logging",
        "there is nothing to switch",
        switch=True,
    ),
    **_each(
        "multi_step_stream_outputs enable_prompt_tokens_details use_tqdm_on_load",
        "always on",
        neutral=("true",),
        switch=True,
    ),
    **_each(
        "enable_request_id_headers enable_tokenizer_info_endpoint enable_offline_docs",
        "always on",
        neutral=("true",),
        switch=True,
    ),
    "disable_frontend_multiprocessing": Foreign(
        "the frontend is always a process of its own", switch=True
    ),
    **_each(
        "preemption_mode prefix_caching_hash_algo long_prefill_token_threshold "
        "max_num_partial_prefills max_long_partial_prefills",
        "the scheduler has one way",
    ),
    "scheduling_policy": Foreign(
        "a lower `priority` always goes first, and without one the first come", ("fcfs", *OFF)
    ),
    "hf_config_path": Foreign("configurations are read beside the weights"),
    "safetensors_load_strategy": Foreign("weights are always mapped lazily", ("lazy", *OFF)),
    "show_hidden_metrics_for_version": Foreign("no metric is hidden"),
    "otlp_traces_endpoint": Foreign("there are no traces in this version"),
    "collect_detailed_traces": Foreign("there are no traces in this version"),
    "enable_server_load_tracking": Foreign("/metrics has the load", switch=True),
    **_each(
        "kv_cache_metrics cudagraph_metrics enable_mfu_metrics",
        "/metrics has what there is",
        switch=True,
    ),
    "kv_cache_metrics_sample": Foreign("/metrics has what there is"),
    "ignore_patterns": Foreign("only what is needed is downloaded"),
    "output_tmp_dir": Foreign("run-batch writes answers to the output file as they come"),
    "enable_metrics": Foreign(
        "a server shows its metrics anyway, run-batch none", ("true",), switch=True
    ),
    "enable_sleep_mode": Foreign(
        "there is no sleep mode; without requests only the memory stays in use", switch=True
    ),
    **_each("numa_bind profiler_config additional_config", "there is nothing to set here"),
    **_each(
        "limit_mm_per_prompt mm_processor_kwargs media_io_kwargs mm_processor_cache_gb "
        "mm_processor_cache_type mm_encoder_tp_mode allowed_local_media_path allowed_media_domains",
        NO_IMAGES,
    ),
    **_each(
        "language_model_only skip_mm_profiling disable_mm_preprocessor_cache disable_chunked_mm_input",
        NO_IMAGES,
        switch=True,
    ),
}
REFUSED: Final[dict[str, Foreign]] = {
    "code_revision": Foreign("a repository's code is taken at --revision", refused=True),
    "data_parallel_size": Foreign(
        "--num-workers starts several copies of a model", ("1",), True, short=("-dp",)
    ),
    **_each(
        "data_parallel_size_local decode_context_parallel_size",
        BY_RANKS,
        neutral=("1",),
        refused=True,
    ),
    **_each("prefill_context_parallel_size", BY_RANKS, neutral=("1",), refused=True),
    "nnodes": Foreign(BY_RAY, ("1",), True),
    **_each("node_rank master_addr master_port", BY_RAY, refused=True),
    **_each(
        "data_parallel_rank data_parallel_start_rank data_parallel_address data_parallel_rpc_port",
        SEVERAL_STACKS,
        refused=True,
    ),
    **_each(
        "data_parallel_hybrid_lb data_parallel_external_lb",
        SEVERAL_STACKS,
        refused=True,
        switch=True,
    ),
    "data_parallel_backend": Foreign(SEVERAL_STACKS, ("mp", *OFF), True),
    **_each("quantization_config quantization_param_path", QUANTIZATION, refused=True),
    **_each("enable_lora fully_sharded_loras", NO_LORA, refused=True, switch=True),
    **_each(
        "lora_modules max_loras max_lora_rank max_cpu_loras lora_dtype prompt_adapters",
        NO_LORA,
        refused=True,
    ),
    **_each(
        "tool_parser_plugin reasoning_parser_plugin tool_server",
        "formats of answers are built in, and tools run where the client is",
        refused=True,
    ),
    **_each(
        "speculative_config speculative_model num_speculative_tokens spec_method spec_model spec_tokens",
        NO_SPECULATION,
        refused=True,
    ),
    **_each(
        "task runner",
        "only text generation is supported",
        neutral=("generate", "auto", *OFF),
        refused=True,
    ),
    **_each(
        "convert pooler_config override_pooler_config",
        "only text generation is supported",
        neutral=("auto", *OFF),
        refused=True,
    ),
    **_each(
        "rope_scaling rope_theta hf_overrides",
        "change config.json beside the weights instead",
        refused=True,
    ),
    "trust_request_chat_template": Foreign(
        "the chat template is the server's, see --chat-template", refused=True, switch=True
    ),
    "enable_ssl_refresh": Foreign("certificates are read at the start", refused=True, switch=True),
    "ssl_ciphers": Foreign("TLS has the ciphers that OpenSSL chooses", refused=True),
    **_each(
        "max_num_queued_reqs max_num_queued_tokens",
        "--max-queued-reqs and --max-queued-tokens bound what waits, --max-num-seqs what runs",
        refused=True,
    ),
    "override_generation_config": Foreign("give such values with each request", refused=True),
    "logits_processors": Foreign("code of the program does not run in the worker", refused=True),
    "middleware": Foreign("code of others does not run in the frontend", refused=True),
    "response_role": Foreign("answers have the role assistant", ("assistant", *OFF), True),
    "chat_template_content_format": Foreign(
        "contents of messages are handed to templates as strings", ("auto", "string", *OFF), True
    ),
    "config_format": Foreign(
        "configurations are read as transformers writes them", ("auto", "hf", *OFF), True
    ),
    "max_logprobs": Foreign("the limit is 20", ("20",), True),
    "logprobs_mode": Foreign(
        "log-probabilities are those of the model, before any parameter",
        ("raw_logprobs", *OFF),
        True,
    ),
    **_each(
        "enable_prompt_embeds tokens_only",
        "prompts are texts or token ids",
        refused=True,
        switch=True,
    ),
    **_each(
        "disable_sliding_window return_tokens_as_token_ids",
        "it would change what models see or answer",
        refused=True,
        switch=True,
    ),
    **_each(
        "kv_transfer_config kv_events_config ec_transfer_config",
        "KV blocks stay with their worker",
        refused=True,
    ),
    **_each(
        "worker_cls worker_extension_cls scheduler_cls",
        "code of others does not run in the services",
        refused=True,
    ),
    **_each(
        "model_loader_extra_config structured_outputs_config",
        "there is nothing that it could set",
        refused=True,
    ),
    "grpc": Foreign("there is only HTTP", refused=True, switch=True),
    "headless": Foreign(
        "each service alone has its own command, see `pagewire --help`", refused=True, switch=True
    ),
    **_each("uds root_path", "put a reverse proxy before the endpoint", refused=True),
}
FOREIGN: Final[Mapping[str, Foreign]] = {**HARMLESS, **REFUSED}

ALIASES: Final[dict[str, str]] = {
    # vLLM's name: the same setting here
    "num_gpu_blocks_override": "num_kv_blocks",
    "api_server_count": "num_frontends",
    "device_memory_utilization": "gpu_memory_utilization",
}
VARIABLES: Final = ("VLLM_API_KEY", "VLLM_USE_MODELSCOPE")
"""vLLM's environment variables that mean the same here."""


def judge(name: str, value: Any) -> str | None:
    """A line about a setting of the table, None where its value says what happens anyway. Raises
    Refused."""
    foreign = FOREIGN[name]
    text = str(value).strip().lower()
    if value is None or text in foreign.neutral:
        return None
    if foreign.refused:
        raise Refused(name, value, foreign.why)
    return f"has no effect: {foreign.why}"


def judge_all(
    settings: Mapping[str, Any],
    own_names: Container[str],
    written: Callable[[str, Any], str],
    environment: Mapping[str, str],
) -> list[str]:
    """A line for each of vLLM's settings and variables that is accepted without effect.
    `own_names`: the names that mean something here. `written`: a setting as its user wrote it.
    Raises Refused."""
    lines = ignored_variables(environment)
    for name, value in settings.items():
        if name in FOREIGN and name not in own_names and (line := judge(name, value)):
            lines.append(f"{written(name, value)} {line}")
    return lines


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """A line for each of vLLM's variables that is set and means nothing here."""
    return [
        f"{name} has no effect: it is a variable of vLLM's"
        for name, value in sorted(environment.items())
        if name.startswith("VLLM_") and value and name not in VARIABLES
    ]
