"""What grammars take, refuse and cost, and whether answers match them.

    python bench/structured.py compile [--data ../shared/data] [--limit N]
    python bench/structured.py generate --url http://127.0.0.1:8000 [--schemas 500] [--regexes 100]
    python bench/structured.py load --url http://127.0.0.1:8000 [--streams 64] [--share 0.2]

`compile` needs no server: 1,000 schemas of MaskBench with their valid and invalid instances, and the
required tests of JSON Schema draft 2020-12; every token of each instance is asked for. `generate`
asks a server at temperature 1, streamed and not, with n = 4, and checks each whole answer with
jsonschema or re. `load` gives the time per token of streams without grammars, first alone and then
with a share of the traffic structured, and the throughput with all of it structured.
"""

import argparse
import asyncio
import json
import lzma
import random
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MAX_TOKENS = 400
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "maxLength": 60},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 8},
        "rank": {"enum": ["low", "middle", "high"]},
        "note": {"type": "string", "maxLength": 400},
    },
    "required": ["name", "age", "mail", "tags", "rank", "note"],
    "additionalProperties": False,
}


# --- the data ---


def maskbench(data: Path) -> list[dict[str, Any]]:
    """name, schema, tests (data, valid)."""
    with lzma.open(data / "maskbench-1000.jsonl.xz", "rt") as lines:
        return [json.loads(line) for line in lines]


def suite(data: Path) -> list[dict[str, Any]]:
    """The same of the JSON Schema Test Suite, a group an entry."""
    folder = data / "json-schema-test-suite" / "tests" / "draft2020-12"
    return [
        {"name": f"{file.stem}: {group['description']}", **group}
        for file in sorted(folder.glob("*.json"))
        for group in json.loads(file.read_text())
    ]


# --- compile ---


def judge(entry: dict[str, Any], compiler: Any, encode: Any, lenient: bool) -> dict[str, Any]:
    """What becomes of one schema: how it is taken, and how long that takes."""
    from pagewire.grammar.errors import GrammarError
    from pagewire.requests.errors import RequestError
    from pagewire.requests.grammars import schema_grammar

    began = time.perf_counter()
    try:
        grammar = schema_grammar(entry["schema"], "json", lenient=lenient)
        matcher = compiler.matcher(grammar)
    except RequestError as error:
        return {"outcome": "over a limit", "message": error.message}
    except GrammarError as error:
        keyword = "not supported" in str(error)
        return {"outcome": "refused by keyword" if keyword else "refused", "message": str(error)}
    compile_ms = 1000 * (time.perf_counter() - began)
    wrong: Counter[str] = Counter()
    for test in entry["tests"]:
        taken = accepts(matcher.deep_copy(), encode(json.dumps(test["data"], ensure_ascii=False)))
        if taken != test["valid"]:
            wrong["accepts an invalid one" if taken else "rejects a valid one"] += 1
    outcome = next(iter(sorted(wrong)), "right")
    return {"outcome": outcome, "compile_ms": compile_ms, "tests": len(entry["tests"])}


def accepts(matcher: Any, tokens: list[int]) -> bool:
    """Whether the text of `tokens` matches, whole."""
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def compile_all(args: argparse.Namespace) -> None:
    from pagewire.config import ModelConfig
    from pagewire.grammar.compiler import Compiler
    from pagewire.grammar.vocabulary import load_vocabulary
    from pagewire.hub.huggingface import demo_gguf
    from pagewire.tokenizer.load import load

    model = args.model or str(demo_gguf())
    tokenizer = load(Path(model)).tokenizer
    vocabulary = load_vocabulary(ModelConfig(model=model), tokenizer.get_vocab_size(), [0, 2])
    for name, entries in (("MaskBench", maskbench(args.data)), ("JSON Schema", suite(args.data))):
        for lenient in (False, True):
            compiler = Compiler(vocabulary)
            results = [
                judge(
                    entry,
                    compiler,
                    lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                    lenient,
                )
                for entry in entries[: args.limit]
            ]
            report(name + (", lenient" if lenient else ""), entries, results, args.verbose)


