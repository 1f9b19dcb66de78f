"""The compose files are what the Compose specification allows, and say the same things as the
Dockerfile and the code.

`compose-spec.json` is the Compose Specification's own schema (Apache-2.0, github.com/compose-spec),
unchanged.
"""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pagewire.frontend.errors import TYPES, ApiError
from pagewire.launch import flags
from pagewire.version import __version__

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "compose/pagewire.yaml"
FILES = [
    ROOT / "compose.yaml",
    *sorted(path for path in (ROOT / "compose").glob("*.yaml") if path != SETTINGS),
]
MONITORING = ["prometheus", "grafana"]
OURS = ["frontend", "tokenizer", "scheduler", "worker"]
PROXIES = {"http_proxy", "https_proxy", "no_proxy"}
"""Build arguments that every builder knows."""


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def services() -> dict[str, Any]:
    return load("compose/default.yaml")["services"]


def interpolated(value: Any) -> Any:
    """`value` with every ${NAME:-default} replaced by its default, as in an empty environment."""
    if isinstance(value, dict):
        return {key: interpolated(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolated(inner) for inner in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_valid_under_the_compose_schema(path: Path) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(interpolated(yaml.safe_load(path.read_text())))


def test_the_schema_refuses_what_is_wrong() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({"services": {"frontend": {"comand": []}}})


def test_the_root_file_includes_the_default() -> None:
    assert load("compose.yaml") == {"name": "pagewire", "include": ["compose/default.yaml"]}


def test_all_forms_are_one_project() -> None:
    """What one has started, another one sees and ends; they share volumes and images."""
    names = {load(str(path.relative_to(ROOT))).get("name", "pagewire") for path in FILES}
    assert names == {"pagewire"}


def test_every_default_is_given_so_that_plain_up_works() -> None:
    for path in FILES:
        assert not re.search(r"\$\{\w+\}|\$\w+|\$\{\w+:?\?", path.read_text()), (
            f"{path.name} needs a variable that may be unset"
        )


@pytest.mark.parametrize("name", ["gateway", *OURS, *MONITORING])
def test_hardening(name: str) -> None:
    service = services()[name]
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["user"].split(":")[0] not in ("0", "root")
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "privileged" not in service and "cap_add" not in service


@pytest.mark.parametrize("name", OURS)
def test_the_four_services_share_the_run_volume_and_can_be_scaled(name: str) -> None:
    service = services()[name]
    assert "run:/run/pagewire" in service["volumes"]
    assert service["build"]["target"] == name
    assert "ports" not in service and "container_name" not in service, (
        "either would forbid a second replica"
    )


def test_the_run_volume_is_private_memory() -> None:
    options = load("compose/default.yaml")["volumes"]["run"]["driver_opts"]
    assert options["type"] == "tmpfs"
    assert {"mode=0700", "uid=10001", "gid=10001"} <= set(options["o"].split(","))


def test_only_the_gateway_publishes_a_port_and_only_what_must_reaches_out() -> None:
    published = {name for name, service in services().items() if "ports" in service}
    assert published == {"gateway", *MONITORING}
    for name in MONITORING:
        assert services()[name]["profiles"] == ["monitoring"], "only when it is asked for"
        assert all(port.startswith("127.0.0.1:") for port in services()[name]["ports"])
    assert load("compose/default.yaml")["networks"]["inside"]["internal"] is True
    assert services()["frontend"]["networks"] == ["inside"]
    assert services()["scheduler"]["network_mode"] == "none"


def test_all_services_get_the_same_model_and_settings() -> None:
    """No flag names the model: it would win over the settings file, which all of them get."""
    for name in OURS:
        service = services()[name]
        assert interpolated(service["environment"])["PAGEWIRE_MODEL"] == "", "the demo model"
        (config,) = service["configs"]
        assert f"--config={config['target']}" in service["command"]
        assert not [word for word in service["command"] if word.startswith("--model")]
    assert load("compose/default.yaml")["configs"]["settings"]["file"] == SETTINGS.name
    assert yaml.safe_load(SETTINGS.read_text()) is None, "nothing but examples"
    gpu = load("compose/gpu.yaml")["services"]["worker"]
    assert gpu["environment"]["PAGEWIRE_DEVICE"] == "cuda" and "command" not in gpu
    single = load("compose/single.yaml")["services"]["pagewire"]
    assert f"--config={single['configs'][0]['target']}" in single["command"]


def test_the_examples_in_the_settings_file_are_settings(tmp_path: Path) -> None:
    lines = re.findall(r"^#   (\w+: .+)$", SETTINGS.read_text(), re.M)
    assert len(lines) >= 4
    file = tmp_path / "settings.yaml"
    file.write_text("\n".join(lines))
    parser = flags.new("serve", "")
    config, _ = flags.parse(parser, [f"--config={file}"], lambda line: None)
    assert config.model.max_model_len == 4096 and config.scheduler.max_num_seqs == 64


def test_stopping_takes_longer_than_running_answers_may() -> None:
    """One variable says both: the engine kills nothing that still ends by itself."""
    for file, name in (("default", "frontend"), ("single", "pagewire")):
        service = load(f"compose/{file}.yaml")["services"][name]
        assert service["stop_grace_period"] == "${SHUTDOWN_TIMEOUT:-120}s10000ms"
        assert "--shutdown-timeout=${SHUTDOWN_TIMEOUT:-120}" in service["command"]


def test_no_limit_is_asked_for_that_an_engine_may_refuse() -> None:
    for path in FILES:
        for service in (yaml.safe_load(path.read_text()).get("services") or {}).values():
            assert "ulimits" not in service
    gateway = (ROOT / "compose/gateway.cfg").read_text()
    assert not re.search(r"^\s*maxconn ", gateway, re.M), "HAProxy ends where it gets fewer files"


def test_images_have_names_and_files_that_are_mounted_are_there() -> None:
    for name in OURS:
        assert (
            services()[name]["image"] == f"${{REGISTRY:-}}pagewire-{name}:${{TAG:-{__version__}}}"
        )
    for config in load("compose/default.yaml")["configs"].values():
        assert (ROOT / "compose" / config["file"]).is_file()
    for name in ("tokenizer", "worker"):
        assert {"HF_ENDPOINT", "HTTPS_PROXY", "PAGEWIRE_USE_MODELSCOPE"} <= set(
            services()[name]["environment"]
        )


def environment(name: str, variables: dict[str, str], file: str = "default") -> dict[str, str]:
    """What a container of the service `name` gets where `variables` stand in compose/.env."""

    def filled(match: re.Match[str]) -> str:
        return variables.get(match[1]) or match[2]

    service = load(f"compose/{file}.yaml")["services"][name]
    assert service["env_file"] == [{"path": ".env", "required": False}]
    own = {
        key: re.sub(r"\$\{(\w+):-([^}]*)\}", filled, value)
        for key, value in service["environment"].items()
    }
    return variables | own


def test_who_gets_what_of_the_file_of_variables() -> None:
    """In particular a key in it is asked for, in whichever way the files are combined."""
    secrets = {"PAGEWIRE_API_KEY": "k", "PAGEWIRE_API_KEYS": '["k"]', "HF_TOKEN": "t"}
    others = {"PAGEWIRE_MAX_NUM_SEQS": "64", "PORT": "9000", "GRAFANA_PASSWORD": "g"}
    owners = {
        "frontend": ["PAGEWIRE_API_KEY", "PAGEWIRE_API_KEYS"],
        "tokenizer": ["HF_TOKEN"],
        "worker": ["HF_TOKEN"],
        "scheduler": [],
    }
    for name, owned in owners.items():
        values = environment(name, secrets | others)
        assert values["PAGEWIRE_MAX_NUM_SEQS"] == "64" and values["GRAFANA_PASSWORD"] == ""
        assert {key: values[key] for key in secrets} == {
            key: value if key in owned else "" for key, value in secrets.items()
        }, name
    assert environment("frontend", others)["PORT"] == "8000"
    single = environment("pagewire", secrets | others, "single")
    assert secrets.items() <= single.items() and single["PORT"] == "8000"
    assert single["PAGEWIRE_MAX_NUM_SEQS"] == "64"
    for name in ("gateway", *MONITORING):
        assert "env_file" not in services()[name]


def test_builds_go_through_the_same_proxy() -> None:
    for build in (
        *(services()[name]["build"] for name in OURS),
        load("compose/single.yaml")["services"]["pagewire"]["build"],
    ):
        assert build["args"]["https_proxy"] == "${HTTPS_PROXY:-}"


def test_the_gpu_file_reserves_a_gpu_for_the_worker_and_nothing_else() -> None:
    override = load("compose/gpu.yaml")["services"]
    assert set(override) == {"worker"}
    (device,) = override["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert override["worker"]["build"]["args"]["DEVICE"] == "cuda"
    assert override["worker"]["shm_size"] == "${SHM_SIZE:-1g}"


def test_build_targets_and_arguments_exist_in_the_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    targets, arguments = (
        set(re.findall(r" AS ([\w-]+)$", text, re.M)),
        set(re.findall(r"^ARG (\w+)", text, re.M)),
    )
    for path in FILES:
        for service in (yaml.safe_load(path.read_text()).get("services") or {}).values():
            build = service.get("build", {})
            assert build.get("target", "all") in targets
            assert set(build.get("args", {})) <= arguments | PROXIES


def test_each_target_starts_its_own_service_as_an_ordinary_user() -> None:
    text = (ROOT / "Dockerfile").read_text()
    starts = {
        **{name: f'["pagewire-service", "{name}"]' for name in OURS},
        "all": '["pagewire", "serve"]',
    }
    for name, start in starts.items():
        stage = re.search(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", text, re.M | re.S)
        assert stage, name
        assert f"ENTRYPOINT {start}" in stage[1]
        assert "\nUSER pagewire\n" in stage[1]
        assert "\nHEALTHCHECK " in stage[1]
    assert text.rstrip().endswith('ENTRYPOINT ["pagewire", "serve"]'), (
        "the last target is the default one"
    )
    assert "PYTHONSAFEPATH=1" in text
    assert f"ARG VERSION={__version__}\n" in text and "org.opencontainers.image.version" in text


def test_the_gateway_answers_as_the_api_does() -> None:
    """Each error that HAProxy makes itself has the form of the frontends' errors."""
    text = (ROOT / "compose/gateway.cfg").read_text()
    errors = re.findall(
        r"http-error status (\d+) content-type application/json .*string '(.+)'", text
    )
    assert {"400", "408", "502", "503", "504"} <= {status for status, _ in errors}
    for status, body in errors:
        error = json.loads(body)["error"]
        made = ApiError(int(status), error["message"], type=error["type"])
        assert json.loads(body) == json.loads(made.body())
        assert error["type"] == TYPES.get(int(status), error["type"])
    assert "hdr Retry-After" in next(line for line in text.splitlines() if "status 503" in line)


def test_what_the_gateway_must_do_for_streams_and_drains() -> None:
    text = (ROOT / "compose/gateway.cfg").read_text()
    for line in (
        "option abortonclose",
        "option http-no-delay",
        "http-check disable-on-404",
        "option httpchk GET /accepting",
        "option redispatch 1",
    ):
        assert re.search(rf"^    {re.escape(line)}$", text, re.M), line
    checked = next(line for line in text.splitlines() if "default-server" in line)
    # A frontend that has not been checked yet counts as up: requests must not end at one that only starts.
    assert "observe layer4 error-limit 1 on-error mark-down" in checked
    assert "retry-on" not in re.sub(r"#.*", "", text), "a request is never sent twice"


def test_requests_wait_at_the_gateway_while_no_frontend_is_there() -> None:
    """Ten seconds, which the page says, also where several frontends start and all refuse; not in a
    gateway that ends, whose successor comes only then."""
    sections = gateway_sections()
    assert "server waiting abns@waiting backup" in sections["backend frontends"]
    assert "bind abns@waiting" in sections["frontend waiting"]
    assert "use_backend leaving if { stopping }" in sections["frontend waiting"]
    (retries,) = re.findall(r"retries (\d+)", "\n".join(sections["backend waiting"]))
    (pause_ms,) = re.findall(r"timeout connect (\d+)ms", "\n".join(sections["backend waiting"]))
    assert int(retries) * int(pause_ms) == 10_000
    # HAProxy makes no pause between its tries where there is another server to try.
    assert any(
        line.startswith("server-template frontend 1 ") for line in sections["backend waiting"]
    )
    for backend in ("frontends", "waiting", "leaving"):
        lines = "\n".join(sections[f"backend {backend}"])
        assert re.search(r"^server-template frontend \d+ frontend:8000", lines, re.M), backend


def test_the_gateway_serves_as_long_as_frontends_that_were_told_to_end() -> None:
    command = services()["frontend"]["command"]
    (delay_s,) = [word.partition("=")[2] for word in command if "--shutdown-delay" in word]
    assert f"grace {delay_s}s" in gateway_sections()["global"]


def gateway_sections() -> dict[str, list[str]]:
    """The lines of compose/gateway.cfg by section, without remarks."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (ROOT / "compose/gateway.cfg").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            lines = sections[line.strip()] = []
        elif line.strip() and not line.strip().startswith("#"):
            lines.append(line.strip())
    return sections


def test_the_pages_say_which_compose_is_needed() -> None:
    """`include`, which older ones do not know, came with 2.20."""
    assert "include" in load("compose.yaml")
    assert "Compose 2.20 or newer" in (ROOT / "README.md").read_text()
    deployment = (ROOT / "docs/deployment.md").read_text()
    assert "Compose 2.20 or newer is needed" in deployment
    assert "'include' must be a mapping" in deployment and "docker-compose-plugin" in deployment


@pytest.mark.parametrize("page", ["tutorials", "deployment"])
def test_no_page_says_that_containers_were_not_tried(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    assert "not in an engine" not in text and "make compose-check" in text


def test_the_gateway_s_figures_are_on_the_board() -> None:
    scraped = yaml.safe_load((ROOT / "compose/monitoring/prometheus.yml").read_text())
    targets = [
        target
        for job in scraped["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    ]
    assert "gateway:8405" in targets
    assert "bind :8405" in (ROOT / "compose/gateway.cfg").read_text()
    board = json.loads((ROOT / "compose/monitoring/board.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert sum("haproxy_" in query for query in queries) >= 4
