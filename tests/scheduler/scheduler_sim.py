"""A scheduler under test with simulated workers and tokenizers around it, all in one thread and
without sockets.

The simulated worker executes Steps as a real one must: it keeps tokens by slot, writes for every
computed token a hash of all tokens up to it into the cell of the block that its table gives (as
real keys and values depend on all of them), checks all that it reads back against the slot's tokens
(so that a wrong, stale or wrongly shared block is seen), and says as next token a hash of all
tokens before it. `World.audit` compares the scheduler's books with what was really written.
"""

import hashlib
import itertools
from collections import deque
from dataclasses import dataclass, field

import msgspec
import numpy as np
from pagewire.config import SchedulerConfig
from pagewire.scheduler import batch, kv_cache
from pagewire.scheduler.blocks import SEALED, WRITABLE
from pagewire.scheduler.request import Phase
from pagewire.scheduler.state import Scheduler, Tick
from pagewire_protocol.messages import (
    Cancel,
    End,
    Goodbye,
    Hello,
    Peer,
    Placed,
    PromptLogprobs,
    Role,
    Roster,
    Shutdown,
    Step,
    StepCost,
    StepResult,
    Submit,
    TokenizerFacts,
    Tokens,
    ToTokenizer,
    ToWorker,
    WorkerFacts,
    pack,
)
from pagewire_protocol.sampling import Sampling

kv_cache.WORTH_WAITING = 2  # so that the short prompts here meet it
batch.LEAST_CHUNK = 5
QUICK = StepCost(0.1, 0.001, 0.1, 1.0)
"""So short that as many steps are sent ahead as may be."""
SLOW = StepCost(1.0, 0.5, 5_000.0, 100_000.0)
"""A few decodes or the prompts here fill a step of 10 ms, and more than one."""
VOCAB = 1000
ENCODER = msgspec.msgpack.Encoder()
DECODERS = {"w": msgspec.msgpack.Decoder(ToWorker), "t": msgspec.msgpack.Decoder(ToTokenizer)}


