"""Models that only transformers knows, through the paged cache, against transformers' own
attention; and how all others are refused."""

import json
from pathlib import Path

import pytest
import torch
from pagewire.config import ModelConfig
from pagewire.worker.models import FAMILIES, fallback
from pagewire.worker.models.architecture import Unsupported
from pagewire_kernels.batch import make_batch
from pagewire_protocol.sampling import Sampling
from worker.model_variants import SIZES

LENGTH = 50
BLOCK = 8
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
OTHERS = {
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "cohere2": (
        "Cohere2",
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
            "embedding_multiplier": 1.5,
        },
    ),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2", {"sliding_window": 11}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "olmoe": ("Olmoe", MOE | {"num_key_value_heads": 4}),
    "deepseek_v3": ("DeepseekV3", MLA),
    "gpt_bigcode": (
        "GPTBigCode",
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 96,
            "n_positions": 512,
            "multi_query": True,
        },
    ),
}


def build(name: str):
    import transformers

    family, extra = OTHERS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra})
    model = (
        getattr(transformers, f"{family}ForCausalLM")
        ._from_config(config, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """other(name) -> (directory, transformers' model), made once."""
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def get(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            model = build(name)
            model.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return get


def logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ours.shape == wanted.shape
    worst = (ours - wanted).abs().max().item()
    assert worst < 3e-5 * max(1.0, wanted.abs().max().item()), f"logits differ by {worst:.2e}"


def test_none_of_these_has_an_implementation_of_its_own():
    assert not FAMILIES.keys() & OTHERS.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_chunks_and_mixed_batch(name, other, harness, numbers):
    path, model = other(name)
    ours, tokens = harness(path), numbers(LENGTH)
    wanted = logits(model, tokens)
    for chunk in (LENGTH, 16, 1):
        close(ours.logits(tokens, chunk), wanted)
    spans = [(40, 41), (0, 20), (16, 30)]
    work, mixed = ours.mixed_step(spans, numbers)
    close(mixed, torch.cat([logits(model, tokens)[first:end] for tokens, first, end, _ in work]))


@pytest.mark.parametrize("name", ["olmo2", "gpt_bigcode"])
def test_greedy_through_the_runner(name, other, driver, numbers):
    path, model = other(name)
    prompts, wanted = [numbers(n, n) for n in (5, 30)], []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(logits(model, tokens)[-1].argmax()))
        wanted.append(tokens[len(prompt) :])
    samplings = [Sampling(seed=1, max_tokens=6, temperature=0.0)] * 2
    assert driver(path).generate(prompts, samplings, 6, chunk=8) == wanted


def test_logits_of_further_tokens(other, harness, numbers):
    """Of those wanted, in their order; and of any, for who asks for them before the end."""
    path, model = other("olmo2")
    ours, tokens, tapped = harness(path), numbers(20), []
    loaded, batch = ours._loaded, make_batch([20], [20], [ours.table(20)], BLOCK)
    rows, ticks = torch.tensor([19, 3]), []
    with torch.inference_mode():
        found = loaded.decoder(
            torch.tensor(tokens),
            loaded.cos_sin,
            loaded.caches,
            batch,
            rows,
            lambda: ticks.append(1),
            lambda of: tapped.append(of(torch.tensor([7, 8]))),
        )
        plain = loaded.decoder(
            torch.tensor(tokens), loaded.cos_sin, loaded.caches, batch, rows, lambda: None
        )
    wanted = logits(model, tokens)
    close(found, wanted[[19, 3]])
    close(plain, wanted[[19, 3]])
    close(tapped[0], wanted[[7, 8]])
    assert len(ticks) == 3, "one for each layer"


def test_bfloat16_and_random_weights(other, harness, numbers):
    path, model = other("olmo2")
    tokens = numbers(30)
    similarity = torch.nn.functional.cosine_similarity(
        harness(path, dtype="bfloat16").logits(tokens, 7).float(), logits(model, tokens), dim=-1
    )
    assert similarity.min() > 0.99
    first, again, third = (
        harness(path, ModelConfig(load_format="dummy", seed=seed)).logits(tokens, 30)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.allclose(first, third)


def directory(path: Path, **config) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"model_type": "nonsense"},
            "model_type 'nonsense' is known neither here nor to transformers",
        ),
        ({}, "model_type None is known neither"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "c.C"}},
            "model_type 'own' needs code from its repository, which --trust-remote",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "T5ForConditionalGeneration is an encoder with a decoder",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "BertForMaskedLM is no causal language model",
        ),
        (
            {"model_type": "vit", "architectures": ["ViTModel"]},
            "ViTModel is no causal language model",
        ),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM (has layers of|is not supported: 0 of)",
        ),
        (
            {"model_type": "jamba"},
            "(JambaForCausalLM is not supported: 4 of its 32)|(jamba has layers of type)",
        ),
        (
            {"model_type": "bloom", "architectures": ["BloomForCausalLM"]},
            "BloomForCausalLM is not supported: 0 of its",
        ),
        (
            {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]},
            "GPTNeoForCausalLM is not supported: its attention is its own",
        ),
        (
            {"model_type": "gpt_oss"},
            "GptOssForCausalLM is not supported: its attention wants s_aux",
        ),
        ({"model_type": "llama4"}, "made of several models"),
        (
            {"model_type": "olmo2", "quantization_config": {"quant_method": "awq"}},
            "quantized weights of olmo2",
        ),
        (
            {"model_type": "olmo2", "num_attention_heads": "many"},
            "configuration of this olmo2 model is wrong|does not run",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(config, told, harness, tmp_path):
    with pytest.raises(Unsupported, match=told) as caught:
        harness(directory(tmp_path, **config), ModelConfig(load_format="dummy"))
    assert "\n" not in str(caught.value)


def test_contexts_end_before_rotation_depends_on_their_length(other, tmp_path):
    config = json.loads((other("olmo2")[0] / "config.json").read_text())
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 4.0,
    }
    directory(
        tmp_path, **config | {"rope_parameters": rope | {"original_max_position_embeddings": 128}}
    )
    assert fallback.plan(tmp_path, config, False).arch.max_position == 128
    directory(tmp_path, **config)
    assert fallback.plan(tmp_path, config, False).arch.max_position == 512