def report(
    name: str, entries: list[dict[str, Any]], results: list[dict[str, Any]], verbose: bool
) -> None:
    outcomes = Counter(result["outcome"] for result in results)
    times = sorted(result["compile_ms"] for result in results if "compile_ms" in result)
    print(f"{name}: {len(results)} schemas, {sum(r.get('tests', 0) for r in results)} instances")
    for outcome, count in outcomes.most_common():
        print(f"  {outcome:<24} {count:>5}")
    if times:
        cuts = [times[min(len(times) - 1, int(q * len(times)))] for q in (0.5, 0.9, 0.99)]
        print(
            "  compile ms p50 / p90 / p99 / most  " + " / ".join(f"{t:.1f}" for t in cuts), end=""
        )
        print(f" / {times[-1]:.1f}", flush=True)
    if verbose:
        for entry, result in zip(entries, results, strict=False):
            if result["outcome"] != "right":
                print(f"    {result['outcome']}: {entry['name']} {result.get('message', '')[:120]}")


# --- generate ---


def regexes(count: int) -> list[str]:
    """Expressions of the kinds that people write."""
    make = random.Random(0)
    parts = [
        lambda: f"[a-z]{{{make.randint(1, 4)},{make.randint(5, 9)}}}",
        lambda: f"[0-9]{{{make.randint(1, 5)}}}",
        lambda: make.choice(["(yes|no)", "(red|green|blue)", "(Mon|Tue|Wed)", "(a|b|c)+"]),
        lambda: make.choice(["-", ":", " ", "/", r"\.", "@", "#"]),
        lambda: make.choice([r"[A-Z][a-z]*", r"\d+", r"\w{2,8}", r"[^\n]{0,20}", "x?"]),
    ]
    return ["".join(make.choice(parts)() for _ in range(make.randint(2, 6))) for _ in range(count)]


def choices(count: int) -> list[list[str]]:
    make = random.Random(1)
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "yes",
        "no",
        "maybe",
        "never",
        "red",
        "green",
        "blue",
        "left",
        "right",
        "up",
        "down",
    ]
    return [make.sample(words, make.randint(2, 8)) for _ in range(count)]


def tasks(args: argparse.Namespace) -> list[tuple[str, dict[str, Any], Any]]:
    """(kind, parameters of the request, whether a text is right), the kinds mixed."""
    import jsonschema
    from jsonschema.validators import validator_for

    entries = maskbench(args.data)
    random.Random(args.seed).shuffle(entries)

    def schema_check(schema: Any) -> Any:
        validator = validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
        return lambda text: validator.is_valid(json.loads(text))

    asked: list[tuple[str, dict[str, Any], Any]] = []
    for entry in entries[: args.schemas]:
        schema = entry["schema"]
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        asked.append(("schema", {"response_format": form}, schema_check(schema)))
    for pattern in regexes(args.regexes):
        form = {"structured_outputs": {"regex": pattern}}
        asked.append(("regex", form, re.compile(pattern).fullmatch))
    for words in choices(args.choices):
        asked.append(("choice", {"structured_outputs": {"choice": words}}, words.__contains__))
    random.Random(args.seed).shuffle(asked)
    return asked


async def generate(args: argparse.Namespace) -> None:
    import aiohttp

    counts: Counter[tuple[str, str]] = Counter()
    gate = asyncio.Semaphore(args.streams)
    longest_space = 0

    async def ask(
        session: aiohttp.ClientSession, kind: str, fields: dict[str, Any], right: Any, stream: bool
    ) -> None:
        nonlocal longest_space
        body = {
            "messages": [{"role": "user", "content": "Write an example of what is asked for."}],
            "temperature": 1.0,
            "max_tokens": args.max_tokens,
            "n": 4,
            "stream": stream,
            "seed": args.seed,
            **fields,
        }
        async with gate:
            if time.perf_counter() - began > args.seconds:
                counts[kind, "not asked"] += 1
                return
            counts[kind, "requests"] += 1
            answers = await texts(session, args.url, body)
        for finish, text in answers:
            if finish == "stop" and kind == "schema":
                runs = re.findall(r"\s+", re.sub(r'"(?:[^"\\]|\\.)*"', '""', text))
                longest_space = max([longest_space, *map(len, runs)])
            counts[kind, verdict(finish, text, right)] += 1
            if verdict(finish, text, right) == "WRONG":
                print("WRONG", json.dumps(fields)[:2000], repr(text)[:1000], flush=True)

    began = time.perf_counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(3600)) as session:
        await asyncio.gather(
            *(
                ask(session, kind, fields, right, stream)
                for index, (kind, fields, right) in enumerate(tasks(args))
                for stream in ([False, True] if args.both else [bool(index % 2)])
            )
        )
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:<8} {outcome:<10} {count:>6}")
    print(
        f"longest whitespace outside strings: {longest_space}; {time.perf_counter() - began:.0f} s"
    )


