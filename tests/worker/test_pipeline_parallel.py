"""One model in pipeline stages: every family against one process, and what the last stage samples
and the first one answers, over gloo. Ranks are threads here."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from pagewire.config import ModelConfig
from pagewire.worker.cpu import stages
from pagewire.worker.load import weights
from pagewire.worker.models.architecture import Unsupported
from pagewire.worker.models.decoder import HiddenStates
from pagewire.worker.models.ranks import PipelineStage, check_ranks, check_undivided
from pagewire_protocol.messages import Step, StepResult, pack, unpack
from pagewire_protocol.sampling import Sampling
from safetensors.torch import save_file
from stage_grammars import check_grammar_rows
from stage_threads import collect, run_group
from torch import Tensor
from worker.conftest import Driver, Harness, Work, assert_close, ids_and_batch
from worker.model_variants import VARIANTS

LENGTH = 40
CHUNK = 23


class StagedHarness(Harness):
    """The stages of a model one after the other, in one thread."""

    def __init__(
        self, path: Path, count: int, model: ModelConfig | None = None, **settings
    ) -> None:
        self.stages = [
            Harness(path, model, stage=PipelineStage(index, count), **settings)._loaded
            for index in range(count)
        ]
        self.free = list(range(self.stages[0].sizing.num_blocks))

    def step(self, work: Work) -> Tensor:
        ids, batch = ids_and_batch(work)
        first, *_, last = self.stages
        with torch.inference_mode():
            hidden = first.decoder.embed(ids, batch)
            for loaded in self.stages:
                hidden = loaded.decoder.run_layers(
                    hidden, loaded.cos_sin, loaded.caches, batch, lambda: None
                )
                hidden = handed_on(hidden, loaded)
            return last.decoder.logits(hidden, batch, None)


class Wire:
    """A connection that keeps what was sent."""

    def send(self, x: Tensor) -> None:
        self.sent = x.clone()

    def recv(self, x: Tensor) -> None:
        x.copy_(self.sent)


def handed_on(hidden: HiddenStates, loaded) -> HiddenStates:
    """As the next stage gets it."""
    link = stages.HiddenStatesLink(Wire(), loaded)
    link.send(hidden)
    return link.recv(len(hidden.x))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_gives_the_logits_of_one_process(variant, count, tiny, harness, numbers):
    path = tiny(variant).path
    tokens = numbers(LENGTH)
    ours = StagedHarness(path, count).logits(tokens, CHUNK)
    assert_close(ours, harness(path).logits(tokens, CHUNK))


@pytest.mark.parametrize("variant", ["qwen3", "gemma2"])
@pytest.mark.parametrize("quantization", ["int8", "bitsandbytes"])
def test_quantized_weights_are_those_of_one_process(quantization, variant, tiny, harness, numbers):
    """Both have tied heads, which the last stage has beside the first stage's table."""
    path = tiny(variant).path
    model = ModelConfig(quantization=quantization)
    tokens = numbers(LENGTH)
    wanted = harness(path, model).logits(tokens, CHUNK)
    assert_close(StagedHarness(path, 2, model).logits(tokens, CHUNK), wanted, 2e-4)


@pytest.mark.parametrize("variant", ["qwen3", "neox", "opt-350m"])
def test_16_bits_are_the_same_bits(variant, tiny, harness, numbers):
    """The sum over layers goes from stage to stage in float32, as it is kept within one. The second
    stage of three of neox begins after one layer, which has added nothing to it."""
    path = tiny(variant).path
    tokens = numbers(LENGTH)
    ours = StagedHarness(path, 3, dtype="bfloat16").logits(tokens, CHUNK)
    assert torch.equal(ours, harness(path, dtype="bfloat16").logits(tokens, CHUNK))


# --- steps, over gloo ---


SAMPLINGS = (
    Sampling(1, 12, temperature=0.0),
    Sampling(3, 12, top_p=0.9),
    Sampling(4, 12, temperature=0.8, top_k=7, presence_penalty=1.0, logprobs=3),
    Sampling(5, 12, repetition_penalty=1.3, prompt_logprobs=2, min_tokens=4),
    Sampling(
        6, 12, temperature=0.0, bias_ids=pack("i", [7]), bias_values=pack("f", [2.5]), logprobs=1
    ),
)


def generated(driver: Driver, prompts: list[list[int]]) -> tuple:
    tokens = driver.generate(prompts, list(SAMPLINGS), 12, chunk=9)
    return tokens, driver.results


@pytest.mark.parametrize("variant", ["gemma2", "qwen3-moe"])
@pytest.mark.parametrize(("count", "size"), [(2, 1), (3, 1), (2, 2)])
def test_the_first_stage_answers_as_one_process_does(variant, count, size, tiny, numbers):
    """Drawn and greedy tokens, penalties, filters and biases, log-probabilities; and what the last
    stage samples, rank 0 and all ranks of both know."""
    path = tiny(variant).path
    prompts = [numbers(20, seed) for seed in range(len(SAMPLINGS))]
    (tokens, results), *others = run_group(
        path, count, size, lambda driver: generated(driver, prompts)
    )
    wanted, answers = generated(Driver(path), prompts)
    assert tokens == wanted
    for one, other in zip(results, answers, strict=True):
        assert (one.n, one.slots, one.tokens, one.flags, one.counts) == (
            other.n, other.slots, other.tokens, other.flags, other.counts
        )  # fmt: skip
        assert logprobs_of(one) == pytest.approx(logprobs_of(other), abs=2e-4)
    for rank, theirs in enumerate(others, 1):
        silent = size <= rank < size * (count - 1)
        assert [one.tokens for one in theirs] == [b"" if silent else one.tokens for one in results]


