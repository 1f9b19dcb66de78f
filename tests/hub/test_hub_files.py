"""Where a model's files come from: caches by the hub's rules, tokens, revisions, weight formats,
ModelScope. No network."""

import json
import sys
import types
from pathlib import Path

import pytest
from pagewire.commands import fetch
from pagewire.config import ModelConfig
from pagewire.hub import huggingface, modelscope

MODEL = "org/model"
VARIABLES = (
    *(
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "XDG_CACHE_HOME",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
    ),
    *modelscope.VARIABLES,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")


def put(folder: Path, *names: str, index: tuple[str, ...] = ()) -> Path:
    """A snapshot with these files, and one more that the index of weights names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    if index:
        (folder / index[0]).write_text(
            json.dumps({"weight_map": {str(n): name for n, name in enumerate(index[1:])}})
        )
    return folder


def snapshot(
    cache: Path,
    *names: str,
    commit: str = "c0",
    revision: str = "main",
    index: tuple[str, ...] = (),
) -> Path:
    repository = cache / "models--org--model"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return put(repository / "snapshots" / commit, *names, index=index)


@pytest.fixture
def repository(monkeypatch):
    """repository(files with their content, or an error): what the hub has under MODEL. Returns the
    calls of huggingface_hub, each with the names of the files that it brought."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls: list[dict] = []

    def make(files: dict[str, str] | BaseException) -> list[dict]:
        def download(name, **options):
            if isinstance(files, BaseException):
                raise files
            brought = list(
                huggingface_hub.utils.filter_repo_objects(
                    files,
                    allow_patterns=options["allow_patterns"],
                    ignore_patterns=options["ignore_patterns"],
                )
            )
            calls.append({"name": name, **options, "brought": brought})
            folder = snapshot(Path(options["cache_dir"]))
            for file in brought:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(files[file])
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return make


def repository_of(*names: str, **contents: str) -> dict[str, str]:
    return {"config.json": "{}", **dict.fromkeys(names, ""), **contents}


def weights_brought(calls: list[dict]) -> list[str]:
    brought = [name for call in calls for name in call["brought"]]
    return [name for name in brought if not name.endswith(".json")]


def error(kind: str) -> BaseException:
    """One of huggingface_hub's, whose constructors want a response."""
    from huggingface_hub import errors

    cls = getattr(errors, kind)
    found = cls.__new__(cls, "the hub's own words")
    found.args = ("the hub's own words",)
    return found


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "--download-dir"])
def test_a_cached_model_needs_neither_token_nor_network(variable, monkeypatch, tmp_path):
    place = tmp_path / "elsewhere"
    model = ModelConfig(
        model=MODEL, download_dir=str(place) if variable == "--download-dir" else ""
    )
    if variable != "--download-dir":
        monkeypatch.setenv(variable, str(place))
    kept = snapshot(place / "hub" if variable == "HF_HOME" else place, "model.safetensors")
    assert huggingface.resolve(model) == kept


def test_a_revision_is_a_branch_or_a_commit(tmp_path):
    cache = tmp_path / "hf/hub"
    old, new = (
        snapshot(cache, "a.safetensors"),
        snapshot(cache, "a.safetensors", commit="c1", revision="v2"),
    )
    assert huggingface.resolve(ModelConfig(model=MODEL)) == old
    assert (
        huggingface.resolve(ModelConfig(model=MODEL, revision="v2"))
        == huggingface.resolve(ModelConfig(model=MODEL, revision="c1"))
        == new
    )


def test_the_tokenizer_has_the_models_revision_or_one_of_its_own():
    model = ModelConfig(model=MODEL, tokenizer="org/other", revision="v2", download_dir="/d")
    found = huggingface.tokenizer_model(model)
    assert (found.model, found.revision, found.download_dir) == ("org/other", "v2", "/d")
    own = ModelConfig(model=MODEL, revision="v2", tokenizer_revision="main")
    assert (
        huggingface.has_own_tokenizer(own) and huggingface.tokenizer_model(own).revision == "main"
    )
    assert not huggingface.has_own_tokenizer(
        ModelConfig(model=MODEL, revision="v2", tokenizer_revision="v2")
    )


def test_fetch_prints_where_the_model_and_its_tokenizer_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pagewire.commands.fetch.die_with_parent", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    cache = tmp_path / "hf/hub"
    model, tokenizer = snapshot(cache, "a.safetensors"), snapshot(cache, commit="c1", revision="v2")
    assert fetch.main([MODEL, "--tokenizer-revision=v2"]) == 0
    assert capsys.readouterr().out.split() == [str(model), str(tokenizer)]


