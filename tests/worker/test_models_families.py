"""What the families differ in besides their logits: contexts that change rotation, spellings of
checkpoints, tokens through a Runner."""

import json

import pytest
import torch
from pagewire.config import ModelConfig
from pagewire.worker.load import kv_sizing
from pagewire.worker.models import describe
from pagewire.worker.models.architecture import Unsupported
from pagewire.worker.models.rope import Rope, read_rope
from pagewire.worker.models.rotary import order
from pagewire_protocol.messages import pack
from pagewire_protocol.sampling import Sampling
from safetensors.torch import load_file, save_file
from worker.model_variants import VARIANTS

GREEDY = Sampling(temperature=0.0, seed=1, max_tokens=12)


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (ours - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())


def follows(reference, prompt: list[int], out: list[int]) -> None:
    """Each token is the likeliest one after those before it."""
    wanted = reference.logits(prompt + out)[len(prompt) - 1 : -1].argmax(-1)
    assert out == wanted.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_with_chunks_and_a_cached_prefix(variant, tiny, driver, numbers):
    """The first request comes in chunks and goes on decoding while the second, which begins alike,
    finds its first blocks computed."""
    reference, run = tiny(variant), driver(tiny(variant).path)
    first, common = numbers(43, 1), 4 * run.block_size
    second = first[:common] + numbers(9, 2)
    run.step(
        admit=(run.admission(0, first, GREEDY, room=16),),
        run_slots=pack("i", [0]),
        run_counts=pack("i", [20]),
    )
    run.step(run_slots=pack("i", [0]), run_counts=pack("i", [23]))
    admitted = run.admission(1, second, GREEDY, room=16, cached=run.held[0][:4])
    run.step(admit=(admitted,), run_slots=pack("i", [0, 1]), run_counts=pack("i", [1, 9]))
    for _ in range(10):
        run.step(repeat=True) if len(run.out[1]) > 1 else run.step(
            run_slots=pack("i", [0, 1]), run_counts=pack("i", [1, 1])
        )
    follows(reference, first, run.out[0])
    follows(reference, second, run.out[1])
    assert len(run.out[0]) == 12 and len(run.out[1]) == 11


@pytest.mark.parametrize("length", [50, 64])
def test_longrope_of_a_short_context(length, tiny, harness, numbers):
    """Up to the original context the short factors hold."""
    reference, tokens = tiny("longrope"), numbers(length)
    close(
        harness(reference.path, ModelConfig(max_model_len=64)).logits(tokens, 20),
        reference.logits(tokens),
    )


def test_longrope_of_a_long_context(tiny, harness, numbers):
    reference, tokens = tiny("longrope"), numbers(90)
    close(harness(reference.path).logits(tokens, 20), reference.logits(tokens))


def test_dynamic_rope(tiny, harness, numbers):
    """Unchanged within the context of the configuration; beyond it, which must be asked for, by the
    longest context served."""
    reference, tokens = tiny("dynamic-rope"), numbers(150)
    ours = harness(reference.path)
    assert ours.max_model_len == 64
    close(ours.logits(tokens[:64], 20), reference.logits(tokens[:64]))
    close(
        harness(reference.path, ModelConfig(max_model_len=150)).logits(tokens, 40),
        reference.logits(tokens),
    )
    with pytest.raises(kv_sizing.DoesNotFit, match="more than the 256 positions"):
        harness(reference.path, ModelConfig(max_model_len=257))


def test_order_of_dimensions():
    """Pairs that turn together are half a head apart; what does not turn fills the rest."""
    assert order(Rope(1e4, 8), 8) is None
    assert order(Rope(1e4, 0), 8) is None
    assert order(Rope(1e4, 4), 8) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order(Rope(1e4, 4, interleaved=True), 8) == [0, 2, 4, 5, 1, 3, 6, 7]


def rewritten(
    source, target, rename=lambda name: name, extra: dict[str, torch.Tensor] | None = None, **config
):
    """A checkpoint with other names of tensors, more tensors, another configuration (None removes a
    field)."""
    state = {
        rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(state | (extra or {}), target / "model.safetensors")
    settings = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None})
    )
    return target


def test_gpt2_as_first_published(tiny, harness, numbers, tmp_path):
    """Without the prefix, with masks among the weights and the tied head written out."""
    reference, tokens = tiny("gpt2"), numbers(30)
    mask = torch.ones(1, 1, 512, 512).tril()
    extra = {
        "h.0.attn.bias": mask,
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": reference.model.lm_head.weight.clone(),
    }
    path = rewritten(
        reference.path,
        tmp_path,
        lambda name: name.removeprefix("transformer."),
        extra,
        n_inner=None,
    )
    close(harness(path).logits(tokens, 30), reference.logits(tokens))


def test_neox_as_first_published(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("neox"), numbers(30)
    extra = {
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4),
    }
    older = {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000}
    close(
        harness(rewritten(reference.path, tmp_path, extra=extra, **older)).logits(tokens, 30),
        reference.logits(tokens),
    )


