"""CPU time of a token in the tokenizer service and in its request's owner, in one process and
without sockets, in microseconds.

    PYTHONPATH=protocol:services python bench/token_path.py [--rows 256] [--frontends 1]

`pagewire bench path` measures whole processes, whose figures depend on how cold the caches are when
a process wakes up, and on what else the machine does. This is the work alone, on warm caches: each
message of a step is decoded, handled and encoded as the services do it. The least time and the
median of all steps are printed; the least one differs by 3% between runs. To compare two trees, run
this same file with each tree's PYTHONPATH in turns.
"""

import argparse
import gc
import random
import time
from array import array
from typing import cast

import msgspec
from pagewire.requests.counters import Counters
from pagewire.requests.owner import RequestOwner
from pagewire.requests.request import Job, OwnedRequest, Sink
from pagewire.tokenizer.decode import Decoding
from pagewire.tokenizer.encode import Encoder
from pagewire.tokenizer.requests import Requests
from pagewire_protocol.columns import Incarnation
from pagewire_protocol.messages import (
    Epoch,
    Generate,
    Peer,
    Prompt,
    Role,
    Roster,
    Submit,
    ToFrontend,
    Tokens,
    ToTokenizer,
)
from pagewire_protocol.sampling import Sampling, TextOptions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MAX_TOKENS = 1_000_000
EXECUTION = 1 << 43 | 7
"""Of epoch 1."""


class Counting:
    """A sink that counts the pieces of text; nothing else comes."""

    wants_tokens = False

    def __init__(self) -> None:
        self.pieces = 0

    def text(self, *_: object) -> None:
        self.pieces += 1


def byte_tokenizer() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def open_streams(
    tokenizer: Tokenizer, rows: int, frontends: list[str]
) -> tuple[Requests, list[int]]:
    """A tokenizer's requests, `rows` of them and in turns of each frontend, and their handles."""
    requests = Requests(Encoder(tokenizer, None), Decoding(tokenizer), "ipc:///t", lambda _: None)
    peers = tuple(Peer(Role.FRONTEND, inbox, inbox, Incarnation(5), True) for inbox in frontends)
    vocab_size = tokenizer.get_vocab_size()
    requests.on_roster(Roster(Epoch(1), peers, 2 * MAX_TOKENS, vocab_size, (), True, True), True)
    for row in range(rows):
        inbox = frontends[row % len(frontends)]
        rid = row.to_bytes(16, "big")
        requests.generate(
            Generate(
                rid,
                1,
                row,
                inbox,
                Prompt(text="x"),
                b"",
                Sampling(1, MAX_TOKENS, 0),
                TextOptions(),
            )
        )
    handles = [submit.handle for submit in requests.to_scheduler if isinstance(submit, Submit)]
    assert len(handles) == rows, "a request was refused"
    requests.to_scheduler.clear()
    return requests, handles


def open_owners(rows: int, frontends: list[str]) -> tuple[dict[str, RequestOwner], list[Counting]]:
    """The owners of the same requests, by inbox, and the requests' sinks."""
    owners = {
        inbox: RequestOwner(inbox, lambda *_: True, time.monotonic, Counters())
        for inbox in frontends
    }
    sinks: list[Counting] = []
    job = Job(Prompt(text="x"), Sampling(1, MAX_TOKENS, 0), TextOptions())
    for row in range(rows):
        sinks.append(Counting())
        request = OwnedRequest(job, cast(Sink, sinks[-1]), time.monotonic())
        request.handle, request.attempt = row, 1
        owners[frontends[row % len(frontends)]].live[row] = request
    return owners, sinks


def encoded_steps(handles: list[int], token_ids: list[int], steps: int) -> list[bytes]:
    """Messages of one token for each stream, drawn from `token_ids`."""
    rows = len(handles)
    draws = random.Random(1)
    encode = msgspec.msgpack.Encoder().encode
    columns = (
        array("I", handles).tobytes(),
        array("I", [1] * rows).tobytes(),
        array("Q", [EXECUTION] * rows).tobytes(),
    )
    frames: list[bytes] = []
    for step in range(steps):
        positions = array("i", [step] * rows).tobytes()
        tokens = array("i", draws.choices(token_ids, k=rows)).tobytes()
        frames.append(encode(Tokens(*columns, positions, tokens)))
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    rows = options.rows
    frontends = [f"ipc:///f{number}" for number in range(options.frontends)]
    tokenizer = byte_tokenizer()
    ids = tokenizer.get_vocab()
    ascii_ids = [ids[chr(code)] for code in range(33, 127)]
    requests, handles = open_streams(tokenizer, rows, frontends)
    owners, sinks = open_owners(rows, frontends)
    frames = encoded_steps(handles, ascii_ids, options.steps)
    encode = msgspec.msgpack.Encoder().encode
    to_tokenizer = msgspec.msgpack.Decoder(ToTokenizer)
    to_frontend = msgspec.msgpack.Decoder(ToFrontend)
    gc.collect()
    gc.freeze()
    in_tokenizer: list[float] = []
    in_owner: list[float] = []
    for frame in frames:
        began = time.perf_counter()
        requests.tokens([to_tokenizer.decode(frame)])
        sent = {
            inbox: encode(outgoing.take())
            for inbox, outgoing in requests.outgoing.items()
            if outgoing
        }
        passed_on = time.perf_counter()
        for inbox, deltas in sent.items():
            owners[inbox].on_deltas(to_frontend.decode(deltas))
        in_owner.append(time.perf_counter() - passed_on)
        in_tokenizer.append(passed_on - began)
    assert all(sink.pieces == options.steps for sink in sinks), "text was lost"
    for name, seconds in (("tokenizer", in_tokenizer), ("owner", in_owner)):
        seconds.sort()
        least, median = (1e6 * seconds[at] / rows for at in (0, len(seconds) // 2))
        print(f"{name}: {least:.3f} us a token at least, median {median:.3f}")


if __name__ == "__main__":
    main()
