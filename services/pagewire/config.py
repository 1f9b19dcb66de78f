"""Every setting of every service, read in one place into frozen Structs. A flag is a field; an
unknown flag is an error.

Each service takes the Structs it needs and nothing else. `add_flags` turns a Struct into argparse
flags and `read` turns parsed flags into the Struct, so that a setting is written once.
"""

import argparse
import contextlib
import json
import os
import types
import typing
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from pagewire_protocol.agreed import MAX_STEPS_IN_FLIGHT
from pagewire_protocol.structs import MAX_TEMPLATE_KWARGS, RESERVED_TEMPLATE_KWARGS

from .checkpoint import quantization

GPU_STEP_TOKENS = 8192
CPU_STEP_TOKENS = 2048
"""Most tokens of a step where no flag says it: a longer one fills a GPU better, and a CPU is full
long before. Twice as many where steps have no limit of time: then nobody waits for single
tokens."""
LARGE_GPU = 40 << 30
SMALL_GPU_STEP_TOKENS = 2048
"""A GPU with less memory than that, in bytes, takes shorter steps: the activations of a long one
are half of what is left beside an 8B model's weights on a 24 GB card, and such cards are filled by
fewer tokens."""
USUAL_SEQS = 256
DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

QUANTIZED = f"^({'|'.join(quantization.ASKABLE)})?$"
SHORT = {
    "quantization": "-q",
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
}
REASONS = {
    "quantization": f"not supported; {', '.join(quantization.ASKABLE)} are, and without the flag whatever the weights bring",
}
"""The refusal of a wrong value, where msgspec's words would not help."""

SEVERAL = ("served_model_name",)
"""Lists whose flag takes several values at once; that of any other takes one, so that it does not
swallow a model that follows."""

S = TypeVar("S", bound=Struct)


def _help(text: str, **bounds: Any) -> Meta:
    return Meta(description=text, **bounds)


def ranks_share_a_gpu() -> bool:
    """Whether all ranks go to the first GPU, by PAGEWIRE_RANKS_SHARE_A_GPU: for tests on a machine
    with a single one. It is no way to serve: ranks wait for each other's turn on the GPU."""
    return os.environ.get("PAGEWIRE_RANKS_SHARE_A_GPU") == "1"


def default_run_dir() -> str:
    return os.environ.get("PAGEWIRE_RUN_DIR") or f"/tmp/pagewire-{os.getuid()}"


class RunConfig(Struct, frozen=True):
    run_dir: Annotated[str, _help("directory of the sockets shared by one stack's processes")] = (
        msgspec.field(default_factory=default_run_dir)
    )
    name: Annotated[
        str, _help("this process's name in the stack; default: role and process id")
    ] = ""
    log_format: Annotated[
        Literal["text", "json"], _help("text for people, or one JSON object a line")
    ] = "text"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _help("how much to log")] = (
        "info"
    )
    watchdog_timeout: Annotated[
        float,
        _help(
            "seconds without progress after which a service counts as hung, is killed and replaced; 0: never",
            ge=0,
            le=86400,
        ),
    ] = 1.8
    shutdown_delay: Annotated[
        float,
        _help(
            "seconds after SIGTERM for which this service goes on as before, while a frontend's /accepting and /ready send "
            "new requests elsewhere",
            ge=0,
            le=3600,
        ),
    ] = 0.0


class ModelConfig(Struct, frozen=True):
    model: Annotated[str, _help("model directory, GGUF file or hub id")] = DEMO_MODEL
    tokenizer: Annotated[str, _help("tokenizer directory or hub id; default: the model's")] = ""
    tokenizer_mode: Annotated[
        Literal["auto", "slow", "hf"],
        _help("accepted for compatibility: all give the same tokens here"),
    ] = "auto"
    revision: Annotated[str, _help("hub branch, tag or commit")] = ""
    tokenizer_revision: Annotated[str, _help("the same for the tokenizer; default: --revision")] = (
        ""
    )
    download_dir: Annotated[
        str, _help("where downloaded models are kept; default: the hub's cache")
    ] = ""
    load_format: Annotated[
        Literal["auto", "safetensors", "pt", "gguf", "bitsandbytes", "dummy"],
        _help(
            "weight format; auto: safetensors, else GGUF, else PyTorch's .bin files (pt); dummy: random weights N(0, 0.02)"
        ),
    ] = "auto"
    quantization: Annotated[
        str,
        _help(
            "the format of quantized weights, which is read from the checkpoint anyway; or round full ones while loading: "
            "int8, int4, bitsandbytes, bitsandbytes_8bit, fp8",
            pattern=QUANTIZED,
        ),
    ] = ""
    generation_config: Annotated[
        str,
        _help(
            "what requests get that do not say it: auto: the temperature, top_p and the like of the model's generation_config.json; "
            "vllm: OpenAI's defaults; or a directory with such a file"
        ),
    ] = "auto"
    chat_template: Annotated[
        str,
        _help("chat template: a file, the template itself, or a built-in one by name, like vicuna"),
    ] = ""
    skip_tokenizer_init: Annotated[bool, _help("serve token ids only, without a tokenizer")] = False
    trust_remote_code: Annotated[bool, _help("allow code from the model repository")] = False
    max_model_len: Annotated[
        int,
        _help(
            "longest context in tokens; auto, -1 or 0: what the model supports and memory holds",
            ge=0,
        ),
    ] = 0
    seed: Annotated[int, _help("seed of dummy weights and of requests that bring none", ge=0)] = 0


