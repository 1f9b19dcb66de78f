"""Tokens, caches, revisions and formats of weights, as the tutorials speak of them: real downloads,
from a hub on this machine."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tutorials.stand_in_hub import COMMIT, TOKEN, StandInHub

GEMMA = "google/gemma-2b"


@pytest.fixture
def hub(downloaded: Callable[..., Path], tmp_path: Path) -> Iterator[StandInHub]:
    hub = StandInHub()
    hub.repositories[GEMMA] = downloaded(GEMMA)
    hub.gated.add(GEMMA)
    yield hub
    hub.end()


@pytest.fixture
def online(hub: StandInHub, tmp_path: Path) -> dict[str, str]:
    """The variables of a machine that has downloaded nothing yet and reaches this hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "fresh"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def test_a_gated_model_without_a_token_names_the_token_and_the_licence_page(
    hub: StandInHub, online: dict[str, str], run: Callable[..., Any]
) -> None:
    done = run(
        f"python -m pagewire.entrypoints.openai.api_server --model={GEMMA} --port 0", **online
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{GEMMA} is gated: accept its licence at {hub.url}/{GEMMA}; set HF_TOKEN" in done.stderr
    done = run(f"pagewire fetch {GEMMA}", HF_TOKEN="hf_of_somebody_else", **online)
    assert done.returncode == 1 and "your token has no access" in done.stderr


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_with_the_token_once_and_then_from_the_cache_without(
    variable: str,
    hub: StandInHub,
    online: dict[str, str],
    run: Callable[..., Any],
    serve: Callable[..., Any],
) -> None:
    """The tutorial complains that the token is needed even when the weights are there."""
    done = run(f"pagewire fetch {GEMMA}", **{**online, variable: TOKEN})
    path = Path(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    assert (
        path == Path(online["HF_HOME"]) / "hub" / "models--google--gemma-2b" / "snapshots" / COMMIT
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(path))
    assert all(token == TOKEN for _, path, token in hub.asked if GEMMA in path)
    hub.asked.clear()
    if variable == "HF_TOKEN":
        stack = serve(f"python -m pagewire.entrypoints.openai.api_server --model={GEMMA}", **online)
        assert (
            stack.client()
            .completions.create(model=GEMMA, prompt="JupySQL is", max_tokens=3)
            .choices
        )
    else:
        assert run(f"pagewire fetch {GEMMA}", **online).stdout.strip() == str(path)
    assert hub.asked == []


def test_a_branch_and_pytorch_s_own_files_in_a_directory_for_downloads(
    hub: StandInHub,
    online: dict[str, str],
    tmp_path: Path,
    run: Callable[..., Any],
    downloaded: Callable[..., Path],
) -> None:
    """load_format="auto" takes pytorch_model.bin where there are no safetensors; the revision is a
    branch."""
    import torch
    from safetensors.torch import load_file

    original = downloaded("gpt2", tmp_path / "gpt2")
    torch.save(load_file(original / "model.safetensors"), original / "pytorch_model.bin")
    (original / "model.safetensors").unlink()
    hub.repositories["openai-community/gpt2"], hub.revisions = original, {"v1"}
    done = run(f"python from_hub.py openai-community/gpt2 v1 {tmp_path}/models", **online)
    assert done.stdout == "3\n", done.stderr
    assert (
        tmp_path
        / "models"
        / "models--openai-community--gpt2"
        / "snapshots"
        / COMMIT
        / "pytorch_model.bin"
    ).exists()
    assert not Path(online["HF_HOME"], "hub", "models--openai-community--gpt2").exists()
    done = run("pagewire fetch openai-community/gpt2 --revision v2", **online)
    assert done.returncode == 1 and "openai-community/gpt2 has no revision 'v2'" in done.stderr


def test_a_model_that_does_not_exist(
    hub: StandInHub, online: dict[str, str], run: Callable[..., Any]
) -> None:
    done = run("pagewire serve google/no-such-model --port 0", **online)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("pagewire serve: ")
    assert f"there is no model google/no-such-model on the hub ({hub.url}" in last


def test_a_cache_that_cannot_be_written_is_named(
    hub: StandInHub, online: dict[str, str], run: Callable[..., Any]
) -> None:
    """A directory of the host that is mounted into a container may belong to somebody else."""
    done = run(
        f"pagewire fetch {GEMMA}", **{**online, "HF_HOME": "/proc/mounted", "HF_TOKEN": TOKEN}
    )
    assert (
        done.returncode == 1
        and "could not be kept in /proc/mounted/hub, which must be writable"
        in done.stderr.splitlines()[-1]
    )