def next_token(tokens, vocab=VOCAB):
    digest = hashlib.blake2b(np.array(tokens, np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab


def expected_output(prompt, sampling, eos=(), vocab=VOCAB):
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_tokens:
        token = next_token(tokens, vocab)
        tokens.append(token)
        made = len(tokens) - len(prompt)
        if made >= sampling.min_tokens and (
            token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)
        ):
            break
    return tokens[len(prompt) :]


def ints(column, code=np.int32):
    return np.frombuffer(column, code).tolist()


class SlotState:
    def __init__(self, admission):
        self.tokens = ints(admission.prompt) + ints(admission.output)
        self.blocks = ints(admission.blocks)
        self.computed = admission.computed
        self.execution = admission.execution
        self.prefill_only = admission.sampling.max_tokens == 0
        self.prompt, self.scored = (
            len(ints(admission.prompt)),
            admission.sampling.prompt_logprobs >= 0,
        )
        self.marks = []

    def mark(self, position):
        """What the cell of `position` must hold."""
        while len(self.marks) <= position:
            before = self.marks[-1] if self.marks else 0
            self.marks.append((before * 1_000_003 + self.tokens[len(self.marks)] + 1) % (2**61 - 1))
        return self.marks[position]


@dataclass
class Admitted:
    """A slot's request as the steps that were sent know it: the blocks of its table, and the first
    position that a step whose result is not delivered yet may write."""

    blocks: list
    first: int
    length: int


class Shadow:
    """Where the steps that were sent may write: until their result is delivered the blocks are in
    use. Steps that bring one token a row write where it can be told when they are sent; with other
    numbers anything may be written behind the last position that is certain."""

    def __init__(self, block_size, exact):
        self.block_size, self.exact = block_size, exact
        self.slots, self.last = {}, []
        self.runs = {}
        """By step: (what is in the slot, first position, count) of each slot."""

    def sent(self, step):
        if step.clear:  # earlier steps are executed before it, or never
            self.slots.clear()
            self.runs.clear()
        given = [
            b for a in step.admit for b in ints(a.blocks)[a.computed // self.block_size :]
        ] + ints(step.grow_blocks)
        for n in self.runs:
            blocks = self._written_by(n)
            assert not blocks & set(given), (
                f"blocks {blocks & set(given)} are given away while step {n}, which writes them, is in flight"
            )
        for a in step.admit:
            length = len(ints(a.prompt)) + len(ints(a.output))
            self.slots[a.slot] = Admitted(ints(a.blocks), a.computed, length)
        for slot, block in zip(ints(step.grow_slots), ints(step.grow_blocks), strict=True):
            self.slots[slot].blocks.append(block)
        if not step.repeat:
            self.last = ints(step.run_slots)
        counts = [1] * len(self.last) if step.repeat else ints(step.run_counts)
        run = {}
        for slot, count in zip(self.last, counts, strict=True):
            admitted = self.slots[slot]
            run[slot] = admitted, admitted.first, count
            if self.exact:
                admitted.first += count
        self.runs[step.n] = run

    def delivered(self, result):
        run = self.runs.pop(result.n, None)
        if run is None or self.exact:
            return
        slots = ints(result.slots)
        counts = ints(result.counts) if result.counts else [1] * len(slots)
        brought = dict(zip(slots, counts, strict=True))
        for slot, (admitted, _, count) in run.items():
            if slot in brought:
                admitted.length += brought[slot]
                admitted.first = admitted.length - 1
            else:
                admitted.first += count

    def in_use(self):
        return set().union(*(self._written_by(n) for n in self.runs))

    def _written_by(self, n):
        blocks = set()
        for admitted, first, count in self.runs[n].values():
            if self.exact:
                last = first + count - 1
                blocks |= set(
                    admitted.blocks[first // self.block_size : last // self.block_size + 1]
                )
            else:
                blocks |= set(admitted.blocks[admitted.first // self.block_size :])
        return blocks


class SimWorker:
    """`inbox` holds Steps not executed yet, `results` those executed but not delivered."""

    def __init__(
        self,
        number,
        num_blocks=32,
        block_size=4,
        max_num_seqs=8,
        max_model_len=64,
        eos=(),
        cascade=True,
        cost=None,
        row_tokens=(1,),
        forced=(0,),
        stages=1,
    ):
        """row_tokens: how many tokens the rows of its steps bring, one after the other, as far as
        the slot's blocks have room for them. forced: how many more, which nobody counts on."""
        self.incarnation = 1000 + number
        self.peer = Peer(
            Role.WORKER, f"worker-{number}", f"ipc:///w{number}", self.incarnation, True
        )
        self.facts = WorkerFacts(
            num_blocks,
            block_size,
            max_num_seqs,
            max_model_len,
            VOCAB,
            tuple(eos),
            "sim",
            cascade,
            cost,
            max_tokens_per_row=max(1, *row_tokens),
            max_forced_tokens=max(forced),
            pipeline_parallel_size=stages,
        )
        self.row_tokens = itertools.cycle(row_tokens)
        self.forced = itertools.cycle(forced)
        self.always_one = set(row_tokens) == {1} and not any(forced)
        self.slots = {}
        self.cells = np.full((num_blocks, block_size), -1, np.int64)
        self.shadow = Shadow(block_size, self.always_one)
        self.prefixes = [None] * num_blocks
        self.last = []
        self.shared = None
        self.inbox = deque()
        self.results = deque()
        self.steps = []
        self.flag_next = set()
        self.left_out = 0
        """Rows that had no room for their token."""
        self.shuffle = False

    def execute(self):
        step = self.inbox.popleft()
        self.steps.append(step)
        former = self.steps[-2].n if len(self.steps) > 1 else 0
        assert step.n > former if step.clear else step.n == former + 1
        if step.clear:
            self.slots.clear()
        for slot in ints(step.retire):
            self.slots.pop(slot, None)
        for admission in step.admit:
            assert admission.slot not in self.slots, f"slot {admission.slot} is admitted to twice"
            assert admission.slot < self.facts.max_num_seqs
            self.slots[admission.slot] = SlotState(admission)
        for slot, block in zip(ints(step.grow_slots), ints(step.grow_blocks), strict=True):
            self.slots[slot].blocks.append(block)
        if step.repeat:
            assert not step.run_slots and not step.run_counts and step.shared is None
            counts = [1] * len(self.last)
        else:
            self.last, counts, self.shared = (
                ints(step.run_slots),
                ints(step.run_counts),
                step.shared,
            )
        assert len(set(self.last)) == len(self.last)
        self._one_writer(counts)
        if self.shared is not None:
            self._truly_shared(counts)
        before = [self.slots[slot].computed for slot in self.last]
        rows = [
            (slot, self._run(slot, count)) for slot, count in zip(self.last, counts, strict=True)
        ]
        runs = zip(self.last, before, counts, strict=True)
        prompts = tuple(
            self._score(slot, first, count)
            for slot, first, count in runs
            if self._scores(slot, first)
        )
        self._report(step, [(slot, tokens) for slot, tokens in rows if tokens is not None], prompts)

    def _scores(self, slot, first):
        return self.slots[slot].scored and first < self.slots[slot].prompt - 1

    def _score(self, slot, first, count):
        """Token t has log-probability -t."""
        state = self.slots[slot]
        own = state.tokens[first + 1 : min(first + 1 + count, state.prompt)]
        ones = pack("i", [1] * len(own))
        return PromptLogprobs(
            slot, first + 1, ones, ones, pack("i", own), pack("f", [-token for token in own])
        )

    def _lacks_room(self, slot):
        """A forced run has filled the blocks that the slot's next token was to go to."""
        state, size = self.slots[slot], self.facts.block_size
        decodes = state.computed == len(state.tokens) - 1
        is_full = state.computed == len(state.blocks) * size
        return self.facts.max_forced_tokens > 0 and decodes and is_full

    def _one_writer(self, counts):
        writers = {}
        for slot, count in zip(self.last, counts, strict=True):
            state = self.slots[slot]
            size = self.facts.block_size
            if self._lacks_room(slot):
                continue
            for position in range(state.computed, state.computed + count):
                assert position // size < len(state.blocks), (
                    f"slot {slot}: no block for position {position}"
                )
                block = state.blocks[position // size]
                assert writers.setdefault(block, slot) == slot, (
                    f"slots {slot} and {writers[block]} both write block {block}"
                )

    def groups(self):
        """The present groups: (slots, common tokens)."""
        if self.shared is None:
            return []
        order, starts, lengths = (
            ints(column) for column in (self.shared.order, self.shared.starts, self.shared.lengths)
        )
        assert len(starts) == len(lengths) + 1 and starts[0] == 0 and starts[-1] == len(order)
        return [
            ([self.last[i] for i in order[a:b]], n)
            for a, b, n in zip(starts, starts[1:], lengths, strict=False)
        ]

    def _truly_shared(self, counts):
        size, seen = self.facts.block_size, set()
        assert self.facts.cascade, "groups for a worker that cannot use them"
        leading = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        assert max(ints(self.shared.order)) < leading, "a group names rows behind a chunk"
        for slots, tokens in self.groups():
            assert (
                len(slots) > 1
                and tokens > 0
                and tokens % size == 0
                and not seen & set(slots)
                and len(set(slots)) == len(slots)
            )
            seen |= set(slots)
            first = self.slots[slots[0]].blocks[: tokens // size]
            for slot in slots:
                state = self.slots[slot]
                assert tokens <= state.computed, (
                    f"slot {slot} shares {tokens} tokens but has computed only {state.computed}"
                )
                assert state.blocks[: tokens // size] == first, (
                    f"slot {slot} does not share its first {tokens} tokens"
                )

    def _run(self, slot, count):
        """The tokens that the row brings; None where it samples none."""
        state, size = self.slots[slot], self.facts.block_size
        if self._lacks_room(slot):
            self.left_out += 1
            return []
        assert count >= 1 and state.computed + count <= len(state.tokens)
        self._compute(slot, state.computed + count)
        if state.computed < len(state.tokens) or state.prefill_only:
            return None
        room = len(state.blocks) * size - state.computed
        wanted = next(self.row_tokens)
        if wanted:
            wanted += next(self.forced)
        brings = min(wanted, room + 1)
        tokens = []
        for _ in range(brings):
            tokens.append(next_token(state.tokens))
            state.tokens.append(tokens[-1])
        if tokens:
            self._compute(slot, len(state.tokens) - 1)
        else:
            state.computed -= 1
        return tokens

    def _compute(self, slot, end):
        state, size = self.slots[slot], self.facts.block_size
        begin, state.computed = state.computed, end
        for position in range(begin, end):
            self.cells[state.blocks[position // size], position % size] = state.mark(position)
        for position in range(end):
            block = state.blocks[position // size]
            assert self.cells[block, position % size] == state.mark(position), (
                f"slot {slot} reads foreign content in block {block}"
            )
        for i in range(begin // size, -(-end // size)):
            self.prefixes[state.blocks[i]] = tuple(state.tokens[: min((i + 1) * size, end)])

    def _report(self, step, rows, prompts):
        flags = [1 if slot in self.flag_next else 0 for slot, _ in rows]
        if any(flags):
            self.flag_next.clear()
        order = list(range(len(rows)))
        if self.shuffle:
            order.reverse()
        said = [
            [-1] * len(tokens) if flag else tokens
            for flag, (_, tokens) in zip(flags, rows, strict=True)
        ]
        self.results.append(
            StepResult(
                step.epoch,
                self.incarnation,
                step.n,
                pack("i", [rows[i][0] for i in order]),
                pack("i", [token for i in order for token in said[i]]),
                bytes(flags[i] for i in order),
                prompt_logprobs=prompts,
                counts=b"" if self.always_one else pack("i", [len(said[i]) for i in order]),
            )
        )


@dataclass
class Attempt:
    """What an owner holds of one attempt, and the rules by which it accepts."""

    rid: bytes
    attempt: int
    prompt: list
    output: list
    sampling: Sampling
    tokenizer: str
    execution: int | None = None
    placed: Placed | None = None
    ends: list = field(default_factory=list)
    cancelled: bool = False
    scores: dict = field(default_factory=dict)
    """Log-probabilities of the prompt, by position."""


class World:
    def __init__(self, epoch=1, **config):
        self.config = SchedulerConfig(**config)
        self.forgotten = []
        self.scheduler = Scheduler(epoch, self.config, self._receive, self.forgotten.append)
        self.now = 100.0
        self.workers = {}
        self.tokenizers = {}
        self.attempts = {}
        self.rosters = {}
        self.shutdowns = []
        """(inbox, reason) of the workers that were told to end."""
        self._handles = 0
        self._rids = 0
        self._names = 0
        self.tick()

    # --- events
    #   -------------------------------------------------------------------------------------------------------

    def send(self, event):
        self.scheduler.handle(event)

    def tick(self, seconds=0.001):
        self.now += seconds
        self.send(Tick(self.now))
        self.audit()

    def add_worker(self, **facts):
        self._names += 1
        worker = SimWorker(self._names, **facts)
        self.workers[worker.peer.inbox] = worker
        self.send(Hello(worker.peer, worker.facts))
        return worker

    def add_tokenizer(self):
        self._names += 1
        peer = Peer(
            Role.TOKENIZER,
            f"tokenizer-{self._names}",
            f"ipc:///t{self._names}",
            5000 + self._names,
            True,
        )
        self.tokenizers[peer.inbox] = peer
        self.send(Hello(peer, None, TokenizerFacts(True, True, VOCAB)))
        return peer.inbox

    def kill_worker(self, worker, failed=False):
        del self.workers[worker.peer.inbox]
        self.send(Goodbye(worker.incarnation, failed))

    def kill_tokenizer(self, inbox):
        peer = self.tokenizers.pop(inbox)
        for handle in [h for h, a in self.attempts.items() if a.tokenizer == inbox]:
            self.attempts[handle].cancelled = True
        self.send(Goodbye(peer.incarnation))

    def submit(
        self,
        prompt,
        tokenizer=None,
        rid=None,
        attempt=1,
        output=(),
        priority=0,
        salt="",
        adapter="",
        worker_deaths=0,
        timeout_ms=0,
        **sampling,
    ):
        self._handles += 1
        if rid is None:
            self._rids += 1
            rid = self._rids.to_bytes(16, "big")
        tokenizer = tokenizer or next(iter(self.tokenizers))
        sampling = Sampling(seed=0, **{"max_tokens": 8, **sampling})
        handle = self._handles
        self.attempts[handle] = Attempt(
            rid, attempt, list(prompt), list(output), sampling, tokenizer
        )
        self.send(
            Submit(
                rid,
                attempt,
                handle,
                tokenizer,
                pack("i", prompt),
                pack("i", output),
                sampling,
                priority,
                salt,
                adapter=adapter,
                worker_deaths=worker_deaths,
                timeout_ms=timeout_ms,
            )
        )
        return handle

    def cancel(self, handle):
        attempt = self.attempts[handle]
        self.send(Cancel(((attempt.rid, attempt.attempt),)))

    def step(self, worker=None):
        """Every worker with a step executes one and its result is delivered."""
        for one in [worker] if worker else list(self.workers.values()):
            if one.inbox:
                one.execute()
            if one.results:
                self.deliver(one)
        self.tick()

    def deliver(self, worker):
        result = worker.results.popleft()
        worker.shadow.delivered(result)
        self.send(result)

    def run(self, limit=2000):
        """Until nothing moves."""
        self.tick()
        for _ in range(limit):
            if not any(worker.inbox or worker.results for worker in self.workers.values()):
                return
            self.step()
        raise AssertionError(f"still busy after {limit} steps")

    # --- what comes back
    #   ----------------------------------------------------------------------------------------------

    def _receive(self, inbox, message):
        """As its receiver decodes it, which drops what does not fit its type."""
        message = DECODERS["w" if inbox in self.workers else "t"].decode(ENCODER.encode(message))
        match message:
            case Step():
                if inbox in self.workers:
                    self.workers[inbox].shadow.sent(message)
                    self.workers[inbox].inbox.append(message)
            case Tokens():
                self._tokens(inbox, message)
            case Roster():
                self.rosters[inbox] = message
            case Shutdown():
                self.shutdowns.append((inbox, message.reason))

    def _tokens(self, inbox, message):
        for placed in message.placed:
            attempt = self.attempts[placed.handle]
            assert attempt.placed is None and attempt.attempt == placed.attempt
            attempt.placed = placed
        for entry in message.prompt_logprobs:
            self._scored(inbox, entry)
        handles = ints(message.handles, np.uint32)
        columns = (
            handles,
            ints(message.attempts, np.uint32),
            ints(message.executions, np.uint64),
            ints(message.positions),
            ints(message.counts) if message.counts else [1] * len(handles),
        )
        tokens = iter(ints(message.tokens))
        for handle, number, execution, position, count in zip(*columns, strict=True):
            assert count > 0, "a row without a token"
            attempt = self.attempts[handle]
            assert (
                attempt.tokenizer == inbox
                and attempt.attempt == number
                and not attempt.ends
                and not attempt.cancelled
            )
            assert attempt.placed is not None, "tokens before Placed"
            assert attempt.execution in (None, execution), "two executions of one attempt"
            attempt.execution = execution
            assert position == len(attempt.output), (
                f"position {position} after {len(attempt.output)} tokens"
            )
            attempt.output += itertools.islice(tokens, count)
        assert next(tokens, None) is None, "tokens that belong to no row"
        for end in message.ended:
            attempt = self.attempts[end.handle]
            assert (
                attempt.tokenizer == inbox and attempt.attempt == end.attempt and not attempt.ends
            ), "a second End"
            attempt.ends.append(end)

    def _scored(self, inbox, entry):
        attempt = self.attempts[entry.handle]
        assert (
            attempt.tokenizer == inbox
            and attempt.attempt == entry.attempt
            and not attempt.ends
            and not attempt.cancelled
        )
        assert attempt.placed is not None and attempt.execution in (None, entry.execution)
        for position, token in enumerate(ints(entry.ids), entry.first):
            assert attempt.prompt[position] == token
            attempt.scores[position] = token

    def end(self, handle) -> End:
        (end,) = self.attempts[handle].ends
        return end

    def output(self, handle):
        return self.attempts[handle].output

    def expected(self, handle, eos=()):
        attempt = self.attempts[handle]
        return expected_output(attempt.prompt, attempt.sampling, eos)

    # --- the law
    #   ------------------------------------------------------------------------------------------------------

    def audit(self):
        self.scheduler.engine.check()
        for state in self.scheduler.engine.workers.values():
            worker = self.workers.get(state.inbox)
            if worker is not None:
                audit_worker(state, worker)

    def assert_idle(self):
        """Nothing runs, waits or is held."""
        engine = self.scheduler.engine
        assert (
            not engine.live
            and engine.queue.count == 0
            and engine.queue.tokens == 0
            and engine.queue.head() is None
        )
        for state in engine.workers.values():
            pool = state.kv_cache.pool
            assert pool.available == pool.total, f"{pool.total - pool.available} blocks are lost"
            assert (
                not state.in_flight.steps
                and not state.kv_cache.deferred
                and not state.prefill
                and state.load == 0
            )
            assert not state.decode_set and (state.slots.stop_token_uses <= 1).all()


def world(workers=1, facts=None, **config):
    """One with `workers` workers that have these facts, and a tokenizer."""
    made = World(**config)
    for _ in range(workers):
        made.add_worker(**(facts or {}))
    made.add_tokenizer()
    made.tick()
    return made


def audit_worker(books, worker):
    """Holders are counted once each, one writer a block, and what the index claims is what was
    written."""
    pool = books.kv_cache.pool
    holders, writers = [0] * pool.total, [0] * pool.total
    held = [r.blocks for r in books.requests() if r.phase is Phase.RUNNING] + [
        entry.blocks for entry in books.kv_cache.deferred
    ]
    for blocks in held:
        for block in blocks:
            holders[block] += 1
            writers[block] += pool._state[block] == WRITABLE
    for block in range(pool.total):
        state = pool._state[block]
        assert writers[block] == (state == WRITABLE), (
            f"block {block}: state {state}, {writers[block]} writers"
        )
        assert holders[block] == (
            1 if state == WRITABLE else pool._refs[block] if state == SEALED else 0
        ), f"block {block}: {holders[block]}"
        assert (block in pool._idle) == (state == SEALED and pool._refs[block] == 0)
    assert len(set(pool._free)) == len(pool._free)
    in_flight = worker.shadow.in_use()
    for block in in_flight:
        assert holders[block], f"block {block} is free while a step that writes it is in flight"
    for key, block in pool._index.items():
        assert pool.is_sealed(block) and pool.hash_of(block) == key
        content = worker.prefixes[block]
        assert block not in in_flight, (
            f"block {block} is shared while a step that writes it is in flight"
        )
        assert content is not None and len(content) % books.kv_cache.block_size == 0, (
            f"block {block} is shared before it was full"
        )
        assert pool_claim(books, key) in (None, content), (
            f"block {block} does not hold what its hash says"
        )


def pool_claim(books, key):
    """The tokens that `key` stands for, where a live request knows it."""
    for request in books.requests():
        if key in request.chain:
            return tuple(
                books.slots.tokens[
                    request.slot, : (request.chain.index(key) + 1) * books.kv_cache.block_size
                ].tolist()
            )
    return None
