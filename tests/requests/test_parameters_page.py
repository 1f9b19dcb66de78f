"""docs/http.md shows the table of parameters as it is."""

import importlib.util
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs"


def test_the_page_shows_the_table_as_it_is() -> None:
    path = PAGE / "generate_parameters.py"
    spec = importlib.util.spec_from_file_location("generate_parameters", path)
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = (PAGE / "http.md").read_text()
    assert generator.BEGIN in page and generator.END in page
    assert generator.render(page) == page, "run `python docs/generate_parameters.py`"
