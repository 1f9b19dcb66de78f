"""What must not be in the sources: code execution from data, tensors where text is, and words that
belong to one machine."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for root in ("protocol", "services", "kernels", "bench", "scripts")
    for path in (ROOT / root).rglob("*.py")
)
BANNED_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
}
BANNED_CALLS = {"eval", "exec", "os.system", "os.popen"}
BANNED_WORDS = re.compile(
    r"/work/|/root/|/opt/wheels|/opt/pypi|pypi\.org|pythonhosted|deb\.debian|registry\.npmjs|nodesource",
    re.I,
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def offences(tree: ast.AST) -> list[str]:
    """Every place in `tree` that could turn data into code."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                f"{node.lineno}: import {a.name}"
                for a in node.names
                if a.name.split(".")[0] in BANNED_MODULES
            ]
        elif (
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES
        ):
            found.append(f"{node.lineno}: from {node.module} import")
        elif isinstance(node, ast.Attribute) and node.attr.endswith("_pyobj"):
            found.append(f"{node.lineno}: {node.attr}")
        elif isinstance(node, ast.Call) and (why := unsafe_call(node)):
            found.append(f"{node.lineno}: {why}")
    return found


def unsafe_call(node: ast.Call) -> str | None:
    name = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in BANNED_CALLS:
        return name
    if name in ("yaml.load", "yaml.load_all") and "Safe" not in ast.unparse(node):
        return f"{name} without a safe loader"
    if name == "torch.load" and options.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name.endswith(("numpy.load", "np.load")) and options.get("allow_pickle", "False") != "False":
        return f"{name} with allow_pickle"
    if name.startswith("subprocess.") and options.get("shell", "False") != "False":
        return f"{name} through a shell"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_code_from_data(path: Path) -> None:
    assert not (found := offences(ast.parse(path.read_text()))), f"{name_of(path)}: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from marshal import loads",
        "import torch\ntorch.load('x')",
        "socket.send_pyobj(x)",
        "eval('1')",
        "yaml.load(f)",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_gate_catches(text: str) -> None:
    assert offences(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(f)",
        "msgspec.json.decode(x)",
        "model.eval()",
    ],
)
def test_the_gate_lets_pass(text: str) -> None:
    assert not offences(ast.parse(text))


def imports_of_ours(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that a file takes from the three packages."""
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pagewire")
        for alias in node.names
    }


def exists(module: str, name: str) -> bool:
    return hasattr(importlib.import_module(module), name) or (
        importlib.util.find_spec(f"{module}.{name}") is not None
    )


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if name_of(path).startswith(("bench", "scripts"))],
    ids=name_of,
)
def test_programs_beside_the_package_import_what_exists(path: Path) -> None:
    """Nothing else imports them, so that a name that is gone would be missed when they are run."""
    missing = [pair for pair in sorted(imports_of_ours(path)) if not exists(*pair)]
    assert not missing, f"{name_of(path)}: {missing}"


def test_the_three_roots_are_no_packages() -> None:
    """A top-level package called `kernels` or `protocol` would shadow other people's."""
    assert not [
        root
        for root in ("protocol", "services", "kernels")
        if (ROOT / root / "__init__.py").exists()
    ]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_no_machine_paths_or_hosts() -> None:
    found = []
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".png", ".gguf", ".safetensors"):
            continue
        text = path.read_text(errors="replace")
        found += [f"{name_of(path)}: {match[0]}" for match in BANNED_WORDS.finditer(text)]
    assert not found, found


def test_import_contracts() -> None:
    """The import-linter contracts of pyproject.toml hold."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("pagewire.frontend.service", ("torch", "transformers", "numpy", "tokenizers")),
        ("pagewire.scheduler.loop", ("torch", "transformers", "tokenizers")),
        ("pagewire.tokenizer.service", ("torch",)),
        ("pagewire.worker.loop", ("torch", "transformers", "tokenizers")),
        ("pagewire.worker.fake", ("torch", "transformers", "tokenizers")),
        ("pagewire.cli", ("torch", "transformers", "numpy", "zmq", "aiohttp")),
    ],
)
def test_a_service_loads_nothing_heavy(module: str, forbidden: tuple[str, ...]) -> None:
    """Import contracts see import statements; this sees what a real import pulls in."""
    program = f"import {module}, sys; print([m for m in {forbidden!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
