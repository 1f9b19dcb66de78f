"""What can be refused before torch is imported, which takes longer than anything else here: a model
that is not built, and a configuration that it cannot have."""

from pathlib import Path

from ...checkpoint import model_types, quantization
from ...config import ModelConfig
from ..models import FAMILIES, describe
from ..models.architecture import read_config


def check(path: Path, model: ModelConfig) -> None:
    """Raises Unsupported when the model at `path`, a directory or a GGUF file, cannot be served as
    its configuration is."""
    model_types.check(path, model.trust_remote_code)
    if path.is_dir() and (path / "config.json").is_file():
        config = read_config(path)
        if config.get("model_type") in FAMILIES:
            quantization.check(path, config, model.quantization)
            describe(config)
