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
from pagewire.config import DEMO_MODEL

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "compose.yaml", *sorted((ROOT / "compose").glob("*.yaml"))]
MONITORING = ["prometheus", "grafana"]
OURS = ["frontend", "tokenizer", "scheduler", "worker"]


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
    assert load("compose.yaml") == {"include": ["compose/default.yaml"]}


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


def test_all_services_get_the_same_model_and_it_is_the_demo() -> None:
    models = {
        name: [word for word in services()[name]["command"] if word.startswith("--model=")]
        for name in OURS
    }
    assert len({tuple(words) for words in models.values()}) == 1, models
    assert interpolated(models["worker"]) == [f"--model={DEMO_MODEL}"]
    gpu = load("compose/gpu.yaml")["services"]["worker"]
    assert models["worker"][0] in gpu["command"]
    single = load("compose/single-gpu.yaml")["services"]["pagewire"]
    assert models["worker"][0] in single["command"]


def test_images_have_names_and_files_that_are_mounted_are_there() -> None:
    for name in OURS:
        assert interpolated(services()[name]["image"]) == f"pagewire-{name}:latest"
    for config in load("compose/default.yaml")["configs"].values():
        assert (ROOT / "compose" / config["file"]).is_file()
    for name in ("tokenizer", "worker"):
        assert {"HF_ENDPOINT", "HTTPS_PROXY", "PAGEWIRE_USE_MODELSCOPE"} <= set(
            services()[name]["environment"]
        )
    for name in OURS:
        assert services()[name]["env_file"] == [{"path": "pagewire.env", "required": False}]


def test_the_gpu_file_reserves_a_gpu_for_the_worker_and_nothing_else() -> None:
    override = load("compose/gpu.yaml")["services"]
    assert set(override) == {"worker"}
    (device,) = override["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert override["worker"]["build"]["args"]["DEVICE"] == "cuda"


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
            assert set(build.get("args", {})) <= arguments


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