def test_code_from_the_repository_runs_only_when_allowed(tmp_path, harness, numbers):
    """A model whose class is in its directory; what it does is Olmo2."""
    import transformers

    (tmp_path / "modeling_own.py").write_text(
        "from transformers import Olmo2Config, Olmo2ForCausalLM\n"
        "class OwnConfig(Olmo2Config):\n    model_type = 'own'\n"
        "class OwnForCausalLM(Olmo2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = transformers.Olmo2Config(**SIZES).to_dict()
    auto = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    directory(
        tmp_path,
        **config | {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto},
    )
    with pytest.raises(Unsupported, match="--trust-remote-code allows"):
        harness(tmp_path, ModelConfig(load_format="dummy"))
    ours = harness(tmp_path, ModelConfig(load_format="dummy", trust_remote_code=True))
    assert ours.logits(numbers(20), 7).isfinite().all()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("no weights", "has no .safetensors file"),
        ("truncated", r"model\.safetensors \([\d,]+ bytes\) is broken or its download incomplete"),
        ("missing tensor", r"lacks 1 tensors, among them model\.norm\.weight"),
        ("other shape", "cannot be loaded|differs"),
        (
            "missing shard",
            "lacks 1 of the 2 files of its weights, among them model-00002-of-00002.safetensors",
        ),
    ],
)
def test_damaged_weights_are_one_line(damage, told, other, harness, tmp_path):
    from safetensors.torch import load_file, save_file

    source = other("olmo2")[0]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    state, file = load_file(source / "model.safetensors"), tmp_path / "model.safetensors"
    match damage:
        case "truncated":
            file.write_bytes((source / "model.safetensors").read_bytes()[:-100])
        case "missing tensor":
            save_file(
                {name: tensor for name, tensor in state.items() if name != "model.norm.weight"},
                file,
                {"format": "pt"},
            )
        case "other shape":
            save_file(state | {"model.norm.weight": torch.ones(3)}, file, {"format": "pt"})
        case "missing shard":
            save_file(state, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
            names = {
                name: f"model-0000{n % 2 + 1}-of-00002.safetensors" for n, name in enumerate(state)
            }
            (tmp_path / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": names})
            )
    with pytest.raises(Unsupported, match=told) as caught:
        harness(tmp_path)
    assert "\n" not in str(caught.value)


def test_attention_that_only_looks_common_is_found_out(other, harness, monkeypatch):
    """A layer that ignores positions gives other logits in chunks than at once: the comparison at
    loading refuses it."""
    from transformers.models.olmo2 import modeling_olmo2

    plain = modeling_olmo2.Olmo2RotaryEmbedding.forward

    def from_zero(self, x, position_ids):
        return plain(self, x, position_ids - position_ids.min())

    path = other("olmo2")[0]
    monkeypatch.setattr(modeling_olmo2.Olmo2RotaryEmbedding, "forward", from_zero)
    with pytest.raises(
        Unsupported,
        match=r"Olmo2ForCausalLM is not supported: through the paged cache its logits are off by",
    ):
        harness(path)