@pytest.mark.parametrize(
    ("files", "index", "formats"),
    [
        (("a.safetensors",), (), {"auto", "safetensors", "dummy"}),
        (("pytorch_model.bin",), (), {"auto", "pt", "dummy"}),
        (("training_args.bin",), (), {"dummy"}),
        (("a.gguf",), (), {"auto", "safetensors", "gguf", "dummy"}),
        (
            ("a.safetensors",),
            ("model.safetensors.index.json", "a.safetensors", "b.safetensors"),
            {"dummy"},
        ),
        (("p.bin",), ("pytorch_model.bin.index.json", "p.bin"), {"auto", "pt", "dummy"}),
        (("p.bin",), ("pytorch_model.bin.index.json", "p.bin", "q.bin"), {"dummy"}),
    ],
)
def test_a_snapshot_counts_when_the_weights_asked_for_are_whole(files, index, formats, tmp_path):
    snapshot(tmp_path / "hf/hub", *files, index=index)
    found = {
        name
        for name in ("auto", "safetensors", "pt", "gguf", "dummy")
        if huggingface.cached(ModelConfig(model=MODEL, load_format=name))
    }
    assert found - {"gguf"} == formats - {"gguf"}


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_download_carries_token_revision_and_directory(
    variable, monkeypatch, tmp_path, repository
):
    monkeypatch.setenv(variable, "secret")
    calls = repository(repository_of("model.safetensors"))
    huggingface.resolve(ModelConfig(model=MODEL, revision="v2", download_dir=str(tmp_path / "d")))
    assert {
        (call["name"], call["token"], call["revision"], call["cache_dir"]) for call in calls
    } == {(MODEL, "secret", "v2", tmp_path / "d")}
    assert weights_brought(calls) == ["model.safetensors"]


INDEX = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})
BIN_INDEX = json.dumps({"weight_map": {"a": "p-1.bin"}})
STRAY = ("model_old.safetensors", "consolidated.safetensors", "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("files", "load_format", "brought"),
    [
        (
            repository_of("model.safetensors", *STRAY, "pytorch_model.bin"),
            "auto",
            "model.safetensors",
        ),
        (
            repository_of("m-1.safetensors", "m-2.safetensors", "model.safetensors", *STRAY)
            | {"model.safetensors.index.json": INDEX},
            "auto",
            "m-1.safetensors m-2.safetensors",
        ),
        (repository_of("weights.safetensors", *STRAY[1:]), "auto", "weights.safetensors"),
        (repository_of(*STRAY[1:], "pytorch_model.bin"), "auto", "pytorch_model.bin"),
        (
            repository_of("model.safetensors", "pytorch_model.bin", "pytorch_model_old.bin"),
            "pt",
            "pytorch_model.bin",
        ),
        (
            repository_of("p-1.bin", "pytorch_model.bin")
            | {"pytorch_model.bin.index.json": BIN_INDEX},
            "pt",
            "p-1.bin",
        ),
        (repository_of("model.safetensors"), "dummy", ""),
    ],
)
def test_a_download_brings_the_files_that_hold_the_weights(files, load_format, brought, repository):
    calls = repository(files)
    model = ModelConfig(model=MODEL, load_format=load_format)
    folder = huggingface.resolve(model)
    assert weights_brought(calls) == brought.split()
    assert huggingface.cached(model) == folder


def test_a_repository_without_weights(repository):
    repository(repository_of())
    with pytest.raises(
        huggingface.ModelNotFound, match=r"org/model has no safetensors or PyTorch weights"
    ):
        huggingface.resolve(ModelConfig(model=MODEL))
    with pytest.raises(
        huggingface.ModelNotFound, match=r"has no PyTorch's \(pytorch_model.bin\) weights"
    ):
        huggingface.resolve(ModelConfig(model=MODEL, load_format="pt"))


def test_a_model_that_is_not_built_is_refused_before_its_weights_are_fetched(repository):
    calls = repository(
        repository_of("model.safetensors") | {"config.json": '{"model_type": "nonsense"}'}
    )
    with pytest.raises(huggingface.ModelNotFound, match="model_type 'nonsense' is known neither"):
        huggingface.resolve(ModelConfig(model=MODEL))
    assert weights_brought(calls) == []


def test_a_gated_model_names_the_token_and_the_licence_page(repository, monkeypatch):
    repository(error("GatedRepoError"))
    page = "org/model is gated: accept its licence at https://hub.example/org/model"
    with pytest.raises(huggingface.ModelNotFound, match=f"{page}; set HF_TOKEN to a token"):
        huggingface.resolve(ModelConfig(model=MODEL))
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(
        huggingface.ModelNotFound, match=f"{page}; your token has no access"
    ) as caught:
        huggingface.resolve(ModelConfig(model=MODEL))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("RevisionNotFoundError", "has no revision 'v9'; see https://hub.example/org/model"),
        (
            "RepositoryNotFoundError",
            "there is no model org/model on the hub .* HF_TOKEN is not set",
        ),
        ("LocalEntryNotFoundError", "the hub could not be reached at https://hub.example"),
    ],
)
def test_other_answers_of_the_hub_are_one_line(kind, told, repository):
    repository(error(kind))
    with pytest.raises(huggingface.ModelNotFound, match=told) as caught:
        huggingface.resolve(ModelConfig(model=MODEL, revision="v9"))
    assert "\n" not in str(caught.value)


