"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2 with many small experts and a shared one, in all layers that
the configuration does not name."""

from pagewire_kernels.routing import Routing

from .architecture import Architecture, Config, Moe, common, layer_windows


def mixture(config: Config, shared_size: int = 0) -> Moe:
    """The mixture of experts of Qwen2 and Qwen3; shared_size: inner size of the shared expert, 0:
    none."""
    step = int(config.get("decoder_sparse_step", 1))
    plain = config.get("mlp_only_layers") or []
    routing = Routing(
        int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
        int(config["num_experts_per_tok"]),
        renormalize=bool(config.get("norm_topk_prob", False)),
    )
    return Moe(
        routing,
        int(config["moe_intermediate_size"]),
        shared_size=shared_size,
        dense_layers=frozenset(
            i for i in range(int(config["num_hidden_layers"])) if i in plain or (i + 1) % step
        ),
    )


def describe(config: Config) -> Architecture:
    """Qwen1.5-MoE or Qwen2-MoE."""
    moe = mixture(config, int(config["shared_expert_intermediate_size"]))
    bias = bool(config.get("qkv_bias", True))
    return common(config, moe=moe, qkv_bias=bias, windows=layer_windows(config))
