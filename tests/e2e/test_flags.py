"""The command line of `pagewire serve`: the tutorials' spellings, vLLM's names, files of settings,
and what is said of the rest."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pagewire.config import template_defaults
from pagewire.launch.serve import flags
from pagewire.launch.stack import StackConfig
from pagewire.launch.vllm_compat import ALIASES, HARMLESS, REFUSED
from pagewire.offline.settings import configure

DOCS = Path(__file__).parents[2] / "docs"
OWN = {name for struct in flags.STRUCTS for name in struct.__struct_fields__}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "VLLM_USE_MODELSCOPE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def parse(*arguments: str) -> tuple[StackConfig, list[str]]:
    lines: list[str] = []
    config, _ = flags.parse(flags.new("serve", ""), list(arguments), lines.append)
    return config, lines


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said."""
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


TUTORIALS = [
    (
        "--model /input0/Qwen-1_8B-Chat/ --host 0.0.0.0 --port 8080 --dtype auto --max-num-seqs 32 --max-model-len 4096"
        " --tensor-parallel-size 1 --trust-remote-code",
        {
            "model": "/input0/Qwen-1_8B-Chat/",
            "port": 8080,
            "max_num_seqs": 32,
            "max_model_len": 4096,
            "trust_remote_code": True,
        },
        0,
    ),
    (
        "--model=google/gemma-2b",
        {"model": "google/gemma-2b", "host": "0.0.0.0", "port": 8000, "dtype": "auto"},
        0,
    ),
    (
        "--host 0.0.0.0 --port 80 --model google/gemma-2b --dtype=half",
        {"port": 80, "dtype": "half"},
        0,
    ),
    (
        "/models/model --tensor-parallel-size 1 --max-model-len 16384 --port 8102 --enforce-eager",
        {"enforce_eager": True},
        0,
    ),
    (
        "microsoft/phi-1_5 --trust-remote-code --host 0.0.0.0 --port 8000",
        {"model": "microsoft/phi-1_5"},
        0,
    ),
    ("M --distributed-executor-backend=ray", {"model": "M"}, 1),
    (
        "M --pipeline-parallel-size 1 --gpu-memory-utilization 0.85 --max-num-batched-tokens 4096",
        {"max_num_batched_tokens": 4096},
        0,
    ),
    ("M --disable-log-requests --served-model-name NAME", {"served_model_name": ("NAME",)}, 1),
    (
        "--model /models/qwen/Qwen2-7B-Instruct  --served-model-name Qwen2-7B-Instruct --max-model-len=2048",
        {
            "model": "/models/qwen/Qwen2-7B-Instruct",
            "served_model_name": ("Qwen2-7B-Instruct",),
            "max_model_len": 2048,
        },
        0,
    ),
]


@pytest.mark.parametrize(("line", "wanted", "said"), TUTORIALS)
def test_the_commands_of_the_tutorials(line: str, wanted: dict[str, Any], said: int) -> None:
    config, lines = parse(*line.split())
    parts = (config.model, config.frontend, config.scheduler, config.worker)
    for name, value in wanted.items():
        assert next(getattr(part, name) for part in parts if hasattr(part, name)) == value
    assert len(lines) == said


def test_the_hub_s_token_goes_into_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "old")
    _, lines = parse("M", "--hf-token", "new")
    assert os.environ["HF_TOKEN"] == "new" and not lines


def test_variables_of_the_chat_template_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    flag = "--default-chat-template-kwargs"
    config, lines = parse("M", flag, '{"enable_thinking": false}')
    assert template_defaults(config.tokenizer) == {"enable_thinking": False} and not lines
    for value, words in [
        ("{", "that is no JSON"),
        ("[1]", "must be a JSON object"),
        ('{"messages": []}', "'messages', which requests say apart"),
        (json.dumps({"a": "x" * 70_000}), "at most 65536"),
    ]:
        assert words in refused(capsys, "M", flag, value)
    given = configure({"model": "M", "default_chat_template_kwargs": {"enable_thinking": False}})
    assert template_defaults(given.tokenizer) == {"enable_thinking": False}
    with pytest.raises(ValueError, match="must be a JSON object"):
        configure({"model": "M", "default_chat_template_kwargs": "1"})


