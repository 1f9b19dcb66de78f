"""Pipeline stages of the GPU's runner without a GPU: ranks are threads, their links gloo, the kernels
of steps Triton's interpreter's; against one process on the CPU, token by token."""

import threading
import time
from dataclasses import replace as replace_arch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_on_cpu
import pytest
import torch
from msgspec.structs import replace
from pagewire.worker.gpu import runner as gpu_runner
from pagewire.worker.gpu.runner import GpuRunner
from pagewire.worker.gpu.stage_part import StagePart
from pagewire.worker.gpu.stages import EarlierStage, FirstStage, LastStage, ResultSender, kind_of
from pagewire.worker.load import loader
from pagewire.worker.load.gpu_plan import GpuPlan
from pagewire.worker.load.rank_agreement import ALONE, Ranks, StageLinks
from pagewire.worker.models.decoder import HiddenStates
from pagewire.worker.models.ranks import PipelineStage
from pagewire.worker.step.rank_masks import MakeMasks
from pagewire_kernels.communicator import CommunicatorFailed
from pagewire_protocol.messages import Step, StepCost, pack, unpack
from pagewire_protocol.sampling import Sampling
from rank_threads import run_stages
from stage_grammars import check_grammar_rows
from stage_threads import collect, run_group
from worker.conftest import Driver

