"""Everything that is measured on one GPU, in one run of bounded time: kernels, start-up, both
models over HTTP and offline.

    python bench/h200.py --tokenizer DIR --json FILE [--budget-s 540] [flags of pagewire serve]
    python bench/h200.py --models all --parts offline       quantized weights and experts too
    python bench/h200.py --device fake --scale 0.02        a trial without a GPU

Each part is a process of its own with a share of the time; a part that fails or hangs leaves a line
in the tables, which come last. Weights are random. `--tokenizer` is a directory with a
tokenizer.json: over HTTP the models get its vocabulary, so that every id has a text; without it,
prompts are token ids and no text is made. The first start of a model finds an empty kernel cache,
later ones what that start left.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagewire.bench import kernels, machine, offline, path, serve
from pagewire.bench.baselines import identify
from pagewire.bench.interleave import Budget, Result
from pagewire.bench.options import cells, say
from pagewire.bench.servers import ready_seconds
from pagewire.bench.stats import table, write_json

HERE = Path(__file__).resolve().parent
MODELS = (HERE / "models/qwen3-0.6b", HERE / "models/llama-3.1-8b")
SECONDS = {
    # part: its share of the time; what a part does not use goes to those after it
    "kernels": 60,
    "http": 130,
    "start": 15,
    "offline": 90,
    "path": 30,
}
GRACE_S = 15
"""To end in order, once a part's time is up."""
EQUAL = "256x128/128"
"""The load that is also run offline, to see what HTTP costs."""


def main() -> int:
    options, flags = parse()
    budget = Budget(options.budget_s)
    report: dict[str, Any] = {"machine": machine.describe(), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="pagewire-bench-") as folder:
        plan = list(plan_of(options))
        weights = [SECONDS[part] for part, _ in plan]
        for i, (part, model) in enumerate(plan):
            seconds = (budget.left() - GRACE_S) * weights[i] / sum(weights[i:])
            name = f"{part} {model.name}" if model else part
            say(f"{name}: {seconds:.0f} s")
            report["parts"][name] = run_part(part, model, Path(folder), seconds, options, flags)
            if options.json:
                write_json(options.json, report)
    print("\n\n".join(tables(report, known=options.scale == 1 and options.device == "cuda")))
    say("done")
    return 1 if any(part.get("error") for part in report["parts"].values()) else 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        help="directory with a tokenizer.json, for prompts of words over HTTP",
    )
    parser.add_argument(
        "--models",
        default=",".join(map(str, MODELS)),
        help="directories with a config.json each, names in bench/models, or `all` of those",
    )
    parser.add_argument("--parts", default=",".join(SECONDS), help=f"of {', '.join(SECONDS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "fake"))
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="shrink requests and lengths, for a trial"
    )
    parser.add_argument("--max-model-len", type=int, default=16_384)
    parser.add_argument(
        "--num-frontends", default="", help="over HTTP; default: what the machine has cores for"
    )
    parser.add_argument("--num-tokenizers", default="", help="likewise")
    parser.add_argument("--json", default="")
    parser.add_argument("--plot-dir", default="", help="where to put a PNG for each model")
    options, flags = parser.parse_known_args()
    flags += [
        "--device",
        options.device,
        "--load-format",
        "dummy",
        "--max-model-len",
        str(options.max_model_len),
    ]
    return options, [*flags, "--log-level", "warning"]


def plan_of(options: argparse.Namespace) -> Iterator[tuple[str, Path | None]]:
    parts = options.parts.split(",")
    if unknown := set(parts) - set(SECONDS):
        raise SystemExit(
            f"--parts {','.join(sorted(unknown))}: only {', '.join(SECONDS)} are known"
        )
    if "kernels" in parts and options.device == "cuda":
        yield "kernels", None
    for model in models_of(options.models):
        for part in SECONDS:
            if part in parts and part not in ("kernels", "path"):
                yield part, model
    if "path" in parts and options.tokenizer:
        yield "path", models_of(options.models)[0]


def models_of(listed: str) -> list[Path]:
    """What --models names."""
    if listed == "all":
        return sorted(config.parent for config in HERE.glob("models/*/config.json"))
    named = [HERE / "models" / name for name in listed.split(",")]
    given = map(Path, listed.split(","))
    return [own if own.is_dir() else path for own, path in zip(named, given, strict=True)]


def run_part(
    part: str,
    model: Path | None,
    folder: Path,
    seconds: float,
    options: argparse.Namespace,
    flags: list[str],
) -> dict[str, Any]:
    """What the part wrote to its file, and "error" if it did not end well."""
    found = dict[str, Any]()
    out = folder / "part.json"
    out.unlink(missing_ok=True)
    cache = folder / f"kernels-{model.name if model else 'alone'}"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
    try:
        if part == "start":
            assert model is not None
            return {
                "ready_s": ready_seconds(
                    http_flags(model, folder, options, flags), environment, seconds + GRACE_S / 2
                )
            }
        bound_to(
            command_of(part, model, folder, seconds, options, flags, out),
            seconds + GRACE_S / 2,
            environment,
        )
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        found["error"] = str(error)[:300]
        say(f"{part} failed: {found['error']}")
    with contextlib.suppress(OSError, ValueError):
        found |= json.loads(out.read_text())
    return found