def test_offline_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        huggingface.ModelNotFound, match=r"is not in the cache .* HF_HUB_OFFLINE forbids"
    ):
        huggingface.resolve(ModelConfig(model=MODEL))


class ModelScope(types.ModuleType):
    """In place of the package: what is in `folder` is cached, `files` is what its hub has."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        super().__init__("modelscope")
        self.folder, self.files, self.asked = folder, files, []

    def snapshot_download(self, model: str, **options) -> str:
        self.asked.append((model, options))
        if options.get("local_files_only") and not self.folder.is_dir():
            raise ValueError("cannot find the requested files")
        if model == "org/nothing":
            raise OSError("no such model\nand a second line")
        self.folder.mkdir(exist_ok=True)
        for name, text in self.files.items():
            if any(Path(name).match(pattern) for pattern in options.get("allow_patterns", ())):
                (self.folder / name).write_text(text)
        return str(self.folder)


@pytest.mark.parametrize(
    ("variable", "value"), [("VLLM_USE_MODELSCOPE", "True"), ("PAGEWIRE_USE_MODELSCOPE", "1")]
)
@pytest.mark.parametrize("cached", ["whole", "in part", "not"])
def test_modelscope_in_place_of_the_hub(variable, value, cached, monkeypatch, tmp_path):
    """The same files are downloaded as from the hub."""
    monkeypatch.setenv(variable, value)
    folder = tmp_path / "scope"
    package = ModelScope(folder, repository_of("model.safetensors", "model_old.safetensors"))
    if cached != "not":
        put(folder, *(["model.safetensors"] if cached == "whole" else []))
    monkeypatch.setitem(sys.modules, "modelscope", package)
    snapshot(tmp_path / "hf/hub", "model.safetensors")
    assert huggingface.cached(ModelConfig(model=MODEL)) is None, (
        "the hub's cache may hold another model of that name"
    )
    model = ModelConfig(model=MODEL, revision="v1", download_dir="/d")
    assert huggingface.resolve(model) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    common = {"cache_dir": "/d", "revision": "v1"}
    assert package.asked[0] == (MODEL, {"local_files_only": True, **common})
    assert len(package.asked) == (1 if cached == "whole" else 3)
    assert all(
        name == MODEL and options.items() >= common.items() for name, options in package.asked
    )
    assert huggingface.resolve(ModelConfig(model=str(tmp_path))) == tmp_path, (
        "a directory is a directory"
    )


def test_modelscope_errors_are_one_line(monkeypatch, tmp_path):
    # An empty variable, as compose files give it, is none.
    monkeypatch.setenv("PAGEWIRE_USE_MODELSCOPE", "")
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "true")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(
        huggingface.ModelNotFound,
        match="VLLM_USE_MODELSCOPE is set, but the modelscope package is not installed; `pip install",
    ):
        huggingface.resolve(ModelConfig(model=MODEL))
    monkeypatch.setitem(sys.modules, "modelscope", ModelScope(tmp_path / "scope", {}))
    with pytest.raises(
        huggingface.ModelNotFound,
        match=r"org/nothing could not be had from ModelScope: no such model$",
    ):
        huggingface.resolve(ModelConfig(model="org/nothing"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        huggingface.ModelNotFound, match=r"it is not cached, and HF_HUB_OFFLINE forbids"
    ):
        huggingface.resolve(ModelConfig(model=MODEL))
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "perhaps")
    with pytest.raises(ValueError, match="VLLM_USE_MODELSCOPE=perhaps: True or False is needed"):
        huggingface.resolve(ModelConfig(model=MODEL))


def test_a_clone_without_git_lfs_is_one_line(tmp_path):
    """Its large files are a few lines of text."""
    folder = put(tmp_path / "clone")
    assert huggingface.cached(ModelConfig(model=str(folder))) == folder
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    )
    with pytest.raises(
        huggingface.ModelNotFound, match=r"model\.safetensors is a git-lfs pointer .*`git lfs pull`"
    ):
        huggingface.cached(ModelConfig(model=str(folder)))
    (tmp_path / "m.gguf").write_text((folder / "model.safetensors").read_text())
    with pytest.raises(huggingface.ModelNotFound, match=r"m\.gguf is a git-lfs pointer"):
        huggingface.cached(ModelConfig(model=str(tmp_path / "m.gguf")))
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(huggingface.ModelNotFound, match="model_type 'nonsense' is known neither"):
        huggingface.cached(ModelConfig(model=str(folder)))
