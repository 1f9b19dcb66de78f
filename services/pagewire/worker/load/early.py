"""What can be refused before torch is imported, which takes longer than anything else here: a model
that is not built, a configuration that it cannot have, weights that are not there."""

from pathlib import Path

from ...checkpoint import model_types, quantization
from ...config import ModelConfig
from ..models import FAMILIES, describe
from ..models.architecture import read_config
from ..models.ranks import check_ranks, check_undivided
from .sources import locate


def check(path: Path, model: ModelConfig, ranks: int = 1, stages: int = 1) -> None:
    """Raises Unsupported when the model at `path`, a directory or a GGUF file, cannot be served as
    its configuration is, cannot be divided among so many pipeline `stages` of `ranks` each, or
    lacks files."""
    model_types.check(path, model.trust_remote_code)
    location = locate(path, model.load_format)
    if location.path.is_dir():
        config = read_config(location.path)
        if config.get("model_type") in FAMILIES:
            quantization.check(path, config, model.quantization)
            check_ranks(describe(config), ranks, stages)
        else:
            check_undivided(str(config.get("model_type")), ranks, stages)
    location.check()
