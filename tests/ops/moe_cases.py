"""Random mixtures of experts for tests of their kernels, with NaN where a kernel must not look."""

from dataclasses import dataclass

import torch
from pagewire_kernels.routing import NO_EXPERT
from torch import Tensor


@dataclass(frozen=True)
class MoeCase:
    """x [T, H]; gate_up [E, 2I, H]; down [E, H, I]; top_k_ids int32 [T, k]; top_k_weights float32
    [T, k]."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    top_k_ids: Tensor
    top_k_weights: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `experts` takes them."""
        return self.x, self.gate_up, self.down, self.top_k_ids, self.top_k_weights

    def exact(self) -> Tensor:
        """float64 [T, H], expert by expert, with all matrices and products in float64."""
        out = torch.zeros(self.x.shape, dtype=torch.float64, device=self.x.device)
        for expert in self.top_k_ids.unique().tolist():
            if expert == NO_EXPERT:
                continue
            tokens, places = (self.top_k_ids == expert).nonzero(as_tuple=True)
            gate_up, down = self.gate_up[expert].double(), self.down[expert].double()
            gate, up = (self.x[tokens].double() @ gate_up.T).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
            shares = self.top_k_weights[tokens, places].double()[:, None]
            out.index_add_(0, tokens, inner @ down.T * shares)
        return out


def choices(tokens: int, k: int, experts: int, device: str = "cpu") -> Tensor:
    """Distinct experts of each token [T, k] int32, uneven: low ids are chosen more often. The last
    expert is chosen by nobody where there are more than k."""
    scores = torch.rand(tokens, experts, device=device) ** torch.linspace(
        1, 3, experts, device=device
    )
    if experts > k:
        scores[:, -1] = -1.0
    return scores.topk(k, dim=-1).indices.int()


def moe_case(
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    device: str = "cpu",
) -> MoeCase:
    """The last `padding` tokens choose no expert and are NaN themselves, with NaN for weights; so are
    the matrices of the experts that nobody chose."""

    def matrices(n: int, k: int) -> Tensor:
        values = torch.randn(experts, n, k, device=device, dtype=torch.float32) * k**-0.5
        return values.to(dtype)

    x = torch.randn(tokens, hidden, device=device).to(dtype)
    ids = choices(tokens, k, experts, device)
    weights = torch.rand(tokens, k, device=device)
    gate_up, down = matrices(2 * inner, hidden), matrices(hidden, inner)
    if padding:
        x[-padding:] = float("nan")
        ids[-padding:] = NO_EXPERT
        weights[-padding:] = float("nan")
    chosen = set(ids.unique().tolist())
    for expert in set(range(experts)) - chosen:
        gate_up[expert] = float("nan")
        down[expert] = float("nan")
    return MoeCase(x, gate_up, down, ids, weights)
