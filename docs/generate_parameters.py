"""Writes the table of parameters into docs/http.md: `python docs/generate_parameters.py`, or with
`--check` only compares.

Names, types, bounds and defaults come from `pagewire.requests.parameters`, which HTTP requests,
`SamplingParams` and `pagewire run-batch` are checked by, so that the page cannot say anything else
than the code does. A test runs the comparison.
"""

import re
import sys
from pathlib import Path

from pagewire.requests.parameters import PARAMETERS, Parameter

PAGE = Path(__file__).parent / "http.md"
BEGIN = "<!-- begin of the table that docs/generate_parameters.py writes -->"
END = "<!-- end of the table -->"
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
UNUSUAL = {"early_stopping": "boolean or `never`", "logit_bias": "object: token id to number"}
"""Types of what is neither a scalar nor a list."""


def main() -> int:
    page = PAGE.read_text()
    written = render(page)
    if "--check" in sys.argv[1:]:
        return 0 if page == written else 1
    PAGE.write_text(written)
    return 0


def render(page: str) -> str:
    """The page with its table as the parameters are now."""
    rows = ["| parameter | type | bounds | default | acts in |", "|---|---|---|---|---|"]
    rows += map(_row, PARAMETERS.values())
    table = "\n".join([BEGIN, "", *rows, "", END])
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, page, flags=re.S)


def _row(parameter: Parameter) -> str:
    mark = " ¹" if parameter.ignored_by_beams else ""
    cells = (
        f"`{parameter.name}`{mark}",
        UNUSUAL.get(parameter.name) or _type(parameter),
        _bounds(parameter),
        _default(parameter),
        parameter.acts_in.value,
    )
    return f"| {' | '.join(cells)} |"


def _type(parameter: Parameter) -> str:
    kind = TYPES[parameter.type]
    return kind if parameter.max_items is None else f"list of {kind}s"


def _bounds(parameter: Parameter) -> str:
    if parameter.low is None:
        return ""
    low, high = _number(parameter.low), _number(parameter.high)
    values = f"above {low}, at most {high}" if parameter.above_low else f"{low} to {high}"
    if parameter.type is str:
        values += " characters"
    return values if parameter.max_items is None else f"{parameter.max_items:,}, each {values}"


def _number(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    for power in (31, 63):
        if value == 2**power - 1:
            return f"2^{power} - 1"
        if value == -(2**power):
            return f"-2^{power}"
    return f"{value:,}"


def _default(parameter: Parameter) -> str:
    if parameter.default in (None, (), ""):
        return "none"
    if isinstance(parameter.default, bool):
        return str(parameter.default).lower()
    return f"{parameter.default:g}"


if __name__ == "__main__":
    sys.exit(main())