def command_of(
    part: str,
    model: Path | None,
    folder: Path,
    seconds: float,
    options: argparse.Namespace,
    flags: list[str],
    out: Path,
) -> list[str]:
    common = ["--json", str(out)]
    bench = [sys.executable, "-m", "pagewire", "bench"]
    if part == "kernels":
        return [*bench, "kernels", *common]
    assert model is not None
    common += ["--runs", str(options.runs), "--scale", str(options.scale)]
    common += ["--budget-s", f"{seconds:.0f}"]
    if part == "offline":
        command = [*bench, "offline", "--model", str(model), "--skip-tokenizer-init"]
        return [*command, "--workloads", f"all,{EQUAL}", *common, *flags]
    if part == "path":
        command = [*bench, "path", "--replicas", "1x1,2x2,4x2", "--step-ms", "0,2"]
        return [*command, *common, "--runs", "1", *http_flags(model, folder, options, flags)]
    plot = ["--plot", f"{options.plot_dir}/{model.name}.png"] if options.plot_dir else []
    words = [] if options.tokenizer else ["--vocab", "30000"]
    return [*bench, "serve", *common, *plot, *words, *http_flags(model, folder, options, flags)]


def http_flags(
    model: Path, folder: Path, options: argparse.Namespace, flags: list[str]
) -> list[str]:
    """What `pagewire serve` is started with."""
    for name in ("frontends", "tokenizers"):
        if count := getattr(options, f"num_{name}"):
            flags = [*flags, f"--num-{name}", count]
    if not options.tokenizer:
        return ["--model", str(model), "--skip-tokenizer-init", *flags]
    made = folder / model.name
    if not made.exists():
        make_text_model(model, Path(options.tokenizer), made)
    return ["--model", str(made), *flags]


def make_text_model(model: Path, tokenizer: Path, made: Path) -> None:
    """The model's configuration with the tokenizer's vocabulary, and the tokenizer beside it."""
    made.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.is_file() and file.name.startswith(
            ("tokenizer", "special_tokens", "vocab", "merges")
        ):
            shutil.copy(file, made / file.name)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "vocab_size": vocabulary(tokenizer / "tokenizer.json"),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (made / "config.json").write_text(json.dumps(config))


def vocabulary(file: Path) -> int:
    """One more than the largest id of a tokenizer.json."""
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    largest = max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1
    return 1 + max([largest, *(token["id"] for token in content.get("added_tokens", ()))])


def bound_to(command: list[str], seconds: float, environment: dict[str, str]) -> None:
    """Run a command; what is left of it after `seconds` is ended with all its children. Raises
    RuntimeError unless it ends well."""
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        code = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        raise RuntimeError(f"stopped after {seconds:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise RuntimeError(f"ended with exit code {code}")


# --- tables ---


def tables(report: dict[str, Any], known: bool) -> Iterator[str]:
    """Short ones of everything, in the order of the report."""
    parts = report["parts"]
    for name, part in parts.items():
        kind = name.partition(" ")[0]
        if error := part.get("error"):
            yield f"{name}: {error}"
        if kind == "kernels" and "rows" in part:
            yield kernels.short_table(part["rows"])
        elif kind == "offline" and "workloads" in part:
            yield offline.tables(part, results(part["workloads"]), known)
        elif kind == "path" and "rows" in part:
            yield path.tables(part, results(part["rows"]))
        elif kind == "http" and "loads" in part:
            yield serve.tables(part, results(part["loads"]), known)
    yield starts(parts, known)
    yield http_beside_offline(parts)


def results(written: dict[str, Any]) -> dict[str, Result]:
    nan = float("nan")
    return {
        name: Result(
            [
                {key: nan if value is None else value for key, value in row.items()}
                for row in entry["runs"]
            ],
            entry.get("error", ""),
        )
        for name, entry in written.items()
    }


def starts(parts: dict[str, Any], known: bool) -> str:
    rows: list[list[Any]] = []
    for name, part in parts.items():
        kind, _, model = name.partition(" ")
        short = (
            identify(str(next((file for file in MODELS if file.name == model), "")))
            if known
            else ""
        )
        said = {
            "http": "first start, kernels not compiled",
            "start": "second start",
            "offline": "LLM, kernels compiled",
        }.get(kind)
        if said and part.get("ready_s"):
            memory = part.get("gpu_gib") or ""
            rows.append(
                [
                    model,
                    said,
                    part["ready_s"],
                    part.get("kv_tokens", ""),
                    memory,
                    *cells(short, "start", "ready s", part["ready_s"]),
                ]
            )
    return table(
        "start-up",
        ("model", "which", "ready s", "KV tokens", "GPU GiB", "vLLM", "goal", "of goal"),
        rows,
    )


def http_beside_offline(parts: dict[str, Any]) -> str:
    rows: list[list[Any]] = []
    for name, part in parts.items():
        if name.startswith("http "):
            model = name.removeprefix("http ")
            over = part.get("loads", {}).get(EQUAL, {}).get("median", {}).get("out tok/s")
            within = (
                parts.get(f"offline {model}", {})
                .get("workloads", {})
                .get(EQUAL, {})
                .get("median", {})
                .get("out tok/s")
            )
            if over and within:
                rows.append(
                    [
                        model,
                        over,
                        within,
                        f"{over / within:.0%}",
                        part.get("ceiling", {}).get("out tok/s", ""),
                    ]
                )
    return table(
        f"{EQUAL}, out tok/s",
        ("model", "over HTTP", "offline", "HTTP / offline", "ceiling without a model"),
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
