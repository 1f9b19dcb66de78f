"""Where Ray is not installed, there is nothing to test."""

import importlib.util

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]
