"""The rule-based machine of `test_scheduler_machine.py`, apart so that planted bugs can be run
under it as well."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pagewire_protocol.messages import Finish, Park
from scheduler.scheduler_sim import QUICK, SLOW, World

EOS = (5, 17, 400)
PREFIXES = [list(range(100, 100 + n)) for n in (4, 8, 13, 21)] + [
    [100, 101, 102, 103] * 4,
    [7] * 4 + list(range(100, 108)),
]

OPTIONS = [
    {},
    {},
    {"ignore_eos": True},
    {"min_tokens": 5},
    {"stop_token_ids": tuple(range(0, 900, 9))},
    {"prompt_logprobs": 0},
]
KEPT = ("max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "prompt_logprobs")


class SchedulerMachine(RuleBasedStateMachine):
    """Clients submit, cancel and resubmit; workers execute and answer at their own pace, die and
    join; tokenizers die."""

    stages = 1
    """Of each worker's pipeline."""

    @initialize(
        ahead=st.integers(1, 4),
        budget=st.sampled_from([3, 8, 64]),
        seqs=st.integers(1, 6),
        caching=st.booleans(),
        blocks=st.integers(14, 30),
        workers=st.integers(1, 2),
        cost=st.sampled_from([None, QUICK, SLOW]),
        row_tokens=st.sampled_from([(1,), (1,), (1,), (0, 1, 3), (1, 1, 0), (3,)]),
        forced=st.sampled_from([(0,), (0,), (0, 0, 2), (3, 0), (9,)]),
    )
    def start(self, ahead, budget, seqs, caching, blocks, workers, cost, row_tokens, forced):
        self.world = World(
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_step_ms=10,
            steps_in_flight=ahead,
            enable_prefix_caching=caching,
            max_queued_reqs=40,
        )
        self.facts = {
            "num_blocks": blocks,
            "block_size": 4,
            "max_num_seqs": 6,
            "max_model_len": 48,
            "eos": EOS,
            "cost": cost,
            "row_tokens": row_tokens,
            "forced": forced,
            "stages": self.stages,
        }
        for _ in range(workers):
            self.world.add_worker(**self.facts)
        self.world.add_tokenizer()
        self.world.add_tokenizer()
        self.world.tick()
        self.handles = []

    def open_handles(self):
        return [
            h
            for h in self.handles
            if not self.world.attempts[h].ends and not self.world.attempts[h].cancelled
        ]

    @rule(
        data=st.data(),
        prefix=st.integers(0, len(PREFIXES) - 1),
        tail=st.lists(st.integers(0, 6), max_size=6),
        tokens=st.integers(0, 24),
    )
    def submit(self, data, prefix, tail, tokens):
        options = data.draw(st.sampled_from(OPTIONS))
        tokenizer = data.draw(st.sampled_from(sorted(self.world.tokenizers)))
        priority = data.draw(st.sampled_from([0, 0, 0, -1, 3]))
        salt = data.draw(st.sampled_from(["", "", "", "s"]))
        prompt = [*PREFIXES[prefix], *tail]
        tokens = min(tokens, 48 - len(prompt))
        self.handles.append(
            self.world.submit(
                prompt, tokenizer, priority=priority, salt=salt, max_tokens=tokens, **options
            )
        )

    @rule(data=st.data())
    @precondition(lambda self: self.open_handles())
    def cancel(self, data):
        self.world.cancel(data.draw(st.sampled_from(self.open_handles())))

    @rule(data=st.data())
    @precondition(lambda self: self.open_handles())
    def resubmit(self, data):
        """The owner goes on with the next attempt while the old one may still run."""
        self._resubmit(
            data.draw(st.sampled_from(self.open_handles())),
            data.draw(st.sampled_from(sorted(self.world.tokenizers))),
        )

    def _resubmit(self, handle, tokenizer):
        old = self.world.attempts[handle]
        options = {name: getattr(old.sampling, name) for name in KEPT}
        new = self.world.submit(
            old.prompt,
            tokenizer,
            rid=old.rid,
            attempt=old.attempt + 1,
            output=old.output,
            **options,
        )
        self.handles.append(new)

    @rule()
    def tick(self):
        self.world.tick()

    @rule(data=st.data(), count=st.integers(1, 3))
    @precondition(lambda self: any(w.inbox for w in self.world.workers.values()))
    def execute(self, data, count):
        worker = self.world.workers[
            data.draw(st.sampled_from(sorted(i for i, w in self.world.workers.items() if w.inbox)))
        ]
        for _ in range(min(count, len(worker.inbox))):
            worker.execute()

    @rule(data=st.data(), count=st.integers(1, 3), now=st.booleans())
    @precondition(lambda self: any(w.results for w in self.world.workers.values()))
    def deliver(self, data, count, now):
        worker = self.world.workers[
            data.draw(
                st.sampled_from(sorted(i for i, w in self.world.workers.items() if w.results))
            )
        ]
        for _ in range(min(count, len(worker.results))):
            self.world.deliver(worker)
        if now:
            self.world.tick()

    @rule(count=st.integers(1, 6))
    def run_some(self, count):
        for _ in range(count):
            self.world.step()

    @rule(data=st.data())
    @precondition(lambda self: any(w.inbox for w in self.world.workers.values()))
    def poison(self, data):
        """A row of the next step comes back with non-finite logits."""
        worker = next(w for w in self.world.workers.values() if w.inbox)
        worker.flag_next.add(data.draw(st.integers(0, 5)))

    @rule(data=st.data())
    @precondition(lambda self: len(self.world.workers) > 1)
    def kill_worker(self, data):
        self.world.kill_worker(
            self.world.workers[data.draw(st.sampled_from(sorted(self.world.workers)))]
        )
        self._resubmit_lost()

    @rule()
    @precondition(lambda self: len(self.world.workers) < 3)
    def join_worker(self):
        self.world.add_worker(**self.facts)

    @rule(data=st.data())
    def kill_tokenizer(self, data):
        victim = data.draw(st.sampled_from(sorted(self.world.tokenizers)))
        fresh = self.world.add_tokenizer()
        orphans = [h for h in self.open_handles() if self.world.attempts[h].tokenizer == victim]
        self.world.kill_tokenizer(victim)
        for handle in orphans:
            self._resubmit(handle, fresh)

    def _resubmit_lost(self):
        self.world.tick()
        newest = {self.world.attempts[h].rid: h for h in self.handles}
        for handle in newest.values():
            attempt = self.world.attempts[handle]
            if attempt.ends and attempt.ends[0].finish is Finish.LOST:
                self._resubmit(handle, min(self.world.tokenizers))

    @invariant()
    def law(self):
        if hasattr(self, "world"):
            self.world.audit()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        self.world.run()
        self._resubmit_lost()
        self.world.run()
        for handle in self.handles:
            self._check(self.world.attempts[handle], self.world.expected(handle, EOS))
        self._check_scores()
        self.world.assert_idle()

    def _check_scores(self):
        """Whoever has output has the log-probabilities of the whole prompt, though perhaps from an
        earlier attempt."""
        found = {}
        for handle in self.handles:
            attempt = self.world.attempts[handle]
            scores = found.setdefault(attempt.rid, {})
            scores |= attempt.scores
            wanted = (
                dict(enumerate(attempt.prompt[1:], 1))
                if attempt.sampling.prompt_logprobs >= 0
                else {}
            )
            assert scores == wanted if attempt.output else scores.items() <= wanted.items()

    def _check(self, attempt, expected):
        assert attempt.output == expected[: len(attempt.output)]
        if attempt.cancelled:
            return
        assert len(attempt.ends) == 1, f"{len(attempt.ends)} ends"
        if attempt.ends[0].finish in (Finish.STOP, Finish.LENGTH):
            assert attempt.output == expected
        else:
            assert attempt.ends[0].finish in (
                Finish.CANCELLED,
                Finish.LOST,
                Finish.FAILED,
                Finish.REFUSED,
            )


class ParkingMachine(SchedulerMachine):
    """As that, with clients that read nothing for a while. A machine of its own, so that the other's
    histories stay as full of what it looks for."""

    @rule(data=st.data(), parked=st.booleans())
    @precondition(lambda self: self.open_handles())
    def park(self, data, parked):
        self._park(data.draw(st.sampled_from(self.open_handles())), parked)

    def _park(self, handle, parked):
        attempt = self.world.attempts[handle]
        self.world.send(Park(((attempt.rid, attempt.attempt),), parked))

    def teardown(self):
        if hasattr(self, "world"):
            for handle in self.open_handles():  # all read again
                self._park(handle, False)
        super().teardown()


class PipelineMachine(SchedulerMachine):
    """As that, with workers of several pipeline stages."""

    stages = 2
