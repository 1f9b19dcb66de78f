"""The pages at / and /docs in a real browser: Debian's Chromium, driven by playwright-core. Skipped
where one of the two cannot be had; tests/api/test_browser_pages.py holds without them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLAYWRIGHT = "playwright-core@1.65.1"
SCRIPT = Path(__file__).with_name("browser_page.js")


@pytest.fixture(scope="module")
def playwright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where playwright-core is installed."""
    for program in ("chromium", "node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    directory = tmp_path_factory.mktemp("playwright")
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", PLAYWRIGHT]
    try:
        subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=90)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"{PLAYWRIGHT} could not be installed: {error}")
    return directory / "node_modules" / "playwright-core"


@pytest.fixture(scope="module")
def slow(start: Callable[..., Any]) -> Any:
    """An endpoint whose long answers take long enough to be stopped."""
    return start("google/gemma-2b", "EMPTY", "--fake-step-ms", "20")


@pytest.fixture(scope="module")
def seen(
    playwright: Path, slow: Any, guarded: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the script saw."""
    chromium = shutil.which("chromium")
    assert chromium
    roots = [slow.url, guarded.url]
    pictures = tmp_path_factory.mktemp("pictures")
    result = subprocess.run(
        ["node", str(SCRIPT), chromium, *roots, guarded.key, str(pictures)],
        env={**os.environ, "PLAYWRIGHT_CORE": str(playwright)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return {**json.loads(result.stdout.splitlines()[-1]), "roots": roots, "name": slow.model}


def test_the_page_shows_the_model_and_streams_an_answer(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["state"] == "ready" and seen["name"] in seen["model"]
    assert seen["answer"] and "tokens/s" in seen["speed"]


def test_nothing_but_this_server_is_asked(seen: dict[str, Any]) -> None:
    roots = tuple(f"{root}/" for root in seen["roots"])
    outside = [url for url in seen["requests"] if not url.startswith((*roots, "data:"))]
    assert not outside


def test_texts_stay_texts(seen: dict[str, Any]) -> None:
    assert seen["question"] == "<img src=x onerror=alert(1)> & <b>bold</b>\nsecond line"
    assert seen["images"] == 0


def test_an_answer_is_stopped_and_an_error_is_shown(seen: dict[str, Any]) -> None:
    assert seen["stopped"] is True
    assert "1000000" in seen["refusal"]


def test_a_narrow_dark_window_with_a_key(seen: dict[str, Any]) -> None:
    assert "API key" in seen["locked"]
    assert seen["overflow"] <= 0 and seen["docsOverflow"] <= 0
    assert seen["background"] == "rgb(22, 24, 26)"
    assert seen["routes"] > 10 and seen["fields"] > 20