def test_flags_of_vllm_s_servers_are_known() -> None:
    """Each is a setting here, or has a line that says what it means."""
    names = (
        "disable_fastapi_docs enable_log_outputs log_config_file h11_max_header_count "
        "enable_tokenizer_info_endpoint enable_ssl_refresh ssl_ciphers master_port "
        "default_chat_template_kwargs trust_request_chat_template max_num_queued_reqs "
        "data_parallel_hybrid_lb enable_eplb kv_cache_metrics allowed_local_media_path"
    )
    assert set(names.split()) <= OWN | set(HARMLESS) | set(REFUSED)


@pytest.mark.parametrize("name", sorted(set(HARMLESS) - OWN))
def test_what_changes_no_result_is_accepted_with_one_line(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    value = () if HARMLESS[name].switch else ("7",)
    if name == "enable_chunked_prefill":
        flag = "--no-enable-chunked-prefill"
    if "true" in HARMLESS[name].neutral:
        flag = flag.replace("--", "--no-", 1) if not flag.startswith("--no-") else flag
    _, lines = parse("M", flag, *value)
    assert (
        len(lines) == 1
        and "has no effect: " in lines[0]
        and lines[0].startswith(("--" + name.replace("_", "-")) + " ")
    )


@pytest.mark.parametrize("name", sorted(set(REFUSED) - OWN))
def test_what_would_change_results_is_refused_in_one_line_and_neutral_values_are_not(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, foreign = "--" + name.replace("_", "-"), REFUSED[name]
    line = refused(capsys, "M", flag, *(() if foreign.switch else ("7",)))
    assert foreign.why in line and flag in line
    for value in foreign.neutral:
        assert (
            parse("M", flag.replace("--", "--no-", 1) if foreign.switch else f"{flag}={value}")[1]
            == []
        )


def test_short_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("M", "-tp", "1", "-pp", "1", "-dp", "1", "-q", "None")[1] == []
    assert parse("M", "-tp", "2", "--device", "cpu")[0].worker.tensor_parallel_size == 2
    assert parse("M", "-pp", "2", "--device", "cpu")[0].worker.pipeline_parallel_size == 2
    assert "--data-parallel-size 2: --num-workers starts" in refused(capsys, "M", "-dp", "2")
    assert "--quantization quip: not supported; awq" in refused(capsys, "M", "-q", "quip")


def test_another_name_for_the_same_setting() -> None:
    config, _ = parse(
        "M", "--num-gpu-blocks-override", "99", "--api-server-count", "3", "--disable-cascade-attn"
    )
    assert (config.worker.num_kv_blocks, config.num_frontends, config.scheduler.enable_cascade) == (
        99,
        3,
        False,
    )
    assert set(ALIASES.values()) <= OWN | {"num_frontends"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2048", 2048),
        ("4k", 4000),
        ("4K", 4096),
        ("1M", 1048576),
        ("1m", 1000000),
        ("1.5k", 1500),
        ("25.6k", 25600),
        ("auto", 0),
        ("-1", 0),
    ],
)
def test_numbers_as_people_write_them(text: str, value: int) -> None:
    assert parse("M", f"--max-model-len={text}")[0].model.max_model_len == value
    assert parse("M", "--max-model-len", text)[0].model.max_model_len == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "1/2k", "4kk", "0x10", "1.0001k", "nan"])
def test_what_is_no_number_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a whole number is needed" in refused(capsys, "M", f"--max-model-len={text}")


def test_underscores_are_taken_for_dashes() -> None:
    config, _ = parse(
        "M",
        "--max_model_len=4k",
        "--trust_remote_code",
        "--served_model_name",
        "with_underscores",
        "--chat_template=a_b",
    )
    assert config.frontend is not None
    assert (config.model.max_model_len, config.model.trust_remote_code) == (4000, True)
    assert (config.frontend.served_model_name, config.model.chat_template) == (
        ("with_underscores",),
        "a_b",
    )


