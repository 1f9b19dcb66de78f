"""Writes docs/flags.md from the table in launch/vllm_compat.py: `python docs/generate_flags.py`. A test
compares."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pagewire.launch.flags import STRUCTS
from pagewire.launch.vllm_compat import ALIASES, HARMLESS, REFUSED, VARIABLES, Foreign

PAGE = Path(__file__).parent / "flags.md"
HEADER = """# Flags

*Generated from `services/pagewire/launch/vllm_compat.py` by `python docs/generate_flags.py`; edits here are overwritten.*

`pagewire serve --help` lists every flag that does something, with its default. Most have vLLM's names. This page is about those of vLLM's
flags that `--help` does not list; as keyword arguments of `LLM`, with underscores, they are treated alike.

- `--help=FLAG` shows one flag (of vLLM's too), `--help=GROUP` a group of them, `--help=WORD` all with the word in their names.
- Underscores in a flag's name are taken for dashes.
- The model is given as `pagewire serve MODEL` or with `--model MODEL`.
- Whole numbers may be written as `4k` (4,000), `4K` (4,096), `1.5m` or `1M` (1,048,576). `--max-model-len auto` and `-1` mean what fits.
- A flag for a list takes one value and may be given again, or takes a JSON list; only `--served-model-name` takes several.
- `--config FILE` reads a YAML mapping of the same names, with dashes or underscores: `max-model-len: 4096`. What the command line says
  wins, and an unknown name is an error.
- An unknown flag is an error that names the nearest one.
"""


def flag(name: str, foreign: Foreign | None = None) -> str:
    return ", ".join(
        f"`{one}`" for one in ("--" + name.replace("_", "-"), *(foreign.short if foreign else ()))
    )


def own() -> set[str]:
    return {name for struct in STRUCTS for name in struct.__struct_fields__}


def rows(table: Mapping[str, Foreign]) -> Iterable[str]:
    """Flags with the same reason in one row."""
    by_reason: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, foreign in table.items():
        if name not in own():
            by_reason.setdefault((foreign.why, foreign.neutral), []).append(flag(name, foreign))
    for (why, neutral), names in by_reason.items():
        values = ", ".join(
            f"`{value}`"
            for value in neutral
            if value not in ("", "none", "null", "false", "0", "0.0", "{}", "[]", "no")
        )
        yield f"| {', '.join(names)} | {values} | {why} |"


def render() -> str:
    lines = [HEADER, "## The same setting under another name", "", "| vLLM | here |", "|---|---|"]
    lines += [
        f"| {flag(alias)} | {flag(name)} |" for alias, name in ALIASES.items() if alias not in own()
    ]
    lines += [
        "| `--disable-cascade-attn` | `--no-enable-cascade` |",
        "| `--hf-token` | the environment variable `HF_TOKEN` |",
    ]
    note = "Each prints one line that says so, unless its value is one of the second column or switches it off."
    lines += [
        "",
        "## Accepted without effect",
        "",
        note,
        "",
        "| flag | silent with | why |",
        "|---|---|---|",
        *rows(HARMLESS),
    ]
    note = "They would change answers, or what can be served. Values of the second column, and those that switch off, are accepted."
    lines += [
        "",
        "## Refused",
        "",
        note,
        "",
        "| flag | accepted with | why |",
        "|---|---|---|",
        *rows(REFUSED),
    ]
    known = " and ".join(f"`{name}`" for name in VARIABLES)
    lines += [
        "",
        "## Environment",
        "",
        f"{known} mean what they mean in vLLM. Any other variable that begins with `VLLM_` prints one line.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render())
