"""Pagewire on Ray Serve: whole stacks as the replicas of one application.

`serve run pagewire.ray:app model=MODEL num_replicas=2` starts it, and so does
`serve.run(build_app({"model": MODEL, "num_replicas": 2}))`.
"""

try:
    from ray import serve as _serve  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"pagewire.ray needs Ray Serve ({error}): pip install 'pagewire[ray]'"
    ) from None

from .application import app, build_app

__all__ = ["app", "build_app"]
