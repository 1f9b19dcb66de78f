"""What `--quantization` makes of a model's weights, in full: for checks on a machine with a GPU."""

from typing import Any

import torch
from pagewire.worker.models.rounding import Rounding


def round_matrices(model: Any, rounding: Rounding, device: str) -> None:
    """What `--quantization` does to the weights of a model, in float32. A GPU keeps a table of
    embeddings in full, and with it a head that is the same; a CPU does not."""
    tied = device == "cuda" and model.config.tie_word_embeddings
    if device == "cpu" and rounding.head and not model.config.tie_word_embeddings:
        table = model.get_input_embeddings().weight
        table.data = rounding.full(table.data).float()
    for name, module in model.named_modules():
        if name == "lm_head" and (tied or not rounding.head):
            continue
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounding.full(module.weight.data).float()
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.ndim == 3:  # [experts, outputs, inputs]
            for expert in parameter.data:
                expert.copy_(rounding.full(expert))
