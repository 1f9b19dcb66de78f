"""Chat templates for families whose repositories ship none, one .jinja file each, and the table
that says which model gets which.

It knows names and configurations, not how a template is rendered. A model that is not known to be
made for chat gets none.
"""

from pathlib import Path
from typing import Any, Final

Config = dict[str, Any]
FOLDER: Final = Path(__file__).parent
BY_NAME: Final = (
    # model_type, words that the name must have, template
    ("llama", ("vicuna",), "vicuna"),
    ("llama", ("alpaca",), "alpaca"),
    ("llama", ("llama-2", "chat"), "llama-2"),
    ("phi", ("phi-1_5",), "phi-1_5"),
    ("phi", ("phi-2",), "phi-2"),
    ("chatglm", ("base",), ""),
    ("chatglm", ("chatglm3",), "chatglm3"),
    ("chatglm", ("glm-4",), "glm-4"),
    ("chatglm", (), "chatglm2"),
)
"""The first row that fits is taken."""


def names() -> list[str]:
    """The built-in templates."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def source(name: str) -> str:
    """The jinja source of a built-in template."""
    return (FOLDER / f"{name}.jinja").read_text()


def read_option(option: str) -> str:
    """The template of --chat-template: a built-in one by its name, a file's content, or the option
    itself when it is a template.

    Raises ValueError."""
    if option in names():
        return source(option)
    if not any(mark in option for mark in ("{{", "{%", "{#", "\n")):
        path = Path(option).expanduser()
        if not path.is_file():
            built_in = ", ".join(names())
            raise ValueError(
                f"--chat-template: {option} is neither a file nor a jinja template nor a built-in one ({built_in})"
            )
        return path.read_text()
    return option


def choose(path: Path, config: Config, generation: Config) -> str:
    """The name of the template for the model in directory `path`, by config.json and
    generation_config.json; empty for none."""
    model_type = config.get("model_type")
    name = _name(path, config)
    if model_type == "qwen":
        chat = generation.get("chat_format", "chatml" if "chat" in name else "") == "chatml"
        return "chatml" if chat else ""
    if model_type == "baichuan":
        return "baichuan" if "user_token_id" in generation else ""
    return next(
        (
            template
            for row_model_type, words, template in BY_NAME
            if row_model_type == model_type and all(word in name for word in words)
        ),
        "",
    )


def _name(path: Path, config: Config) -> str:
    """The model's name, as far as its files tell: the directory's, or the repository's in the hub's
    cache; and the one in config.json."""
    folder = path.parent.parent.name if path.parent.name == "snapshots" else path.name
    return f"{folder} {config.get('_name_or_path', '')}".lower()
