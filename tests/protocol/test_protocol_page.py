"""docs/protocol.md says what the types say."""

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[2] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_protocol", DOCS / "generate_protocol.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_generator_makes() -> None:
    page = generator().render()
    assert (DOCS / "protocol.md").read_text() == page, "run: python docs/generate_protocol.py"


def test_every_message_and_part_has_its_section() -> None:
    module = generator()
    page = module.render()
    for struct in module.reachable():
        assert f"### {struct.__name__}\n" in page
