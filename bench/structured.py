"""What grammars take, refuse and cost, and whether answers match them.

    python bench/structured.py compile [--data ../shared/data] [--limit N]
    python bench/structured.py generate --url http://127.0.0.1:8000 [--schemas 500] [--results FILE]
    python bench/structured.py forced [--results FILE]
    python bench/structured.py load --url http://127.0.0.1:8000 [--streams 64] [--share 0.2]

`compile` needs no server: 1,000 schemas of MaskBench with their valid and invalid instances, and
the required tests of JSON Schema draft 2020-12; every token of each instance is asked for.
`generate` asks a server at temperature 1, streamed and not, one answer or four, and checks each
whole answer with jsonschema or re, and of one that was cut that it is the beginning of such a text.
Answers are kept in a file as they come, and what is there is not asked again. `forced` says how
many of their tokens had to be what they were. `load` gives the time per token of streams without
grammars, first alone and then with a share of the traffic structured, and the throughput with all
of it structured; several processes read the streams.
"""

import argparse
import asyncio
import contextlib
import json
import lzma
import multiprocessing
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MAX_TOKENS = 200
USED = re.compile(rb'"completion_tokens": ?(\d+)')
START_S = 60
"""In which all clients must be there."""
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


class Task(NamedTuple):
    """One request, and how its answers are judged. `right` takes a whole answer, `begins` one that
    was cut: whether it is the beginning of a right one."""

    name: str
    kind: str
    fields: dict[str, Any]
    grammar: Any
    right: Callable[[str], bool]
    begins: Callable[[str], bool]
    n: int
    stream: bool
    seed: int