class FrontendConfig(Struct, frozen=True):
    host: Annotated[str, _help("address to listen on")] = "0.0.0.0"
    port: Annotated[int, _help("port to listen on", ge=0, le=65535)] = 8000
    served_model_name: Annotated[
        tuple[str, ...], _help("names the model answers to; default: the model as given")
    ] = ()
    api_key: Annotated[
        tuple[str, ...],
        _help(
            "an accepted API key; give the flag again for more; else PAGEWIRE_API_KEY or VLLM_API_KEY"
        ),
    ] = ()
    api_keys_file: Annotated[
        str,
        _help(
            "TOML file of further API keys by name and sha256, each with its limits (docs/security.md); read again when it changes"
        ),
    ] = ""
    ssl_keyfile: Annotated[
        str, _help("private key of the server's certificate, as PEM; with --ssl-certfile: HTTPS")
    ] = ""
    ssl_certfile: Annotated[str, _help("the server's certificate, as PEM")] = ""
    ssl_ca_certs: Annotated[
        str, _help("certificates that clients' certificates are checked against, as PEM")
    ] = ""
    ssl_cert_reqs: Annotated[
        int, _help("clients' certificates: 0 none, 1 optional, 2 required", ge=0, le=2)
    ] = 0
    allowed_origins: Annotated[
        tuple[str, ...],
        _help(
            "origins of web pages that may use this server, plain or as a JSON list; * for all (default: none but its own)"
        ),
    ] = ()
    allowed_methods: Annotated[tuple[str, ...], _help("HTTP methods that such pages may use")] = (
        "*",
    )
    allowed_headers: Annotated[tuple[str, ...], _help("HTTP headers that such pages may send")] = (
        "*",
    )
    allow_credentials: Annotated[bool, _help("such pages may send cookies and the like")] = False
    sse_keep_alive_interval: Annotated[
        float, _help("seconds after which a silent stream sends a comment; 0: never", ge=0, le=3600)
    ] = 15.0
    request_timeout: Annotated[
        float,
        _help("seconds that a request may take, waiting included; 0: no limit", ge=0, le=86400),
    ] = 0.0
    shutdown_timeout: Annotated[
        float, _help("seconds that running requests may take after SIGTERM", ge=0, le=86400)
    ] = 5.0
    enable_log_requests: Annotated[
        bool,
        _help("one log line at each request's end: id, route, status, tokens, times, reason"),
    ] = False
    enable_force_include_usage: Annotated[
        bool, _help("tell the usage in every stream, asked for or not")
    ] = False
    disable_fastapi_docs: Annotated[
        bool, _help("no description of the API at /docs and /openapi.json")
    ] = False
    max_body_mb: Annotated[int, _help("largest request body in MiB", ge=1, le=1024)] = 32
    socket_fd: Annotated[
        int, _help("a listening socket inherited from the parent process", ge=-1)
    ] = -1


class TokenizerConfig(Struct, frozen=True):
    tool_call_parser: Annotated[
        str,
        _help("how the model writes tool calls, by vLLM's names; found from its template without"),
    ] = ""
    reasoning_parser: Annotated[
        str,
        _help(
            "how the model marks its reasoning, by vLLM's names; found from its template without"
        ),
    ] = ""
    default_chat_template_kwargs: Annotated[
        str,
        _help(
            "variables of the chat template where a request does not give them, as a JSON object, like '{\"enable_thinking\": false}'"
        ),
    ] = ""


