"""The application's arguments: flags of `pagewire serve`, options of Ray Serve, and nothing else."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pagewire.ray.arguments import plan_of
from ray.serve.schema import ServeDeploySchema

PAGE = Path(__file__).parents[2] / "docs" / "ray.md"

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"max_model_length": 4},
        "max_model_length is neither a flag of `pagewire serve` nor an option of a Ray Serve deployment; did you mean max_model_len?",
    ),
    (
        {"num-replicsa": 4},
        "num_replicsa is neither a flag of `pagewire serve` nor an option of a Ray Serve deployment; did you mean num_replicas?",
    ),
    (
        {"port": 8000},
        "port has no effect here: Ray's proxies listen; set host and port in Ray Serve's http_options",
    ),
    (
        {"shutdown_timeout": 5},
        "shutdown_timeout has no effect here: Ray ends replicas; set graceful_shutdown_timeout_s",
    ),
    (
        {"max_model_len": -5},
        "--max-model-len -5: at least 0 is needed (`pagewire serve --help` lists the flags)",
    ),
    (
        {"num_workers": "few"},
        "--num-workers: few: a whole number of at least 1 is needed (`pagewire serve --help` lists the flags)",
    ),
    ({"help": True}, "unknown setting help (`pagewire serve --help` lists the flags)"),
    (
        {"distributed_executor_backend": "ray", "tensor_parallel_size": 2},
        "distributed_executor_backend=ray: a replica has its GPUs from Ray already, and starts its ranks on them by itself (mp)",
    ),
    ({"ingress": {"replicas": 2}}, "ingress: replicas is no option of a Ray Serve deployment"),
    ({"ingress": 2}, "ingress is a mapping, not a int"),
    ({"num_replicas": "["}, "[: while parsing a flow node"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[next(iter(a)) for a, _ in REFUSED])
def test_a_wrong_argument_is_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        plan_of(arguments)
    assert str(refusal.value).startswith(f"pagewire.ray: {message}")
    assert "\n" not in str(refusal.value)


def test_texts_of_the_command_line_mean_the_same_as_values() -> None:
    values = {
        "model": "some/model",
        "max_model_len": 4096,
        "enforce_eager": True,
        "served_model_name": ["a", "b"],
        "num_replicas": 3,
        "ray_actor_options": {"num_cpus": 2},
    }
    texts = {
        "model": "some/model",
        "max-model-len": "4096",
        "enforce-eager": "true",
        "served-model-name": ["a", "b"],
        "num-replicas": "3",
        "ray_actor_options": '{"num_cpus": 2}',
    }
    plan = plan_of(values)
    assert plan == plan_of(texts)
    assert plan.stack_flags == [
        "--model=some/model",
        "--max-model-len=4096",
        "--enforce-eager",
        "--served-model-name=a",
        "--served-model-name=b",
        "--num-frontends=1",
    ]
    assert plan.stack_options["num_replicas"] == 3
    assert plan.ingress_options["num_replicas"] == 3


def test_a_replica_takes_twice_what_its_workers_compute_at_a_time() -> None:
    fake = {"device": "fake", "max_num_seqs": 10, "num_workers": 2}
    assert plan_of(fake).stack_options["max_ongoing_requests"] == 40
    assert plan_of({**fake, "max_ongoing_requests": 7}).stack_options["max_ongoing_requests"] == 7


def test_a_replica_gets_a_gpu_for_each_worker() -> None:
    def gpus(**arguments: Any) -> Any:
        return plan_of(arguments).stack_options["ray_actor_options"]["num_gpus"]

    assert gpus(device="cuda") == 1
    assert gpus(device="cuda", num_workers=8) == 8
    assert gpus(device="cuda", num_workers=4, gpu_memory_utilization=0.45) == 2
    assert gpus(device="cuda", tensor_parallel_size=2, num_workers=2) == 4
    assert gpus(device="cpu", pipeline_parallel_size=2) == 0
    assert gpus(device="cuda", pipeline_parallel_size=2, tensor_parallel_size=2) == 4
    assert gpus(device="cpu") == gpus(device="fake") == 0
    assert gpus(device="cuda", ray_actor_options={"num_gpus": 3}) == 3


def test_autoscaling_aims_at_what_a_stack_computes_at_a_time() -> None:
    limits = {"min_replicas": 1, "max_replicas": 4}
    plan = plan_of({"device": "fake", "autoscaling_config": limits})
    assert plan.stack_options["autoscaling_config"] == {**limits, "target_ongoing_requests": 256}
    assert plan.ingress_options["num_replicas"] == 4
    own = {**limits, "target_ongoing_requests": 9}
    assert plan_of({"autoscaling_config": own}).stack_options["autoscaling_config"] == own


def test_the_file_of_the_page_is_one_that_ray_serve_takes() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(block))
    (application,) = schema.applications
    assert application.import_path == "pagewire.ray:app"
    plan = plan_of(application.args)
    assert plan.stack_options["autoscaling_config"]["max_replicas"] == 4


def test_without_ray_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['ray'] = None; import pagewire.ray"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].endswith("pip install 'pagewire[ray]'")
    assert "pagewire.ray needs Ray Serve" in result.stderr.splitlines()[-1]
