"""What a model's generation_config.json says of sampling, for requests that do not say it
themselves; `--generation-config` names the file. Knows no request."""

import logging
from pathlib import Path
from typing import Any, Final

import msgspec
from pagewire_protocol.sampling import SamplingDefaults

from .json_files import read_object

FILE: Final = "generation_config.json"
FROM_MODEL: Final = "auto"
NONE: Final = "vllm"
"""The two values of --generation-config that are no directory; the second is vLLM's word for its
own defaults, which are OpenAI's."""
_OTHER_NAMES: Final = {"max_tokens": "max_new_tokens"}
"""Fields that the file calls otherwise."""
log = logging.getLogger("pagewire.checkpoint")


def sampling_defaults(option: str, model: Path) -> SamplingDefaults:
    """The defaults that --generation-config `option` selects. `model`: the model's directory or
    file; a file, as of GGUF, has none beside it. A value out of bounds is left out with a line in
    the log. Raises ValueError where `option` names a directory without the file, and Unsupported
    for one that is not JSON."""
    if option == NONE:
        return SamplingDefaults()
    directory = model if option == FROM_MODEL else Path(option).expanduser()
    if option != FROM_MODEL and not (directory / FILE).is_file():
        raise ValueError(
            f"--generation-config {option}: there is no {directory / FILE}; name a directory with "
            f"one, {FROM_MODEL} for the model's own or {NONE} for none"
        )
    stated = read_object(directory / FILE)
    values: dict[str, Any] = {}
    for name in SamplingDefaults.__struct_fields__:
        value = stated.get(_OTHER_NAMES.get(name, name))
        if value is None:
            continue
        try:
            checked = msgspec.convert({name: value}, type=_Fields)
        except msgspec.ValidationError as error:
            log.warning("%s: %s=%r is not used: %s", directory / FILE, name, value, error)
            continue
        values[name] = getattr(checked, name)
    if values:
        listed = ", ".join(f"{name}={value}" for name, value in values.items())
        log.info("requests without values of their own get %s, from %s", listed, FILE)
    return SamplingDefaults(**values)


class _Fields(SamplingDefaults, frozen=True, array_like=False):
    """The same, read by name."""