def logprobs_of(result: StepResult) -> list[float]:
    own = [] if result.logprobs is None else unpack("f", result.logprobs.values)
    return [*own, *(value for one in result.prompt_logprobs for value in unpack("f", one.values))]


GREEDY = Sampling(0, 12, temperature=0.0)


def alone(path: Path, prompt: list[int], count: int) -> list[int]:
    return Driver(path).generate([prompt], [GREEDY], count)[0]


def test_stages_compute_steps_of_different_rows_at_a_time(tiny, numbers):
    """Two micro-batches, each launched before the other one's result is there."""
    path = tiny("qwen3").path
    prompts = [numbers(9 + seed, seed) for seed in range(4)]

    def drive(driver: Driver) -> list[list[int]]:
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
        return [driver.out[s] for s in range(4)]

    tokens, *_ = run_group(path, 2, 1, drive)
    assert tokens == [alone(path, prompt, 7) for prompt in prompts]


def test_a_step_waits_for_the_tokens_of_its_own_rows(tiny, numbers):
    """As a scheduler sends that knows of no stages, with several steps in flight."""
    path = tiny("llama").path
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

    tokens, *_ = run_group(path, 2, 1, drive)
    assert tokens == alone(path, prompt, 6)


@pytest.mark.parametrize("new_scheduler", [False, True])
def test_a_late_token_is_not_for_the_next_request_of_its_slot(new_scheduler, tiny, numbers):
    path = tiny("llama").path
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

    tokens, *_ = run_group(path, 2, 1, drive)
    assert tokens == alone(path, second, 2)


@pytest.mark.parametrize("late", [0.0, 0.6])
def test_rows_with_grammars_are_sampled_with_rank_0_s_masks(late, tiny, numbers):
    """Also where masks are late: all stages know that such a row has not moved."""
    path = tiny("qwen3").path
    prompts = [numbers(5 + seed, seed) for seed in range(3)]
    tokens = check_grammar_rows(path, prompts, late, 257, 40)
    assert tokens == alone(path, prompts[1], 40)


# --- what a rank has ---


def test_a_stage_holds_its_layers_and_has_as_many_blocks_as_the_others(tiny, harness):
    """Three layers are two and one; a tied table is in both."""
    path = tiny("llama").path
    whole = harness(path, num_kv_blocks=0, cpu_kv_cache_gb=0.001)._loaded
    parts = StagedHarness(path, 2, num_kv_blocks=0, cpu_kv_cache_gb=0.001).stages
    table = 257 * 64 * 4
    assert [len(part.decoder.layers) for part in parts] == [2, 1]
    assert sum(part.decoder.nbytes for part in parts) == whole.decoder.nbytes + table
    assert {part.sizing.num_blocks for part in parts} == {whole.sizing.num_blocks}
    assert sum(part.cache.nbytes for part in parts) == whole.cache.nbytes
    assert sum(part.sizing.weight_bytes for part in parts) == whole.sizing.weight_bytes + table


@pytest.mark.parametrize("variant", ["gpt2", "opt-350m", "mixtral", "glm4", "falcon-11b"])
def test_layers_of_other_stages_are_not_read(variant, tiny):
    path = tiny(variant).path
    everything = {name for name, _ in weights.from_safetensors(path)}
    first, second = (part.decoder for part in StagedHarness(path, 2).stages)
    read = [
        {name for name, _ in weights.from_safetensors(path, skip=stage.is_elsewhere)}
        for stage in (first, second)
    ]
    assert read[0] | read[1] == everything
    assert not any(".1." in name and "experts" not in name for name in read[0] & read[1])
    assert len(read[0] & read[1]) < 9, "tables and what is not of a layer"


def test_a_tensor_that_no_stage_knows_is_refused(tiny, tmp_path):
    path = tiny("llama").path
    tensors = dict(weights.from_safetensors(path)) | {"model.layers.7.x.weight": torch.zeros(2)}
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(Unsupported, match=r"a tensor model\.layers\.7\.x\.weight"):
        StagedHarness(tmp_path, 2)


@pytest.mark.parametrize(("layers", "count"), [(3, 2), (3, 3), (32, 2), (7, 3), (8, 3), (61, 16)])
def test_layers_are_divided_without_gaps(layers, count):
    """The last stage, which has the head too, never has more than another one."""
    parts = [PipelineStage(index, count).layers(layers) for index in range(count)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - len(parts[-1]) <= 1
    assert min(map(len, parts)) == len(parts[-1])


def test_fewer_layers_than_stages_are_refused_with_the_numbers_that_do(tiny, harness):
    arch = harness(tiny("llama").path)._loaded.decoder.arch
    check_ranks(arch, 2, 3)
    refusal = (
        "--pipeline-parallel-size 4: 3 layers cannot be divided among 4 stages; this llama model "
        "can have 1 to 3$"
    )
    with pytest.raises(Unsupported, match=refusal):
        check_ranks(arch, 1, 4)
    with pytest.raises(Unsupported, match="pipeline-parallel-size 2 is not supported for models"):
        check_undivided("other", 1, 2)