def test_a_key_does_not_swallow_the_model() -> None:
    config, _ = parse("--api-key", "one", "--api-key=-two", "M")
    assert config.frontend is not None
    assert (config.frontend.api_key, config.model.model) == (("one", "-two"), "M")


def test_mistakes_are_named_with_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown flag --max-model-length; did you mean --max-model-len?" in refused(
        capsys, "M", "--max-model-length", "5"
    )
    assert "one argument too many: N" in refused(capsys, "M", "N")
    assert "two models given: M and --model N" in refused(capsys, "M", "--model", "N")
    assert "expected one argument" in refused(capsys, "M", "--quantization")


YAML = """
model: from/file
max-model-len: 4k
max_num_seqs: 7
trust-remote-code: true
enable-prefix-caching: false
served-model-name: [a, b]
api-key: secret
swap_space: 4
revision:
"""


def test_a_file_of_settings_and_flags_over_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    config, lines = parse("--config", str(file), "--max-num-seqs", "9", "--served-model-name", "c")
    assert config.frontend is not None
    assert (config.model.model, config.model.max_model_len, config.model.trust_remote_code) == (
        "from/file",
        4000,
        True,
    )
    assert (config.scheduler.max_num_seqs, config.scheduler.enable_prefix_caching) == (9, False)
    assert (config.frontend.served_model_name, config.frontend.api_key) == (("c",), ("secret",))
    assert [line.split()[0] for line in lines] == ["--swap-space"]
    assert parse("--config", str(file), "other/model")[0].model.model == "other/model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_model_length: 5", "unknown setting max_model_length; did you mean max-model-len?"),
        ("config: other.yaml", "unknown setting config"),
        ("- model", "a mapping of settings to values is needed, not a list"),
        ("a: [", "config.yaml: "),
        ("pipeline-parallel-size: 0", "--pipeline-parallel-size 0: at least 1 is needed"),
        ("port: eighty", "--port: eighty"),
    ],
)
def test_a_mistake_in_a_file(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert words in refused(capsys, "--config", str(file))
    assert "No such file" in refused(capsys, "--config", str(tmp_path / "none.yaml"))


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASHINFER")
    lines = parse("M")[1]
    assert len(lines) == 1 and lines[0].startswith("VLLM_ATTENTION_BACKEND has no effect")


def test_every_setting_as_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("MAX_NUM_SEQS", "7"),
        ("MAX_MODEL_LEN", "4k"),
        ("ENABLE_LOG_REQUESTS", "true"),
        ("ENABLE_PREFIX_CACHING", "0"),
        ("SERVED_MODEL_NAME", '["one", "two"]'),
        ("DTYPE", "float32"),
        ("NUM_FRONTENDS", "3"),
        ("PORT", "1234"),
        ("SOCKET_FD", "9"),
        ("HOST", ""),
    ):
        monkeypatch.setenv(f"PAGEWIRE_{name}", value)
    config, lines = parse("M", "--port", "4321")
    assert lines == []
    assert config.frontend is not None
    assert (config.scheduler.max_num_seqs, config.model.max_model_len) == (7, 4000)
    assert config.frontend.enable_log_requests and not config.scheduler.enable_prefix_caching
    assert config.frontend.served_model_name == ("one", "two") and config.num_frontends == 3
    assert config.worker.dtype == "float32" and config.frontend.host == "0.0.0.0"
    assert config.frontend.port == 4321 and config.frontend.socket_fd == -1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "many", "--port many: "),
        ("ENABLE_CASCADE", "perhaps", "true or false is needed (PAGEWIRE_ENABLE_CASCADE)"),
        ("DTYPE", "float7", "--dtype float7: "),
        ("NUM_WORKERS", "0", "PAGEWIRE_NUM_WORKERS: 0: a whole number"),
    ],
)
def test_a_wrong_variable(
    name: str,
    value: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"PAGEWIRE_{name}", value)
    assert words in refused(capsys, "M")