VOCAB, SLOTS = 300, 8
SAMPLINGS = (
    Sampling(1, 12, temperature=0.0),
    Sampling(3, 12, top_p=0.9),
    Sampling(4, 12, temperature=0.8, top_k=7, presence_penalty=1.0, logprobs=3),
    Sampling(5, 12, repetition_penalty=1.3, prompt_logprobs=2, min_tokens=4),
)
GREEDY = Sampling(0, 12, temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def events(monkeypatch):
    monkeypatch.setattr(gpu_runner.torch.cuda, "Event", gpu_on_cpu.Event)


# The CPU's attention never meets padding rows in a CPU worker, and takes the logarithm of their
# length.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")


def start(
    path: Path, model: Any, scheduler: Any, config: Any, *, incarnation: int, ranks: Ranks,
    make_masks: MakeMasks,
) -> GpuRunner:  # fmt: skip
    loaded = loader.load(path, model, config, lambda stage, fraction: None, ranks=ranks)
    loaded.plan = GpuPlan(loaded.sizing, 64, SLOTS, attends_by_torch=False)
    masks = make_masks(SLOTS, model, VOCAB, (2,))
    stage = None if ranks.stage.is_whole else StagePart(loaded, ranks, 64)
    parts = gpu_on_cpu.parts(loaded, SLOTS, masks, stage)
    return kind_of(ranks)(parts, StepCost(1.0, 0.0, 0.0), incarnation, [])  # pyright: ignore[reportArgumentType]


def numbers(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(path: Path, prompt: list[int], count: int) -> list[int]:
    return Driver(path).generate([prompt], [GREEDY], count)[0]


def generated(driver: Driver, prompts: list[list[int]]) -> tuple:
    tokens = driver.generate(prompts, list(SAMPLINGS), 12, chunk=9)
    return tokens, driver.results


@pytest.mark.parametrize(("count", "size"), [(2, 1), (3, 1), (2, 2)])
def test_the_first_stage_answers_as_one_process_does(path, count, size):
    """Chunks, chunks beside decodes, decodes alone; drawn and greedy tokens, penalties,
    log-probabilities of outputs and prompts."""
    prompts = [numbers(20, seed) for seed in range(len(SAMPLINGS))]
    (tokens, results), *_ = run_group(
        path, count, size, lambda driver: generated(driver, prompts), start=start
    )
    wanted, answers = generated(Driver(path), prompts)
    assert tokens == wanted
    for one, other in zip(results, answers, strict=True):
        assert (one.n, one.incarnation) == (other.n, other.incarnation)
        assert (one.slots, one.tokens, one.flags) == (other.slots, other.tokens, other.flags)
        assert (one.logprobs is None) == (other.logprobs is None)
        assert logprobs_of(one) == pytest.approx(logprobs_of(other), abs=2e-4)


def logprobs_of(result: Any) -> list[float]:
    own = [] if result.logprobs is None else unpack("f", result.logprobs.values)
    return [*own, *(value for one in result.prompt_logprobs for value in unpack("f", one.values))]


def test_stages_compute_steps_of_different_rows_at_a_time(path):
    """Two micro-batches, each launched before the other one's result is there."""
    prompts = [numbers(9 + seed, seed) for seed in range(4)]

    def drive(driver: Driver) -> tuple[list[list[int]], int]:
        runner = driver.runner
        admit = tuple(driver.admission(s, prompts[s], GREEDY, room=12) for s in range(4))
        counts = pack("i", [len(prompt) for prompt in prompts])
        driver.step(admit=admit, run_slots=pack("i", range(4)), run_counts=counts)
        under_way = []
        for n in range(1, 13):
            run = pack("i", [0, 1] if n % 2 else [2, 3])
            step = Step(1, n, run_slots=run, run_counts=pack("i", [1, 1]))
            under_way.append(runner.launch(step))
            if len(under_way) == 2:
                collect(driver, runner.finished(under_way.pop(0)))
        for handle in under_way:
            collect(driver, runner.finished(handle))
        return [driver.out[s] for s in range(4)], driver.facts.pipeline_parallel_size

    (tokens, stages), *_ = run_group(path, 2, 1, drive, start=start)
    assert tokens == [alone(path, prompt, 7) for prompt in prompts]
    assert stages == 2


def test_a_step_waits_for_the_tokens_of_its_own_rows(path):
    """As a scheduler sends that knows of no stages, with several steps in flight."""
    prompt = numbers(9)

    def drive(driver: Driver) -> list[int]:
        runner = driver.runner
        admit = (driver.admission(0, prompt, GREEDY, room=12),)
        one = {"run_slots": pack("i", [0]), "run_counts": pack("i", [1])}
        steps = [Step(1, 0, admit=admit, run_slots=pack("i", [0]), run_counts=pack("i", [9]))]
        steps += [Step(1, 1, **one), *(Step(1, n, repeat=True) for n in range(2, 6))]
        handles = [runner.launch(step) for step in steps]
        assert [runner.finished(handle).n for handle in handles] == list(range(6))
        for handle in handles:
            collect(driver, handle.result())
        return driver.out[0]

    tokens, *_ = run_group(path, 2, 1, drive, start=start)
    assert tokens == alone(path, prompt, 6)


@pytest.mark.parametrize("new_scheduler", [False, True])
def test_a_late_token_is_not_for_the_next_request_of_its_slot(new_scheduler, path):
    first, second = numbers(9, 1), numbers(20, 2)

    def drive(driver: Driver) -> list[int]:
        runner = driver.runner
        admit = (driver.admission(0, first, GREEDY, room=12),)
        run = pack("i", [0])
        runner.launch(Step(1, 0, admit=admit, run_slots=run, run_counts=pack("i", [9])))
        admit = (driver.admission(0, second, GREEDY, room=12),)
        step = Step(1, 1, pack("i", [0]), admit, run_slots=run, run_counts=pack("i", [8]))
        if new_scheduler:
            runner.clear()
            step = replace(step, retire=b"")
        handles = [runner.launch(step)]
        handles.append(runner.launch(Step(1, 2, run_slots=run, run_counts=pack("i", [12]))))
        handles.append(runner.launch(Step(1, 3, run_slots=run, run_counts=pack("i", [1]))))
        for handle in handles:
            collect(driver, runner.finished(handle))
        return driver.out[0]

    tokens, *_ = run_group(path, 2, 1, drive, start=start)
    assert tokens == alone(path, second, 2)


@pytest.mark.parametrize("late", [0.0, 0.6])
def test_rows_with_grammars_are_sampled_with_rank_0_s_masks(late, path):
    """Also where masks are late: all stages know that such a row has not moved."""
    prompts = [numbers(5 + seed, seed) for seed in range(3)]
    tokens = check_grammar_rows(path, prompts, late, VOCAB, 30, start)
    assert tokens == alone(path, prompts[1], 30)


# --- parts ---


def test_which_runner_a_rank_has():
    def ranks(index: int, count: int) -> Ranks:
        return Ranks(ALONE.layers, ALONE.host, PipelineStage(index, count))

    assert kind_of(ALONE) is GpuRunner
    kinds = [kind_of(ranks(index, 3)) for index in range(3)]
    assert kinds == [FirstStage, EarlierStage, LastStage]


def test_the_first_rank_of_each_stage_chooses_kernels_before_the_others_of_its_stage():
    """One stage after the other: they share what they keep."""
    chosen: list[int] = []

    def run(ranks: Ranks, turn: threading.Lock) -> None:
        gpu_runner.in_turn(ranks, lambda: chosen.append(ranks.rank))

    run_stages(3, 2, run)
    assert chosen[:3] == [0, 2, 4] and sorted(chosen[3:]) == [1, 3, 5]


class Silent:
    """A connection whose other end hangs."""

    def serve(self) -> None:
        self.serves = True

    def check(self) -> None:
        raise CommunicatorFailed("rank 0 has waited 31 s in receiving from rank 1")


def test_a_step_that_waits_for_a_rank_that_hangs_ends_with_a_message(path):
    """Also while its kernels have not ended, and in whichever connection."""
    loaded = loader.load(path, *_configs(), lambda stage, fraction: None)
    masks = gpu_runner.GrammarMasks(SLOTS, _configs()[0], VOCAB, (2,))
    silent = Silent()
    links: Any = StageLinks(Wire(), silent)  # pyright: ignore[reportArgumentType]
    several = Ranks(ALONE.layers, ALONE.host, PipelineStage(1, 3), links).checked()
    assert several is not None and ALONE.checked() is None
    several.serve()
    assert silent.serves
    parts = gpu_on_cpu.parts(loaded, SLOTS, masks)
    runner = GpuRunner(parts, StepCost(1.0, 0.0, 0.0), 5, [], several)
    handle = runner.launch(Step(1, 0))
    handle.event = gpu_on_cpu.Event()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CommunicatorFailed, match="has waited 31 s"):
        handle.done()


def _configs() -> tuple[Any, Any]:
    from pagewire.config import ModelConfig
    from worker.conftest import worker_config

    return ModelConfig(), worker_config()


class Wire:
    """A connection that keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def send(self, x: torch.Tensor) -> None:
        self.sent.append(x)

    def recv(self, x: torch.Tensor) -> None:
        x.copy_(self.sent.pop(0))


@pytest.mark.parametrize("block", ["sequential", "post"])
def test_hidden_states_come_into_buffers_and_leave_as_copies(path, block):
    """Padding behind them is nothing; a block that adds nothing up has no residual."""
    loaded = loader.load(path, *_configs(), lambda stage, fraction: None)
    decoder: Any = loaded.decoder
    decoder.arch = replace_arch(decoder.arch, block=block)
    before, after = Wire(), Wire()
    ranks = Ranks(ALONE.layers, ALONE.host, PipelineStage(1, 3), StageLinks(before, after))
    part = StagePart(loaded, ranks, 700)
    count = 1 if block == "post" else 2
    before.sent = [torch.full((3, 64), float(number)) for number in range(count)]
    part.receive(3, 8)
    assert [tuple(given.shape) for given in part._given] == [(1024, 64)] * count
    for number, given in enumerate(part._given):
        assert (given[:3] == number).all() and not given[3:8].any() and given[8:].all()
    residual = torch.ones(8, 64) if count == 2 else None
    x = torch.ones(8, 64)
    part.hand_on(HiddenStates(x, residual), 5)
    x.zero_()
    assert [tuple(sent.shape) for sent in after.sent] == [(5, 64)] * count
    assert all(sent.all() for sent in after.sent)


def test_what_was_received_is_computed_with_again_and_again(path):
    """As at start, where steps are run for their time: the residual must not grow."""
    ranks = Ranks(ALONE.layers, ALONE.host, PipelineStage(1, 2))
    loaded = loader.load(path, *_configs(), lambda stage, fraction: None, ranks=ranks)
    part = StagePart(loaded, ranks, 8)
    before = [given.clone() for given in part._given]
    masks = gpu_runner.GrammarMasks(SLOTS, _configs()[0], VOCAB, (2,))
    parts = gpu_on_cpu.parts(loaded, SLOTS, masks, part)
    with torch.inference_mode():
        parts.mixed.replay(16, 1)
    assert all(torch.equal(one, other) for one, other in zip(before, part._given, strict=True))


def test_what_cannot_be_sent_to_the_first_stage_ends_the_worker(path):
    class Broken(Wire):
        def send(self, x: torch.Tensor) -> None:
            raise CommunicatorFailed("rank 1 was left alone in sending")

    stage = PipelineStage(1, 2)
    ranks = Ranks(ALONE.layers, ALONE.host, stage, StageLinks(Wire(), results=Broken()))
    sender = ResultSender(ranks)
    sender.check()
    step: Any = SimpleNamespace(event=gpu_on_cpu.Event(), result=lambda: "result")
    step.event.record()
    sender.put(step)
    deadline = time.monotonic() + 30
    with pytest.raises(CommunicatorFailed, match="left alone in sending"):
        while time.monotonic() < deadline:
            sender.check()
            time.sleep(0.001)