def verdict(finish: str, text: str, right: Any) -> str:
    if finish != "stop":
        return finish
    try:
        return "right" if right(text) else "WRONG"
    except ValueError:
        return "WRONG"


async def texts(session: Any, url: str, body: dict[str, Any]) -> list[tuple[str, str]]:
    """(finish reason, text) of each choice; one ("refused", why) where there are none."""
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            error = (await answer.json())["error"]
            return [(f"refused {answer.status}", error["message"])]
        if not body["stream"]:
            whole = (await answer.json())["choices"]
            return [(choice["finish_reason"], choice["message"]["content"]) for choice in whole]
        parts: dict[int, str] = {}
        finishes: dict[int, str] = {}
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return [("error", event["error"]["message"])]
            for choice in event["choices"]:
                index = choice["index"]
                parts[index] = parts.get(index, "") + (choice["delta"].get("content") or "")
                if choice["finish_reason"]:
                    finishes[index] = choice["finish_reason"]
        return [(finishes.get(index, "cut"), text) for index, text in sorted(parts.items())]


# --- load ---


async def load_all(args: argparse.Namespace) -> None:
    for name, share in (("none", 0.0), (f"{args.share:.0%}", args.share), ("all", 1.0)):
        for _ in range(args.repeats):
            gaps, tokens, seconds = await load_once(args, share)
            plain = gaps["plain"] or [0.0]
            held = gaps["held"] or [0.0]
            print(
                f"structured {name:>5}: {tokens / seconds:8.0f} tokens/s; ms per token without a "
                f"grammar {statistics.median(plain):6.2f}, with one {statistics.median(held):6.2f}",
                flush=True,
            )


async def load_once(
    args: argparse.Namespace, share: float
) -> tuple[dict[str, list[float]], int, float]:
    """Time per token of each stream in ms, all tokens, and how long it took."""
    import aiohttp

    gaps: dict[str, list[float]] = {"plain": [], "held": []}
    total = 0

    async def stream(session: aiohttp.ClientSession, index: int) -> None:
        nonlocal total
        held = int((index + 1) * share) > int(index * share)
        body: dict[str, Any] = {
            "prompt": f"Person number {index} as JSON: ",
            "temperature": 1.0,
            "max_tokens": args.max_tokens,
            "min_tokens": args.max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": index,
        }
        if held:
            # An array without an end, so that every stream has as many tokens.
            body["structured_outputs"] = {
                "json": {"type": "array", "items": SCHEMA, "minItems": 1000}
            }
        first = last = 0.0
        used = 0
        async with session.post(f"{args.url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    last = time.perf_counter()
                    first = first or last
                    used = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", used)
        total += used
        gaps["held" if held else "plain"].append(1000 * (last - first) / max(1, used - 1))

    began = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(3600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(stream(session, index) for index in range(args.streams)))
    return gaps, total, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["compile", "generate", "load"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", default="", help="whose tokenizer; default: the demo model's")
    parser.add_argument("--limit", type=int, help="schemas of each source")
    parser.add_argument("--verbose", action="store_true", help="name each schema that is not right")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--regexes", type=int, default=100)
    parser.add_argument("--choices", type=int, default=50)
    parser.add_argument("--both", action="store_true", help="each streamed and not, not in turns")
    parser.add_argument("--streams", type=int, default=16, help="requests at a time")
    parser.add_argument("--seconds", type=float, default=36000, help="after which no more is asked")
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    match args.what:
        case "compile":
            compile_all(args)
        case "generate":
            asyncio.run(generate(args))
        case "load":
            asyncio.run(load_all(args))


if __name__ == "__main__":
    main()