def test_a_mistyped_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_MAX_NUM_SEQ", "7")
    monkeypatch.setenv("PAGEWIRE_CACHE", "/somewhere")
    assert parse("M")[1] == [
        "PAGEWIRE_MAX_NUM_SEQ is no setting; did you mean PAGEWIRE_MAX_NUM_SEQS?"
    ]


def test_keys_as_variables_are_not_mistyped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_API_KEYS", '["one", "two"]')
    monkeypatch.setenv("PAGEWIRE_MAX_NUM_SEQ", "")
    assert parse("M")[1] == []


def test_a_variable_wins_over_the_file_and_a_flag_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_num_seqs: 5\ndtype: float32\nnum_tokenizers: 2\nmodel: from/file\n")
    for name, value in (("MAX_NUM_SEQS", "7"), ("NUM_TOKENIZERS", "3"), ("MODEL", "a/b")):
        monkeypatch.setenv(f"PAGEWIRE_{name}", value)
    config, _ = parse("--config", str(file))
    assert (config.scheduler.max_num_seqs, config.worker.dtype) == (7, "float32")
    assert (config.num_tokenizers, config.model.model) == (3, "a/b")
    assert parse("--config", str(file), "--max-num-seqs", "9")[0].scheduler.max_num_seqs == 9


def test_the_url_of_a_cluster_s_service_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kubernetes puts into containers beside a service that is called pagewire."""
    for name, value in (
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT", "80"),
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("PORT_80_TCP_PORT", "80"),
    ):
        monkeypatch.setenv(f"PAGEWIRE_{name}", value)
    config, lines = parse("M")
    assert config.frontend is not None and config.frontend.port == 8000
    assert lines == []


def test_the_program_s_settings_are_judged_by_the_same_table() -> None:
    lines: list[str] = []
    config = configure(
        {
            "swap_space": 4,
            "max_model_len": "4k",
            "tensor_parallel_size": 1,
            "disable_log_stats": True,
        },
        lines.append,
    )
    assert config.model.max_model_len == 4000
    assert config.scheduler.disable_log_stats
    assert [line.split("=")[0] for line in lines] == ["pagewire: swap_space"]
    with pytest.raises(ValueError, match="response_role='user': answers have the role"):
        configure({"response_role": "user"})
    with pytest.raises(TypeError, match="no setting no_such"):
        configure({"no_such": 1})


def test_the_type_of_the_kv_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("M")[0].worker.kv_cache_dtype == "auto"
    for kind in ("auto", "fp8", "fp8_e4m3"):
        config, lines = parse("M", "--kv-cache-dtype", kind)
        assert config.worker.kv_cache_dtype == kind and lines == []
        assert configure({"kv_cache_dtype": kind}).worker.kv_cache_dtype == kind
    for kind in ("fp8_e5m2", "int8"):
        line = refused(capsys, "M", "--kv-cache-dtype", kind)
        assert f"'{kind}'" in line and "fp8_e4m3" in line
        with pytest.raises(ValueError, match=f"kv_cache_dtype='{kind}': .*auto, fp8, fp8_e4m3"):
            configure({"kv_cache_dtype": kind})


def test_the_page_is_what_the_generator_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate_flags", DOCS / "generate_flags.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "flags.md").read_text() == module.render(), "run: python docs/generate_flags.py"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("api_server", ("--port", "0")), ("run_batch", ("-i", "IN", "-o", "OUT"))],
)
def test_the_older_spelling_of_the_command(
    module: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    files = {"IN": tmp_path / "in.jsonl", "OUT": tmp_path / "out.jsonl"}
    files["IN"].write_text('{"custom_id": "1", "url": "/v1/completions", "body": {}}\n')
    command = [
        sys.executable,
        "-m",
        f"pagewire.entrypoints.openai.{module}",
        "--model",
        "/no/such/model",
        *(str(files.get(word, word)) for word in arguments),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and "/no/such/model does not exist" in result.stderr
