"""A check for a machine with a GPU; pytest does not collect it.

    python tests/worker/gpu_special.py [cpu|torch]

A tiny random model in float32, requests of every kind in one batch, steps several ahead of their
results, slots that pass from one request to the next, requests that are resumed. Each token of the
GPU runner is held against transformers on the CPU: its logits, restricted by its own processors.
Since a GPU rounds otherwise, a token may be second best by less than TIE. Log-probabilities of
tokens and of prompts are held against exact ones, and what the CPU's Runner says to the same
requests is counted. One line tells the verdict; the exit status is 0 when all is well. With `cpu`,
the CPU's Runner is put to the same test: does the check itself work? With `torch`, attention and
products run as on GPUs below compute capability 8.0: through torch, without graphs.
"""

import random
import sys
import tempfile
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire_kernels import capability
from pagewire_protocol.messages import Admission, Step, StepResult, pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.conftest import Driver
from worker.sampling_reference import bias, continued, restricted, scored, words

VOCAB, BLOCKS, COUNT, AHEAD, EOS = 500, 600, 24, 4, (2,)
TIE, NEAR = 0.02, 0.01
GREEDY: dict[str, Any] = {"seed": 3, "max_tokens": 200, "temperature": 0.0}
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

Asked = list[tuple[list[int], Sampling]]
"""(prompt, sampling) of each request."""
Scores = list[tuple[int, float]]


class Model:
    """The oracle, saved at `path`."""

    def __init__(self, path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=VOCAB,
            max_position_embeddings=512,
            eos_token_id=2,
            initializer_range=0.2,
            **SHAPE,
        )
        self._model: Any = LlamaForCausalLM(config).eval()
        self._model.save_pretrained(path)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self._model(torch.tensor([tokens])).logits[0]