class SchedulerConfig(Struct, frozen=True):
    disable_log_stats: Annotated[
        bool, _help("no line of throughput every 10 s while there is work")
    ] = False
    max_num_seqs: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        _help(
            "most requests in one step; default: 256, on a GPU below 40 GiB 128 or 64 where the KV cache would be small for them"
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int,
        _help(
            "most tokens in one step; 0: 8192 on a GPU from 40 GiB on, else 2048", ge=0, le=1048576
        ),
    ] = 0
    max_step_ms: Annotated[
        float,
        _help(
            "time of a step with running requests, in milliseconds, to which prefill is cut on a GPU; 0: no limit",
            ge=0,
        ),
    ] = 25.0
    enable_prefix_caching: Annotated[bool, _help("share the blocks of equal prefixes")] = True
    enable_cascade: Annotated[
        bool, _help("read blocks that running requests share once for all of them (CUDA only)")
    ] = True
    steps_in_flight: Annotated[
        int,
        _help(
            "most steps sent ahead of their results; more than 2 only of short ones",
            ge=1,
            le=MAX_STEPS_IN_FLIGHT,
        ),
    ] = 4
    max_queued_tokens: Annotated[
        int, _help("prompt tokens that may wait before requests get 429", ge=1)
    ] = 4_194_304
    max_queued_reqs: Annotated[
        int, _help("requests that may wait before requests get 429", ge=1)
    ] = 16_384

    def step_tokens(self, gpu: bool, memory: int = LARGE_GPU, stages: int = 1) -> int:
        """Most tokens in one step. memory: all bytes of the GPU. stages: of the pipeline, which is
        filled and emptied by whole steps."""
        if self.max_num_batched_tokens or not gpu:
            return self.max_num_batched_tokens or CPU_STEP_TOKENS
        if memory < LARGE_GPU:
            return max(SMALL_GPU_STEP_TOKENS, self.max_num_seqs or 0)
        return GPU_STEP_TOKENS if self.max_step_ms or stages > 1 else 2 * GPU_STEP_TOKENS

    def num_seqs(self) -> int:
        """Most requests in one step, of a worker that does not say less."""
        return self.max_num_seqs or USUAL_SEQS


class WorkerConfig(Struct, frozen=True):
    device: Annotated[
        Literal["auto", "cpu", "cuda", "fake"],
        _help(
            "where the model runs; CUDA_VISIBLE_DEVICES says on which GPU; fake: a hash instead of a model, for tests"
        ),
    ] = "auto"
    tensor_parallel_size: Annotated[
        int,
        _help(
            "GPUs that one copy of the model is divided among, each with a process of its own (a rank); on a CPU: processes",
            ge=1,
            le=64,
        ),
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        _help(
            "stages of contiguous layers that one copy of the model is divided into, each --tensor-parallel-size ranks",
            ge=1,
            le=16,
        ),
    ] = 1
    distributed_executor_backend: Annotated[
        Literal["mp", "ray", "uni"],
        _help(
            "who places and starts the ranks: mp: this machine; ray: Ray, as actors (pip install 'pagewire[ray]'); uni: there is one rank"
        ),
    ] = "mp"
    dtype: Annotated[
        Literal["auto", "half", "float16", "bfloat16", "float", "float32"],
        _help("type of weights and activations"),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8", "fp8_e4m3"],
        _help(
            "type of keys and values in the KV cache; auto: that of --dtype; fp8, fp8_e4m3: 8 bits, for nearly twice the tokens, with the "
            "checkpoint's scales or 1.0"
        ),
    ] = "auto"
    block_size: Annotated[int, _help("tokens in a KV block", ge=1, le=1024)] = 16
    num_kv_blocks: Annotated[int, _help("KV blocks; 0: from free memory", ge=0)] = 0
    kv_cache_memory_bytes: Annotated[
        int,
        _help("memory for KV blocks in bytes, whatever the utilization; 0: from free memory", ge=0),
    ] = 0
    gpu_memory_utilization: Annotated[
        float, _help("share of the GPU's memory to use, what others use of it included", gt=0, le=1)
    ] = 0.9
    fit: Annotated[
        bool,
        _help(
            "where --max-model-len does not fit, cut it to what memory holds instead of giving up"
        ),
    ] = False
    cpu_kv_cache_gb: Annotated[float, _help("memory for KV blocks on a CPU, in GiB", gt=0)] = 1.0
    threads: Annotated[int, _help("CPU threads for tensor work; 0: one a core", ge=0)] = 0
    enforce_eager: Annotated[bool, _help("no CUDA graphs")] = False
    hopper_attention: Annotated[
        bool, _help("read long prompts with the kernel made for Hopper GPUs, where there is one")
    ] = True
    log_steps: Annotated[
        bool,
        _help(
            "log once a second how long steps take on the GPU and how long it waits between them"
        ),
    ] = False
    log_kernels: Annotated[
        bool,
        _help(
            "log which kernels the GPU's time went to, when the first request comes after a pause"
        ),
    ] = False
    fake_step_ms: Annotated[float, _help("fake device: time of one step in milliseconds", ge=0)] = (
        0.0
    )
    fake_vocab_size: Annotated[int, _help("fake device: vocabulary size", ge=2)] = 49152
    fake_eos_token_id: Annotated[
        int, _help("fake device: the token that ends a text; -1: none does", ge=-1)
    ] = -1

    @property
    def world_size(self) -> int:
        """Ranks of one worker."""
        return self.pipeline_parallel_size * self.tensor_parallel_size


