"""Whether a model can be served at all, by the `model_type` of its config.json or the architecture
of a GGUF file. Said before anything else is complained about, and before torch is imported.

Only what is certain is refused here: what transformers makes of the other models is known when it
has run them (worker/models/fallback.py).
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Final

from .errors import Unsupported
from .gguf_metadata import architecture
from .json_files import Config, read_object

FAMILIES: Final = (
    "RefinedWeb",
    "RefinedWebModel",
    "baichuan",
    "chatglm",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi",
    "phi3",
    "qwen",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
"""Those that worker/models has a file for."""
GGUF_ARCHITECTURES: Final = (
    "gemma",
    "gemma2",
    "gemma3",
    "llama",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
)
"""As worker/load/gguf_architectures.py knows them."""
CAUSAL_MODELS: Final = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
ENCODERS_WITH_DECODERS: Final = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
"""Tables of transformers: names of classes by model type."""


def check(path: Path, trust_remote_code: bool) -> None:
    """Raises Unsupported when the model at `path`, a directory or a GGUF file, can certainly not be
    served. A directory without a config.json is not judged."""
    if path.is_dir():
        config = read_object(path / "config.json")
        if config.get("model_type") is not None:
            check_config(config, trust_remote_code)
    elif path.suffix == ".gguf":
        check_gguf(architecture(path))


def check_gguf(name: object) -> None:
    """Raises Unsupported for `general.architecture` of a GGUF file that is not built."""
    if name not in GGUF_ARCHITECTURES:
        raise Unsupported(
            f"GGUF architecture {name!r} is not supported; supported are {', '.join(GGUF_ARCHITECTURES)}"
        )


def check_config(config: Config, trust_remote_code: bool) -> None:
    """Raises Unsupported for a configuration whose model certainly cannot be served."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return
    own_code = bool(config.get("auto_map"))
    if not _is_known_to_transformers(str(model_type)):
        if not own_code:
            import importlib.metadata  # a sixth of a tokenizer's start

            raise Unsupported(
                f"model_type {model_type!r} is known neither here nor to transformers {importlib.metadata.version('transformers')}"
            )
        if not trust_remote_code:
            raise Unsupported(
                f"model_type {model_type!r} needs code from its repository, which --trust-remote-code allows"
                " (only for a repository that you trust)"
            )
        return
    class_name = next(iter(config.get("architectures") or ()), "")
    models = _table(CAUSAL_MODELS)
    class_names = models.get(str(model_type))
    if config.get("is_encoder_decoder") or (
        class_names is None and str(model_type) in _table(ENCODERS_WITH_DECODERS)
    ):
        raise Unsupported(
            f"{class_name or model_type} is an encoder with a decoder; only models of a decoder alone are supported"
        )
    if (
        models
        and not own_code
        and (class_names is None or (class_name and class_name not in class_names))
    ):
        raise Unsupported(
            f"{class_name or model_type} is no causal language model; only those are supported"
        )


def _folder() -> Path | None:
    """Where transformers keeps its tables of models. Looking does not import it, which takes
    seconds and brings torch."""
    spec = importlib.util.find_spec("transformers")
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) / "models" / "auto" if locations else None


def _is_known_to_transformers(model_type: str) -> bool:
    """Whether any of its tables has that name. True as well where it cannot be told: a tokenizer's
    machine need not have transformers."""
    folder = _folder()
    tables = [path.read_text() for path in folder.glob("*auto*.py")] if folder else []
    return not tables or any(f'"{model_type}"' in table for table in tables)


@functools.cache
def _table(name: str) -> dict[str, tuple[str, ...]]:
    """By model type, the names of transformers' classes of one kind; empty where its table is not
    written as expected."""
    folder = _folder()
    source = (folder / "modeling_auto.py").read_text() if folder else ""
    for node in ast.parse(source).body:
        match node:
            case ast.Assign([ast.Name(id)], ast.Call(args=[table])) if id == name:
                models: list[tuple[str, str | tuple[str, ...]]] = ast.literal_eval(table)
                return {
                    model_type: (names,) if isinstance(names, str) else names
                    for model_type, names in models
                }
            case _:
                pass
    return {}