def requests(model: Model, make: random.Random) -> Asked:
    """Twelve of different kinds, in random order; what they forbid is what they would otherwise
    say."""
    found: Asked = []
    for which in range(12):
        prompt = [make.randrange(3, VOCAB) for _ in range(make.randrange(2, 70))]
        out = continued(model.logits, prompt, Sampling(**GREEDY), EOS, COUNT)
        pairs = [list(pair) for pair in pairwise(out)]
        ends = {"min_tokens": 9, "stop_token_ids": tuple(out[:3])}
        counts = {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": -0.3}
        some = pack("i", sorted({*make.sample(range(VOCAB), 200), *out[:5]}))
        kinds: list[dict[str, Any]] = [
            {},
            {"logprobs": 5, "prompt_logprobs": 4},
            {"allowed_ids": pack("i", make.sample(range(VOCAB), 30))},
            bias({out[0]: -20.0, out[2]: -3.0, make.randrange(VOCAB): 4.0}),
            {"bad_words": words(*pairs, out[:3], [out[4]])},
            {"bad_words": words(out[2:22]), "prompt_logprobs": 0},
            ends,
            counts,
            {
                **counts,
                **ends,
                **bias({out[1]: -5.0}),
                "allowed_ids": some,
                "bad_words": words(*pairs),
                "logprobs": 20,
            },
            {
                **ends,
                "bad_words": words(*pairs),
                "temperature": 0.7,
                "top_k": 1,
                "prompt_logprobs": 20,
            },
            {"allowed_ids": pack("i", EOS), "min_tokens": 5},
            {
                "temperature": 0.9,
                "top_p": 0.95,
                "bad_words": words(*[[token] for token in out]),
                "logprobs": 2,
            },
        ]
        found.append((prompt, Sampling(**{**GREEDY, **kinds[which]})))
    make.shuffle(found)
    return found


def runner(path: Path, device: str) -> Any:
    settings = WorkerConfig(device=device, dtype="float32", num_kv_blocks=BLOCKS)
    given = path, ModelConfig(), SchedulerConfig(max_num_seqs=16), settings
    if device == "cuda":
        from pagewire.worker.gpu.runner import start

        return start(*given)
    from pagewire.worker.cpu.runner import Runner
    from pagewire.worker.runners import AsyncFromSync

    return AsyncFromSync(Runner(*given))


class Lane:
    """A runner that is fed several steps ahead; `results` and `out`, by slot, grow when they
    land."""

    def __init__(self, path: Path, device: str) -> None:
        self._runner = runner(path, device)
        self._block = self._runner.facts().block_size
        self._flights: deque[Any] = deque()
        self._n = 0
        self.results: list[StepResult] = []
        self.out: list[list[int]] = []

    def generate(self, asked: Asked, outputs: list[list[int]], chunk: int) -> list[list[int]]:
        """All in one batch, in slots from 0 on, prompts in chunks beside others' decodes."""
        self.results, self.out = [], [list(output) for output in outputs]
        known = [
            len(prompt) + len(output) for (prompt, _), output in zip(asked, outputs, strict=True)
        ]
        sent, end = [0] * len(asked), [len(prompt) + COUNT for prompt, _ in asked]
        admit = self._admissions(asked, outputs)
        while any(n < last for n, last in zip(known, end, strict=True)):
            run = [slot for slot in range(len(asked)) if known[slot] < end[slot]]
            counts = [min(chunk, known[slot] - sent[slot]) for slot in run]
            self._launch(admit=admit, run_slots=pack("i", run), run_counts=pack("i", counts))
            admit = ()
            for slot, count in zip(run, counts, strict=True):
                sent[slot] += count
                known[slot] += sent[slot] == known[slot]
        self._launch(retire=pack("i", range(len(asked))))
        while self._flights:
            self._land()
        return self.out

    def _admissions(self, asked: Asked, outputs: list[list[int]]) -> tuple[Admission, ...]:
        free = list(range(BLOCKS))
        found: list[Admission] = []
        for slot, ((prompt, sampling), output) in enumerate(zip(asked, outputs, strict=True)):
            blocks = [free.pop() for _ in range(-(-(len(prompt) + COUNT) // self._block))]
            found.append(
                Admission(
                    slot, slot, pack("i", prompt), pack("i", output), pack("i", blocks), 0, sampling
                )
            )
        return tuple(found)

    def _launch(self, **parts: Any) -> None:
        self._flights.append(self._runner.launch(Step(1, self._n, **parts)))
        self._n += 1
        while len(self._flights) >= AHEAD:
            self._land()

    def _land(self) -> None:
        flight = self._flights.popleft()
        while not flight.done():
            time.sleep(0)
        self.results.append(flight.result())
        assert not any(self.results[-1].flags), "logits that are not finite"
        for slot, token in zip(
            unpack("i", self.results[-1].slots), unpack("i", self.results[-1].tokens), strict=True
        ):
            self.out[slot].append(token)


class Verdict:
    def __init__(self, model: Model) -> None:
        self._model = model
        self.tokens = self.ties = self.scores = 0
        self.worst = 0.0
        self.faults: list[str] = []

    def check(self, asked: Asked, lane: Lane, name: str) -> None:
        exact: list[torch.Tensor] = []
        for slot, ((prompt, sampling), output) in enumerate(zip(asked, lane.out, strict=True)):
            logits = self._model.logits(prompt + output)
            exact.append(torch.log_softmax(logits.double(), -1))
            self._tokens(logits, prompt, output, sampling, f"{name}, slot {slot}")
            runs = [
                run for result in lane.results for run in result.prompt_logprobs if run.slot == slot
            ]
            self._prompt(
                logits, exact[slot], prompt, sampling.prompt_logprobs, runs, f"{name}, slot {slot}"
            )
        ends = [
            len(prompt) + len(output) for (prompt, _), output in zip(asked, lane.out, strict=True)
        ]
        for result in reversed(lane.results):
            slots = unpack("i", result.slots).tolist()
            for slot in slots:
                ends[slot] -= 1
            for row, entries in sampled_scores(result):
                slot = slots[row]
                own = lane.out[slot][ends[slot] - len(asked[slot][0])]
                self._scores(entries, exact[slot][ends[slot] - 1], own, f"{name}, slot {slot}")

    def _tokens(
        self,
        logits: torch.Tensor,
        prompt: list[int],
        output: list[int],
        sampling: Sampling,
        name: str,
    ) -> None:
        drawn = not sampling.greedy and sampling.top_k != 1
        for step, token in enumerate(output):
            x = restricted(logits[len(prompt) + step - 1], prompt, output[:step], sampling, EOS)
            if not torch.isfinite(x).any():  # the bans yield
                allowed = Sampling(**GREEDY, allowed_ids=sampling.allowed_ids)
                x = restricted(logits[len(prompt) + step - 1], prompt, output[:step], allowed, EOS)
            behind = float(x.max() - x[token])
            self.tokens += 1
            self.ties += not drawn and 0 < behind <= TIE
            if behind > (20.0 if drawn else TIE):
                self.faults.append(f"{name}: token {step} is {token}, {behind:.3f} behind the best")

    def _prompt(
        self,
        logits: torch.Tensor,
        exact: torch.Tensor,
        prompt: list[int],
        top: int,
        runs: list[Any],
        name: str,
    ) -> None:
        told = [entry for run in runs for entry in scores_of(run)]
        wanted = scored(logits, prompt, top) if top >= 0 else []
        if [position for position, _ in told] != [position for position, _, _ in wanted]:
            self.faults.append(
                f"{name}: the prompt tokens {[position for position, _ in told]} are scored"
            )
        for position, entries in told:
            self._scores(
                entries, exact[position - 1], prompt[position], f"{name}, prompt token {position}"
            )

    def _scores(self, entries: Scores, exact: torch.Tensor, own: int, name: str) -> None:
        """The first is `own`, the others are the most likely ones, all with their
        log-probabilities."""
        best = exact.sort(descending=True).values[: len(entries) - 1].tolist()
        wrong = [abs(value - float(exact[token])) for token, value in entries]
        wrong += [abs(value - wanted) for (_, value), wanted in zip(entries[1:], best, strict=True)]
        self.scores += len(entries)
        self.worst = max(self.worst, *wrong)
        if max(wrong) > NEAR or entries[0][0] != own:
            self.faults.append(f"{name}: log-probabilities off by {max(wrong):.4f}")


def scores_of(run: Any) -> list[tuple[int, Scores]]:
    """(position, scores) of each prompt token."""
    pairs = iter(zip(unpack("i", run.ids).tolist(), unpack("f", run.values).tolist(), strict=True))
    return [
        (run.first + i, [next(pairs) for _ in range(count)])
        for i, count in enumerate(unpack("i", run.counts).tolist())
    ]


def sampled_scores(result: StepResult) -> list[tuple[int, Scores]]:
    """(row, scores) of each row that has any."""
    if (columns := result.logprobs) is None:
        return []
    pairs = iter(
        zip(unpack("i", columns.ids).tolist(), unpack("f", columns.values).tolist(), strict=True)
    )
    rows, counts = unpack("i", columns.rows).tolist(), unpack("i", columns.counts).tolist()
    return [
        (row, [next(pairs) for _ in range(count)]) for row, count in zip(rows, counts, strict=True)
    ]


def main(device: str) -> int:
    if device == "torch":
        device, capability.TRITON_TENSOR_CORES_FROM = "cuda", (99, 0)
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_special: NOT RUN, torch sees no GPU")
        return 2
    make, same, resumed = random.Random(1), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        verdict, lane = Verdict(model := Model(path)), Lane(path, device)
        for chunk in (1000, 7, 16):
            asked = requests(model, make)
            outputs = lane.generate(asked, [[] for _ in asked], chunk)
            verdict.check(asked, lane, f"chunks of {chunk}")
            again = lane.generate(asked, [out[:10] for out in outputs], 1000)
            verdict.check(asked, lane, f"resumed after chunks of {chunk}")
            cpu = Driver(path, num_kv_blocks=BLOCKS).generate(
                [prompt for prompt, _ in asked], [given for _, given in asked], COUNT
            )
            same += sum(a == b for a, b in zip(outputs, cpu, strict=True))
            resumed += sum(a == b for a, b in zip(outputs, again, strict=True))
    print(
        f"gpu_special: {'FAILED' if verdict.faults else 'OK'}, {verdict.tokens} tokens with {verdict.ties} ties, {verdict.scores} scores "
        f"within {verdict.worst:.5f}; of 36 requests {resumed} are resumed to the same end, {same} equal the CPU runner's (3 are drawn)"
    )
    print(*verdict.faults[:20], sep="\n", end="")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
