"""The kernels of one row through a mixture of experts compiled for Hopper without a GPU, as they
would be launched there; a line of JSON for each.

    python tests/ops/compile_moe_row.py '[[128, 8, 2048, 768, "bfloat16", "softmax"]]'

A case is [experts, experts a token, hidden size, inner size, dtype, routing], where "groups" is
DeepSeek-V3's.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ops.compile_hopper_quantized import Compiled, Driver, assembled
from pagewire_kernels import moe_row_router, moe_rows
from pagewire_kernels.routing import Routing
from triton.runtime import driver

KERNELS = {"_row_router": moe_row_router, "_pair_up": moe_rows, "_token_down": moe_rows}


def launch(experts: int, top_k: int, hidden: int, inner: int, name: str, kind: str) -> None:
    """What a layer launches behind attention. Weights have no memory behind most of them."""
    dtype = getattr(torch, name)
    groups = kind == "groups"
    routing = Routing(experts, top_k, renormalize=True)
    bias = None
    if groups:
        routing = Routing(experts, top_k, True, "sigmoid", 2.5, num_expert_group=8, topk_group=4)
        bias = torch.zeros(experts)
    x = torch.zeros(1, hidden, dtype=dtype)
    slot = torch.zeros(1, dtype=torch.int64)
    router = torch.zeros(experts, hidden, dtype=dtype)
    gate_up = torch.zeros(1, 2 * inner, hidden, dtype=dtype).expand(experts, -1, -1)
    down = torch.zeros(1, hidden, inner, dtype=dtype).expand(experts, -1, -1)
    routed = moe_row_router.norm_route(x, router[0].clone(), 1e-6, router, routing, bias, slot)
    moe_rows.experts_of_rows(
        routed.normed, gate_up, down, routed.top_k_ids, routed.top_k_weights, residual=x
    )


def main() -> None:
    driver.set_active(Driver())  # type: ignore[arg-type]
    for module in set(KERNELS.values()):
        module.overlap = lambda device: {"PDL": True, "launch_pdl": True}  # type: ignore[assignment]
    compiled: dict[str, Any] = {}
    for name, module in KERNELS.items():
        compiled[name] = Compiled(getattr(module, name))
        setattr(module, name, compiled[name])
    for case in json.loads(sys.argv[1]):
        launch(*case)
        for name, kernel in compiled.items():
            ptx = kernel.last.asm["ptx"]
            messages = assembled(ptx)
            found = {
                "kernel": name,
                "case": case,
                "warps": kernel.last.metadata.num_warps,
                "shared": kernel.last.metadata.shared,
                "registers": int(re.findall(r"Used (\d+) registers", messages)[0]),
                "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", messages))),
                "waits": ptx.count("griddepcontrol.wait"),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