def _plain(annotation: Any) -> Any:
    """The type alone, without bounds and without the None that stands for a default."""
    if typing.get_origin(annotation) is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _plain(typing.get_args(annotation)[0])
    return annotation


def _description(annotation: Any) -> str:
    metas = [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Meta)]
    return (metas[0].description or "") if metas else ""


def add_flags(
    parser: argparse._ActionsContainer, *structs: type[Struct], skip: tuple[str, ...] = ()
) -> None:
    """One flag a field: `max_model_len` becomes `--max-model-len`. Unset flags are absent from the
    namespace."""
    for struct in structs:
        hints = typing.get_type_hints(struct, include_extras=True)
        for field in msgspec.structs.fields(struct):
            if field.name not in skip:
                _add_flag(parser, field, hints[field.name])


def _add_flag(parser: argparse._ActionsContainer, field: Any, annotation: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    value_type = _plain(annotation)
    origin = typing.get_origin(value_type)
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    description = _description(annotation)
    default_text = " ".join(default) if isinstance(default, tuple) else default
    suffix = (
        ""
        if default_text in ("", None) or "default" in description
        else f" (default: {default_text})"
    )
    options["help"] = f"{description}{suffix}".replace("%", "%%")
    if value_type is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif origin is Literal:
        options["choices"] = typing.get_args(value_type)
    elif origin is tuple:
        options.update(
            type=as_list,
            action=_Extend,
            nargs="+" if field.name in SEVERAL else None,
            metavar=field.name.upper(),
        )
    else:
        options.update(type=_converter(field.name, value_type), metavar=value_type.__name__.upper())
    names = [flag, SHORT[field.name]] if field.name in SHORT else [flag]
    parser.add_argument(*names, **options)


def as_list(text: str) -> list[str]:
    """One value of a flag that may be given several times; a JSON list of strings is several."""
    if text.startswith("["):
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(text, type=list[str])
    return [text]


class _Extend(argparse.Action):
    """Flags given again add up."""

    def __call__(
        self,
        parser: Any,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        lists = values if self.nargs == "+" else [values]
        setattr(
            namespace,
            self.dest,
            [*getattr(namespace, self.dest, ()), *(value for one in lists for value in one)],
        )


UNITS = {
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}


def as_number(text: str) -> int:
    """A whole number, also as people write large ones: 4k is 4,000, 4K is 4,096, 1.5m is 1,500,000,
    1M is 1,048,576; as in vLLM."""
    digits, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    with contextlib.suppress(ValueError, ArithmeticError):
        value = Fraction(digits) * unit
        if value.denominator == 1 and "/" not in digits:
            return int(value)
    raise argparse.ArgumentTypeError(
        f"{text}: a whole number is needed, like 2048, 4k (4,000) or 1M (1,048,576)"
    )


def _converter(name: str, value_type: type) -> Callable[[str], Any]:
    if name == "quantization":
        return lambda text: "" if text.lower() == "none" else text
    return _whole_number(name) if value_type is int else value_type


def _whole_number(name: str) -> Callable[[str], int]:
    automatic = ("auto", "-1") if name == "max_model_len" else ()
    return lambda text: 0 if text in automatic else as_number(text)


class BadSetting(ValueError):
    """A value out of bounds. It speaks of flags; `reason` is for those who name settings
    otherwise."""

    def __init__(self, name: str, value: Any, reason: str) -> None:
        super().__init__(f"--{name.replace('_', '-')} {value}: {reason}")
        self.name = name
        self.value = value
        self.reason = reason


def template_defaults(config: TokenizerConfig) -> dict[str, Any]:
    """The variables in `default_chat_template_kwargs`. Raises BadSetting."""
    name, text = "default_chat_template_kwargs", config.default_chat_template_kwargs
    if not text:
        return {}
    try:
        given: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSetting(name, text, f"that is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadSetting(name, text, "it must be a JSON object")
    for reserved in RESERVED_TEMPLATE_KWARGS:
        if reserved in given:
            raise BadSetting(name, text, f"it must not hold {reserved!r}, which requests say apart")
    if len(text) > MAX_TEMPLATE_KWARGS:
        reason = f"{len(text)} characters, and at most {MAX_TEMPLATE_KWARGS} are allowed"
        raise BadSetting(name, f"{text[:40]}...", reason)
    return given


WORDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
ALLOWED = ("<=", "<")


def _reason(text: str, value_type: Any) -> str:
    """msgspec's complaint in a person's words."""
    words = text.split()
    if typing.get_origin(value_type) is Literal:
        return f"one of {', '.join(typing.get_args(value_type))} is needed"
    if len(words) == 4 and words[2] in WORDS:
        verb = "allowed" if words[2] in ALLOWED else "needed"
        return f"{WORDS[words[2]]} {words[3]} is {verb}"
    return text


VARIABLE_PREFIX = "PAGEWIRE_"
NO_VARIABLES = ("name", "run_dir", "socket_fd", "api_key")
"""Settings that the environment gives in another way, or not at all."""
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}  # fmt: skip


def variable_of(name: str) -> str:
    """The environment's variable of a setting: PAGEWIRE_MAX_NUM_SEQS of `max_num_seqs`."""
    return VARIABLE_PREFIX + name.upper()


def setting_of(name: str, environment: Mapping[str, str]) -> str:
    """What the environment's variable says of a setting; empty where it says nothing.

    Kubernetes gives every container the URLs of services as variables: beside a service that is
    called pagewire, PAGEWIRE_PORT is tcp://… and no setting.
    """
    text = environment.get(variable_of(name), "")
    is_service = name == "port" and text.startswith(("tcp://", "udp://", "sctp://"))
    return "" if name in NO_VARIABLES or is_service else text


def read_environment(
    structs: tuple[type[Struct], ...],
    namespace: argparse.Namespace,
    environment: Mapping[str, str],
) -> None:
    """Put settings of the environment into `namespace`, where no flag gives them. An empty variable
    counts as none. Raises BadSetting for a value that cannot be read."""
    for struct in structs:
        hints = typing.get_type_hints(struct, include_extras=True)
        for field in msgspec.structs.fields(struct):
            text = setting_of(field.name, environment)
            if not text or hasattr(namespace, field.name):
                continue
            try:
                value = _from_text(field.name, _plain(hints[field.name]), text)
            except (ValueError, argparse.ArgumentTypeError) as error:
                reason = f"{error} ({variable_of(field.name)})"
                raise BadSetting(field.name, text, reason) from None
            setattr(namespace, field.name, value)


def _from_text(name: str, value_type: Any, text: str) -> Any:
    """Raises ValueError or ArgumentTypeError."""
    if value_type is bool:
        if text.lower() not in SWITCH:
            raise ValueError("true or false is needed")
        return SWITCH[text.lower()]
    if typing.get_origin(value_type) is tuple:
        return tuple(as_list(text))
    if typing.get_origin(value_type) is Literal:
        return text
    return _converter(name, value_type)(text)


def read(struct: type[S], namespace: argparse.Namespace) -> S:
    """The Struct with the flags that were given. Raises BadSetting for the first whose value is out
    of bounds."""
    given = {
        f.name: getattr(namespace, f.name)
        for f in msgspec.structs.fields(struct)
        if hasattr(namespace, f.name)
    }
    try:
        return msgspec.convert(given, struct)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`").partition("[")[0]
        value_type = _plain(typing.get_type_hints(struct, include_extras=True)[name])
        raise BadSetting(
            name, given[name], REASONS.get(name) or _reason(text, value_type)
        ) from None


def to_flags(config: Struct) -> list[str]:
    """Command-line flags that `read` turns back into `config`; how a parent hands settings to its
    child processes."""
    flags: list[str] = []
    for field in msgspec.structs.fields(type(config)):
        value = getattr(config, field.name)
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}={one}" for one in value]
        elif value not in ("", None):
            flags.append(f"--{flag}={value}")
    return flags
