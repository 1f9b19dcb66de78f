"""The application that Ray Serve runs: an ingress before N replicas, each of them a stack."""

from typing import Any

from ray import serve
from ray.serve import Application

from .arguments import plan_of
from .ingress import Ingress
from .replica import Stack


def build_app(arguments: dict[str, Any]) -> Application:
    """The application, not yet deployed. `arguments`: every flag of `pagewire serve` by its name,
    but for those that Ray replaces, and Ray Serve's options of the stacks' deployment, such as
    num_replicas; under "ingress" a mapping of such options for the deployment in front. Raises
    ValueError with one line."""
    plan = plan_of(arguments)
    stacks = serve.deployment(**plan.stack_options)(Stack)
    ingress = serve.deployment(**plan.ingress_options)(Ingress)
    return ingress.bind(stacks.bind(plan.stack_flags), plan.max_body_bytes)


app = build_app
"""Under the name that import paths of Ray Serve usually have."""
