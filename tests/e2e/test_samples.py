"""The samples of docs/samples and the board of compose/monitoring: run where that is possible here,
read otherwise."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from e2e.conftest import Stack
from e2e.test_compose_commands import free_port
from e2e.test_stack_life import FAKE
from pagewire.launch import flags
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "docs" / "samples"
MONITORING = ROOT / "compose" / "monitoring"
STEP_S = 0.05
TOKENS = 20


@pytest.fixture(scope="module")
def stack() -> Any:
    made = Stack(*FAKE, "--host", "127.0.0.1", "--port", "0", "--fake-step-ms", str(1000 * STEP_S))
    yield made.wait_ready()
    made.end()


def test_nginx_passes_streams_on_as_they_are_written(stack: Stack, tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    upstream = stack.url.removeprefix("http://").removesuffix("/v1")
    text = (SAMPLES / "nginx.conf").read_text()
    site = text.replace("127.0.0.1:8000", upstream).replace(
        "listen 8080", f"listen 127.0.0.1:{port}"
    )
    assert site.count(upstream) == 1 and str(port) in site
    (tmp_path / "site.conf").write_text(site)
    paths = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off;\n{paths}include {tmp_path}/site.conf; }}\n"
    )
    command = [nginx, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/live")
        body = {
            "prompt": [1, 2],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        url = f"http://127.0.0.1:{port}/v1/completions"
        with requests.post(url, json=body, stream=True, timeout=60) as answer:
            assert answer.status_code == 200
            times = [time.monotonic() for line in answer.iter_lines() if line.startswith(b"data")]
        # A proxy that held them back would pass them on together at the end.
        assert len(times) >= TOKENS and times[-1] - times[0] > TOKENS * STEP_S / 2
        assert requests.get(f"http://127.0.0.1:{port}/metrics", timeout=60).status_code == 200
    finally:
        server.terminate()
        errors = server.communicate(timeout=30)[1]
    assert "[error]" not in errors and "[emerg]" not in errors, errors


def test_what_nginx_must_do_for_streams() -> None:
    """Said by the sample itself, whatever headers an upstream sends: answers may be silent for long
    and are passed on as they come, and no request is sent a second time."""
    text = (SAMPLES / "nginx.conf").read_text()
    lines = {line.strip() for line in text.splitlines()}
    assert {
        "proxy_buffering off;",
        "proxy_request_buffering off;",
        "proxy_http_version 1.1;",
    } <= lines
    assert {"proxy_read_timeout 1h;", "proxy_send_timeout 1h;"} <= lines
    assert "non_idempotent" not in text


def wait_for(url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            requests.get(url, timeout=5).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


def test_the_unit_of_systemd() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string((SAMPLES / "pagewire.service").read_text())
    service = unit["Service"]
    assert service["Type"] == "notify" and service["KillMode"] == "mixed"
    program, command, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/pagewire") and command == "serve"
    assert "key" not in service["ExecStart"]
    config, _ = flags.parse(flags.new("serve", ""), words, lambda line: None)
    assert config.frontend is not None and config.frontend.port == 8000
    # A wrong setting ends with this status, and would again.
    assert service["RestartPreventExitStatus"] == "2"
    assert {"StartLimitIntervalSec", "StartLimitBurst"} <= set(unit["Unit"])
    # The launcher is given up later than one of its services, and not before these have ended.
    assert float(service["WatchdogSec"]) >= 5 * config.run.watchdog_timeout
    assert float(service["TimeoutStopSec"]) > config.frontend.shutdown_timeout
    assert service["EnvironmentFile"].startswith("-") and service["NotifyAccess"] == "main"
    assert int(service["LimitNOFILE"]) >= 65536 and service["Restart"] == "on-failure"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    text = (SAMPLES / "pagewire.service").read_text()
    unit = tmp_path / "pagewire.service"
    unit.write_text(text.replace("/opt/pagewire/bin/pagewire", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_the_configuration_of_traefik() -> None:
    http = yaml.safe_load((SAMPLES / "traefik.yaml").read_text())["http"]
    router = http["routers"]["pagewire"]
    assert set(router["middlewares"]) == set(http["middlewares"])
    balancer = http["services"][router["service"]]["loadBalancer"]
    assert balancer["healthCheck"]["path"] == "/accepting"
    assert balancer["responseForwarding"]["flushInterval"].startswith("-")


def expressions() -> list[str]:
    board = json.loads((MONITORING / "board.json").read_text())
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    return [
        *(target["expr"] for panel in board["panels"] for target in panel["targets"]),
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
    ]


def test_board_and_alerts_ask_for_metrics_that_there_are(stack: Stack) -> None:
    requests.post(f"{stack.url}/completions", json={"prompt": [1], "max_tokens": 2}, timeout=60)
    text = requests.get(stack.url.removesuffix("/v1") + "/metrics", timeout=60).text
    known = {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }
    asked = {
        name for text in expressions() for name in re.findall(r"\b(?:vllm|pagewire):\w+", text)
    }
    assert len(asked) > 15 and asked <= known, asked - known


def test_prometheus_takes_its_configuration_and_rules() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    command = ["promtool", "check", "config", str(MONITORING / "prometheus.yml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_prometheus_and_grafana_are_given() -> None:
    scrape = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert scrape["rule_files"] == ["alerts.yml"]
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["gateway:8000"]
    source = yaml.safe_load((MONITORING / "datasource.yml").read_text())["datasources"][0]
    board = json.loads((MONITORING / "board.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    boards = yaml.safe_load((MONITORING / "boards.yml").read_text())["providers"][0]
    grafana = yaml.safe_load((ROOT / "compose/default.yaml").read_text())["services"]["grafana"]
    targets = [config["target"] for config in grafana["configs"]]
    assert f"{boards['options']['path']}/pagewire.json" in targets
