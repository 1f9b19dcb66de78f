"""What CONTRIBUTING.md says of the cost of adding something, counted."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def files_with(name: str) -> Iterator[str]:
    """The code that names a parameter, in small letters or as a constant."""
    word = re.compile(rf"\b({name}|{name.upper()})\b")
    for folder in ("protocol", "services", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if word.search(path.read_text()):
                yield path.relative_to(ROOT).as_posix()


def test_a_scalar_parameter_that_kernels_read_touches_six_files() -> None:
    assert list(files_with("min_p")) == [
        "protocol/pagewire_protocol/sampling.py",
        "services/pagewire/offline/sampling_params.py",
        "services/pagewire/requests/parameters.py",
        "kernels/pagewire_kernels/cpu_sampling.py",
        "kernels/pagewire_kernels/filters.py",
        "kernels/pagewire_kernels/sampling_map.py",
    ]


def test_a_scalar_parameter_of_the_text_touches_four_files() -> None:
    assert list(files_with("spaces_between_special_tokens")) == [
        "protocol/pagewire_protocol/sampling.py",
        "services/pagewire/offline/sampling_params.py",
        "services/pagewire/requests/parameters.py",
        "services/pagewire/tokenizer/requests.py",
    ]