def tasks(args: argparse.Namespace) -> list[Task]:
    """All requests of a run, the kinds mixed. They are a function of the arguments, so that a run
    can be continued."""
    entries = maskbench(args.data)
    random.Random(args.seed).shuffle(entries)
    forms = [
        *(("schema", entry["schema"]) for entry in entries),
        *(("regex", pattern) for pattern in regexes(args.regexes)),
        *(("choice", words) for words in choices(args.choices)),
    ]
    asked: list[Task] = []
    for index, (kind, source) in enumerate(forms):
        fields, right, begins = FORMS[kind](source, index)
        # Every tenth has four answers, and every other one of all of these is streamed.
        n, stream = (4, bool(index // 10 % 2)) if index % 10 == 0 else (1, bool(index % 2))
        name = f"{kind} {index}"
        asked.append(Task(name, kind, fields, source, right, begins, n, stream, args.seed + index))
    random.Random(args.seed).shuffle(asked)
    return asked


def schema_form(schema: Any, index: int) -> tuple[dict[str, Any], Any, Any]:
    """With the whitespace that is allowed by default, and, every third time, with at most one space
    or with none."""
    import jiter
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    of = validator_for(schema, default=Draft202012Validator)
    validator = of(schema, format_checker=of.FORMAT_CHECKER)
    options: dict[str, Any] = [{}, {"whitespace_pattern": " ?"}, {"disable_any_whitespace": True}][
        index % 3
    ]
    fields: dict[str, Any] = {"structured_outputs": {"json": schema, **options}}
    if not options:
        form = {"name": "answer", "schema": schema}
        fields = {"response_format": {"type": "json_schema", "json_schema": form}}

    def begins(text: str) -> bool:
        # A number or a word that is cut is no JSON yet where nothing is around it.
        jiter.from_json(f"[{text}".encode(), partial_mode="trailing-strings")
        return True

    return fields, lambda text: validator.is_valid(json.loads(text)), begins


def regex_form(pattern: str, _: int) -> tuple[dict[str, Any], Any, Any]:
    import regex

    def begins(text: str) -> bool:
        return regex.fullmatch(pattern, text, partial=True) is not None

    right = re.compile(pattern).fullmatch
    return {"structured_outputs": {"regex": pattern}}, lambda text: right(text) is not None, begins


def choice_form(words: list[str], _: int) -> tuple[dict[str, Any], Any, Any]:
    def begins(text: str) -> bool:
        return any(word.startswith(text) for word in words)

    return {"structured_outputs": {"choice": words}}, words.__contains__, begins


FORMS: dict[str, Callable[[Any, int], tuple[dict[str, Any], Any, Any]]] = {
    "schema": schema_form,
    "regex": regex_form,
    "choice": choice_form,
}


class Answer(NamedTuple):
    """One choice. `finish`: its finish reason, or why there is none, with `text` as the message."""

    finish: str
    text: str
    tokens: list[int]


async def generate(args: argparse.Namespace) -> None:
    """Asks what the file of results does not have yet, and judges all that it has then."""
    import aiohttp

    asked = tasks(args)
    answers = recorded(args.results)
    queue = [task for task in asked if task.name not in answers]
    schemas = sum(
        task.kind == "schema" and not refused(answers[task.name])
        for task in asked
        if task.name in answers
    )
    began = time.perf_counter()

    async def ask_all(session: Any, file: Any) -> None:
        nonlocal schemas
        while time.perf_counter() - began < args.seconds:
            wanted = (t for t in queue if t.kind != "schema" or schemas < args.schemas)
            task = next(wanted, None)
            if task is None:
                return
            queue.remove(task)
            schemas += task.kind == "schema"
            answers[task.name] = await asked_of(session, args, task)
            # Schemas that are refused do not count: others come in their place.
            schemas -= task.kind == "schema" and refused(answers[task.name])
            file.write(json.dumps({"name": task.name, "answers": answers[task.name]}) + "\n")
            file.flush()

    timeout = aiohttp.ClientTimeout(3600)
    with args.results.open("a") as file:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(ask_all(session, file) for _ in range(args.streams)))
    judge_answers(asked, answers)
    print(f"{time.perf_counter() - began:.0f} s")


def recorded(results: Path) -> dict[str, list[Answer]]:
    """The answers in a file of results, by their task's name. A last line that is cut is left
    out."""
    answers: dict[str, list[Answer]] = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            answers[entry["name"]] = [Answer(*answer) for answer in entry["answers"]]
    return answers


def refused(answers: list[Answer]) -> bool:
    """The server took no request."""
    return answers[0].finish == "refused"


def judge_answers(asked: list[Task], answers: dict[str, list[Answer]]) -> None:
    """Counts by kind, and each answer that is wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    longest_space = 0
    for task in asked:
        if task.name not in answers:
            continue
        if not refused(answers[task.name]):
            counts[task.kind, "requests"] += 1
            counts[task.kind, "streamed"] += task.stream
            counts[task.kind, "with n = 4"] += task.n == 4
        for answer in answers[task.name]:
            if task.kind == "schema" and answer.finish == "stop":
                runs = re.findall(r"\s+", re.sub(r'"(?:[^"\\]|\\.)*"', '""', answer.text))
                longest_space = max([longest_space, *map(len, runs)])
            outcome = verdict(task, answer)
            counts[task.kind, outcome] += 1
            if outcome not in ("right", "cut, right so far", "refused"):
                print(outcome, task.name, json.dumps(task.fields)[:2000], repr(answer)[:2000])
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:<8} {outcome:<18} {count:>6}")
    print(f"longest whitespace outside strings: {longest_space}")


def verdict(task: Task, answer: Answer) -> str:
    """In one word or a few, WRONG among them where the answer is."""
    try:
        match answer.finish:
            case "stop":
                return "right" if task.right(answer.text) else "WRONG"
            case "length":
                return "cut, right so far" if task.begins(answer.text) else "cut, WRONG"
            case finish:
                return finish
    except ValueError:
        return "WRONG" if answer.finish == "stop" else "cut, WRONG"


async def asked_of(session: Any, args: argparse.Namespace, task: Task) -> list[Answer]:
    """Of each choice; one that says why where there are none."""
    body = {
        "messages": [{"role": "user", "content": "Write an example of what is asked for."}],
        "temperature": 1.0,
        "max_tokens": args.max_tokens,
        "n": task.n,
        "stream": task.stream,
        "seed": task.seed,
        "return_token_ids": True,
        **task.fields,
    }
    async with session.post(f"{args.url}/v1/chat/completions", json=body) as reply:
        if reply.status != 200:
            error = (await reply.json())["error"]
            return [Answer(outcome_of(reply.status), error["message"], [])]
        if not task.stream:
            whole = (await reply.json())["choices"]
            return [
                Answer(
                    choice["finish_reason"], choice["message"]["content"] or "", choice["token_ids"]
                )
                for choice in whole
            ]
        texts = [""] * task.n
        finishes = ["broken off"] * task.n
        tokens: list[list[int]] = [[] for _ in texts]
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                error = event["error"]
                return [Answer(outcome_of(error["code"]), error["message"], [])]
            for choice in event["choices"]:
                index = choice["index"]
                texts[index] += choice["delta"].get("content") or ""
                tokens[index] += choice.get("token_ids") or []
                finishes[index] = choice["finish_reason"] or finishes[index]
        return [Answer(*answer) for answer in zip(finishes, texts, tokens, strict=True)]


def outcome_of(status: int) -> str:
    """Of a request without an answer. A stream may have begun before its grammar was refused."""
    return "refused" if status == 400 else f"error {status}"


# --- forced ---


def forced(args: argparse.Namespace) -> None:
    """How many tokens of the answers of `generate` their grammars left no choice about: those that
    were the only one allowed, and those whose bytes the grammar says, in whatever tokens."""
    from pagewire.config import ModelConfig
    from pagewire.grammar.compiler import Compiler
    from pagewire.grammar.vocabulary import load_vocabulary
    from pagewire.hub.huggingface import demo_gguf
    from pagewire.requests.grammars import structured_grammar
    from pagewire.tokenizer.load import load

    model = args.model or str(demo_gguf())
    size = load(Path(model)).tokenizer.get_vocab_size()
    vocabulary = load_vocabulary(ModelConfig(model=model), size, [0, 2])
    compiler = Compiler(vocabulary)

    answers = recorded(args.results)
    sums: dict[str, Counter[str]] = {}
    for task in tasks(args):
        if task.name not in answers or not answers[task.name][0].tokens:
            continue
        outputs = SimpleNamespace(**task.fields.get("structured_outputs", {"json": task.grammar}))
        grammar = structured_grammar(outputs)
        assert grammar is not None
        title = task.kind
        if hasattr(outputs, "whitespace_pattern"):
            title = "schema, at most a space"
        elif hasattr(outputs, "disable_any_whitespace"):
            title = "schema, no whitespace"
        for answer in answers[task.name]:
            counts = count_forced(compiler.matcher(grammar), vocabulary, answer.tokens)
            sums.setdefault(title, Counter()).update(counts)
    for title, counts in sorted(sums.items()):
        total = counts.pop("tokens")
        shares = "; ".join(f"{what} {n} ({n / total:.1%})" for what, n in sorted(counts.items()))
        print(f"{title}: {total} tokens; {shares}")


def count_forced(matcher: Any, vocabulary: Any, tokens: list[int]) -> Counter[str]:
    """Of an answer's tokens, by what their grammar said of them. matcher: an LLMatcher."""
    counts: Counter[str] = Counter()
    run_length = 0
    said_before = 0
    for token in tokens:
        if token in vocabulary.eos:
            break
        is_only = int.from_bytes(matcher.compute_bitmask(), "little").bit_count() == 1
        said_bytes = max(said_before, len(matcher.compute_ff_bytes()))
        token_bytes = len(vocabulary.raw[token])
        counts["tokens"] += 1
        counts["the only one allowed"] += is_only
        counts["of bytes that the grammar says"] += said_bytes >= token_bytes
        counts["behind another such token"] += is_only and run_length > 0
        run_length = run_length + 1 if is_only else 0
        said_before = max(0, said_bytes - token_bytes)
        if not matcher.consume_token(token):
            counts["not taken"] += 1
            break
    return counts


# --- load ---


class Load(NamedTuple):
    """What some streams had: ms a token of those without and with a grammar, tokens in all, and when
    the first began and the last ended (time.perf_counter, which processes share)."""

    plain: list[float]
    held: list[float]
    tokens: int
    began: float
    ended: float


def load_all(args: argparse.Namespace) -> None:
    """By several processes, so that reading is never what limits. The kinds of traffic take turns: a
    machine that becomes slower is so for all of them."""
    context = multiprocessing.get_context("spawn")
    clients = min(args.clients, args.streams)
    barrier = context.Barrier(clients)
    shares = {"none": 0.0, f"{args.share:.0%}": args.share, "all": 1.0}
    runs: dict[str, list[list[Load]]] = {name: [] for name in shares}
    with ProcessPoolExecutor(clients, context, load_starts, (barrier,)) as pool:
        for _ in range(args.repeats):
            for name, share in shares.items():
                parts = [pool.submit(load_part, args, share, k, clients) for k in range(clients)]
                runs[name].append([part.result() for part in parts])
                print(load_line(name, runs[name][-1]), flush=True)
    if args.repeats > 1:
        # Grammars are compiled, and matchers started, in the first turn.
        print(load_verdict({name: told[1:] for name, told in runs.items()}), flush=True)


def load_verdict(runs: dict[str, list[list[Load]]]) -> str:
    """What grammars cost, by the medians of runs without any, with a few, and with nothing else."""
    none, few, every = runs.values()
    gaps = [
        statistics.median(gap for parts in told for part in parts for gap in part.plain)
        for told in (none, few)
    ]
    more = (gaps[1] - gaps[0]) / (gaps[0] or 1.0)  # 0: whole answers came at once
    rates = [statistics.median(map(tokens_per_s, told)) for told in (none, every)]
    return (
        f"streams without a grammar take {more:+.1%} a token beside others with one;"
        f" with one in all, there are {rates[1] / rates[0]:.2f} of the tokens"
    )


def tokens_per_s(parts: Sequence[Load]) -> float:
    """Of all clients together."""
    seconds = max(part.ended for part in parts) - min(part.began for part in parts)
    return sum(part.tokens for part in parts) / seconds


def load_line(name: str, parts: Sequence[Load]) -> str:
    """A line of the table, of all clients together."""
    plain = [gap for part in parts for gap in part.plain] or [0.0]
    held = [gap for part in parts for gap in part.held] or [0.0]
    return (
        f"structured {name:>5}: {tokens_per_s(parts):8.0f} tokens/s; ms per token without a "
        f"grammar {statistics.median(plain):6.2f}, with one {statistics.median(held):6.2f}"
    )


_together: list[Any] = []
"""In a client: where all clients meet before they begin."""


def load_starts(barrier: Any) -> None:
    _together.append(barrier)


def load_part(args: argparse.Namespace, share: float, client: int, clients: int) -> Load:
    """Streams client, client + clients, ... of all."""
    return asyncio.run(load_once(args, share, range(client, args.streams, clients)))


def load_body(index: int, max_tokens: int, held: bool) -> dict[str, Any]:
    """The request of stream `index`; `held`: with a grammar."""
    body: dict[str, Any] = {
        "prompt": f"Person number {index} as JSON: ",
        "temperature": 1.0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": index,
    }
    if held:
        # An array without an end, so that every stream has as many tokens.
        body["structured_outputs"] = {"json": {"type": "array", "items": SCHEMA, "minItems": 1000}}
    return body


class EventStream(asyncio.Protocol):
    """Reads one streamed answer, counts nothing but what is asked for and decodes nothing: clients
    share the machine with what they measure, and a library's take a processor each for 20,000
    tokens a second."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.first = self.last = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._fail(data.decode(errors="replace")[:500])
            return
        self._tail = (self._tail + data)[-2048:]
        if b"data: {" in data:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        if self._tail.rstrip().endswith(b"data: [DONE]") or b"\ndata: [DONE]" in data:
            self.ended.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self._fail(f"the stream has ended early: {self._tail[-200:]!r}")

    def _fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(RuntimeError(why))
        self._transport.close()

    @property
    def completion_tokens(self) -> int:
        """As its usage says."""
        return int(USED.findall(self._tail)[-1])


async def load_once(args: argparse.Namespace, share: float, indexes: Sequence[int]) -> Load:
    plain: list[float] = []
    held: list[float] = []
    total = 0
    url = urlsplit(args.url)

    async def stream(index: int) -> None:
        nonlocal total
        has_grammar = int((index + 1) * share) > int(index * share)
        body = json.dumps(load_body(index, args.max_tokens, has_grammar)).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(body)}"
            "\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        _, answer = await loop.create_connection(
            lambda: EventStream(head.encode() + body), url.hostname, url.port
        )
        await answer.ended
        used = answer.completion_tokens
        total += used
        gap = 1000 * (answer.last - answer.first) / max(1, used - 1)
        (held if has_grammar else plain).append(gap)

    _together[0].wait(START_S)
    began = time.perf_counter()
    await asyncio.gather(*(stream(index) for index in indexes))
    return Load(plain, held, total, began, time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["compile", "generate", "forced", "load"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", default="", help="whose tokenizer; default: the demo model's")
    parser.add_argument("--limit", type=int, help="schemas of each source")
    parser.add_argument("--verbose", action="store_true", help="name each schema that is not right")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--regexes", type=int, default=100)
    parser.add_argument("--choices", type=int, default=50)
    parser.add_argument(
        "--results", type=Path, default=Path("structured.jsonl"), help="where answers are kept"
    )
    parser.add_argument("--streams", type=int, default=16, help="requests at a time")
    parser.add_argument("--seconds", type=float, default=36000, help="after which no more is asked")
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4, help="processes that read streams")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    match args.what:
        case "compile":
            compile_all(args)
        case "generate":
            asyncio.run(generate(args))
        case "forced":
            forced(args)
        case "load":
            load_all(args)


if __name__ == "__main__":
    main()