def test_falcon_as_first_published(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("falcon-7b"), numbers(30)
    older = dict.fromkeys(
        (
            "rope_parameters",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "num_kv_heads",
        )
    )
    path = rewritten(
        reference.path, tmp_path, model_type="RefinedWebModel", n_layer=3, n_head=4, **older
    )
    close(harness(path).logits(tokens, 30), reference.logits(tokens))


def test_opt_without_its_prefix(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("opt-350m"), numbers(30)
    path = rewritten(reference.path, tmp_path, lambda name: name.removeprefix("model."))
    close(harness(path).logits(tokens, 30), reference.logits(tokens))


def test_phi3_with_scaling_as_first_published(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("longrope"), numbers(80)
    rope = json.loads((reference.path / "config.json").read_text())["rope_parameters"]
    older = {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    path = rewritten(
        reference.path, tmp_path, rope_parameters=None, rope_theta=1e4, rope_scaling=older
    )
    close(harness(path).logits(tokens, 80), reference.logits(tokens))


LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(("variant", "scaling"), [("llama", LINEAR), ("qwen3", YARN)])
def test_scaling_added_by_hand_beside_rope_parameters(
    variant, scaling, tiny, harness, numbers, tmp_path
):
    """As transformers reads it: it goes before the scaling that the file has."""
    import transformers

    reference, tokens = tiny(variant), numbers(60)
    path = rewritten(reference.path, tmp_path, rope_scaling=scaling)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
    assert (wanted - reference.logits(tokens)).abs().max() > 1e-2
    close(harness(path).logits(tokens, 60), wanted)


def test_the_base_of_rope_parameters_stays_beside_another_scaling():
    config = {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    rope = read_rope(config | {"rope_scaling": YARN}, 16)
    assert (rope.theta, rope.kind, rope.factor) == (1e6, "yarn", 2.0)


@pytest.mark.parametrize("none", [0, -1])
@pytest.mark.parametrize(
    "variant", ["mistral", "mixtral", "phi3", "qwen2-windows", "gemma2", "gemma3"]
)
def test_a_window_of_no_tokens_is_none(variant, none, tiny):
    config = json.loads((tiny(variant).path / "config.json").read_text())
    assert set(describe(config).windows) != {None}
    assert set(describe(config | {"sliding_window": none}).windows) == {None}


def test_a_window_of_no_tokens_gives_the_logits_of_all(tiny, harness, numbers, tmp_path):
    tokens = numbers(60)
    path = rewritten(tiny("mistral-full").path, tmp_path, sliding_window=0)
    close(harness(path).logits(tokens, 60), tiny("mistral-full").logits(tokens))


def test_windows_of_mistral_by_layer(tiny, harness, numbers, tmp_path):
    """As Ministral, the name that transformers has for it."""
    import transformers

    tokens = numbers(60)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    path = rewritten(tiny("mistral").path, tmp_path, layer_types=kinds, model_type="ministral")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
    path = rewritten(tiny("mistral").path, tmp_path, layer_types=kinds)
    close(harness(path).logits(tokens, 60), wanted)
    assert (wanted - tiny("mistral").logits(tokens)).abs().max() > 1e-2


def test_a_window_that_mistral_does_not_state(tiny):
    config = json.loads((tiny("mistral").path / "config.json").read_text())
    del config["sliding_window"]
    assert describe(config).windows == (4096,) * 3


DEFAULTS = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "mixtral": ("rope_parameters", "rope_theta"),
    "neox": ("hidden_act",),
    "phi": ("hidden_act",),
    "glm": ("attention_bias",),
}


@pytest.mark.parametrize("variant", DEFAULTS)
def test_what_a_configuration_leaves_out_is_the_family_s_own(
    variant, tiny, harness, numbers, tmp_path
):
    """As transformers has it."""
    import transformers

    tokens = numbers(40)
    path = rewritten(tiny(variant).path, tmp_path, **dict.fromkeys(DEFAULTS[variant]))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        wanted = model.eval()(torch.tensor([tokens])).logits[0]
    close(harness(path).logits(tokens, 40), wanted)


def test_buffers_of_rotations_are_passed_over(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("llama"), numbers(30)
    layer = "model.layers.0.self_attn.rotary_emb"
    extra = {
        f"{layer}.{name}": torch.ones(1, 1, 4, 16)
        for name in ("inv_freq", "cos_cached", "sin_cached")
    }
    path = rewritten(reference.path, tmp_path, extra=extra)
    close(harness(path).logits(tokens, 30), reference.logits(tokens))


GEMMA3_OLD = {
    "rope_parameters": None,
    "layer_types": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 3,
}


def test_gemma3_as_first_published(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("gemma3"), numbers(60)
    path = rewritten(reference.path, tmp_path, _sliding_window_pattern=None, **GEMMA3_OLD)
    close(harness(path).logits(tokens, 60), reference.logits(tokens))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_gemma3_with_images(prefix, tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("gemma3"), numbers(60)
    path = rewritten(
        reference.path,
        tmp_path,
        lambda name: prefix + name.removeprefix("model."),
        {
            "vision_tower.vision_model.post_layernorm.weight": torch.ones(4),
            "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(4),
        },
    )
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "dtype": "float32", "text_config": text})
    )
    close(harness(path).logits(tokens, 60), reference.logits(tokens))


def test_configurations_of_the_hub():
    """Those that leave out what today's transformers would write."""
    gpt2 = {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    }
    arch = describe(gpt2 | {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"})
    assert (
        arch.tie_word_embeddings,
        arch.activation,
        arch.intermediate_size,
        arch.parameters // 1_000_000,
    ) == (
        True,
        "gelu_tanh",
        3072,
        124,
    )
    sizes = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    four = describe(
        {
            "model_type": "gemma3",
            "text_config": sizes | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        }
    )
    assert (four.num_heads, four.num_kv_heads, four.head_dim, four.vocab_size) == (
        8,
        4,
        256,
        262_208,
    )
    assert four.windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)
    assert (four.rope.theta, four.rope.kind, four.rope.factor) == (1e6, "linear", 8.0)
    assert four.local_rope is not None and (four.local_rope.theta, four.local_rope.kind) == (
        1e4,
        "default",
    )


MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_weights_are_counted():
    """What the memory is planned with: Mixtral 8x7B has 46.7 thousand million parameters."""
    assert describe({"model_type": "mixtral", **MIXTRAL}).parameters == pytest.approx(
        46.7e9, rel=1e-3
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_weights_are_those_of_the_checkpoint(variant, tiny):
    path = tiny(variant).path
    arch = describe(json.loads((path / "config.json").read_text()))
    matrices = sum(
        tensor.numel()
        for tensor in load_file(path / "model.safetensors").values()
        if tensor.ndim > 1
    )
    assert arch.parameters == pytest.approx(matrices, rel=2e-3)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True of opt"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm of phi"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention of gpt2"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention of gemma3"),
        (
            "mixtral",
            {"hidden_act": "gelu_new"},
            "activation 'gelu_new' of mixtral is not supported in a mixture",
        ),
        (
            "gemma",
            {"hidden_activation": "gelu"},
            "activation 'gelu' of gemma is not supported behind a gate",
        ),
        (
            "neox",
            {"hidden_act": "mish"},
            "activation 'mish' of gpt_neox is not supported; there are",
        ),
        (
            "phi",
            {"partial_rotary_factor": 0.33, "rope_parameters": None},
            "rotating 5 of 16 dimensions of a head of phi",
        ),
        ("gpt2", {"n_embd": None}, "gpt2 model has no 'n_embd'"),
        ("neox", {"num_attention_heads": 8, "hidden_size": 72}, "has shape"),
    ],
)
def test_refused_by_name(variant, changes, message, tiny, harness, tmp_path):
    with pytest.raises(Unsupported, match=message):
        harness(rewritten(tiny(variant).path, tmp_path, **changes))


def test_longrope_without_its_factors_is_refused(tiny, harness, tmp_path):
    rope = json.loads((tiny("longrope").path / "config.json").read_text())["rope_parameters"]
    with pytest.raises(
        Unsupported, match=r"longrope of phi3 has \[8, 0\] short and long factors, not 8 of each"
    ):
        harness(
            rewritten(tiny("longrope").path, tmp_path, rope_parameters=rope | {"long_factor": []})
        )


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(
        Unsupported,
        match=r"model_type 't5' is not supported; supported are .*falcon, .*gpt2, .*llama, .*qwen3_moe",
    ):
        describe({"model_type": "t5"})


def test_unknown_tensors_are_named_as_the_checkpoint_does(tiny, harness, tmp_path):
    with pytest.raises(Unsupported, match=r"a tensor transformer\.h\.0\.attn\.rel_bias \[4\]"):
        harness(
            rewritten(
                tiny("gpt2").path, tmp_path, extra={"transformer.h.0.attn.rel_bias": torch.ones(4)}
            )
        )


def test_bfloat16_of_scaled_norms_is_near(tiny, harness, numbers):
    """Gemma's norms are kept in float32; a wrong product of types would show."""
    reference, tokens = tiny("gemma3"), numbers(40)
    ours, wanted = (
        harness(reference.path, dtype="bfloat16").logits(tokens, 25).float(),
        reference.logits(tokens),
    )
    assert torch.nn.functional.cosine_similarity(ours, wanted, dim=-1).min() > 0.98


@pytest.mark.parametrize("variant", ["falcon-rw", "neox", "opt-350m", "mixtral"])
def test_bfloat16_of_others_is_near(variant, tiny, harness, numbers):
    reference, tokens = tiny(variant), numbers(40)
    ours, wanted = (
        harness(reference.path, dtype="bfloat16").logits(tokens, 25).float(),
        reference.logits(tokens),
    )
    assert torch.nn.functional.cosine_similarity(ours, wanted, dim=-1).mean() > 0.98
