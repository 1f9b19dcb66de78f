"""Filling a model's weights: from safetensors (one file or sharded, memory-mapped), GGUF, PyTorch's
files, or with random numbers.

A family's own names and shapes become the decoder's first (models/checkpoint); then each tensor
goes to the slot that wants it, which takes its part and puts the rows of heads in order. Strict: a
tensor that the model does not know, lacks or has in another shape is an error that names it.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

import torch
from pagewire_kernels.quantized import Quantized, StoredMatrix
from torch import Tensor

from ...checkpoint.weight_files import PYTORCH, SAFETENSORS
from ..models import family, gpt2
from ..models.architecture import Architecture, Config, Unsupported
from ..models.checkpoint import Named, split
from ..models.decoder import Decoder
from ..models.weight_slots import WeightSlot
from . import kv_dtype
from .formats.base import Assembler, CheckpointFormat
from .gguf_file import Gguf, Place
from .pytorch_file import PytorchFiles
from .sources import safetensors_files

Source = Path | Gguf | PytorchFiles
"""A directory of safetensors, or another kind of file, open."""
Value = tuple[str, Tensor | Quantized | StoredMatrix]
"""A tensor by its name."""
Progress = Callable[[str, float], None]
Skip = Callable[[str], bool]
"""Whether a tensor of the checkpoint is not to be read, by its name."""
DUMMY_STD: Final = 0.02
GROUP: Final = 16
"""Tensors dequantized at a time: bounds what waits in float32."""
IGNORED: Final = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
"""Buffers that old checkpoints carry along and that follow from the configuration."""


def load(
    model: Decoder,
    source: Source | None,
    config: Config,
    seed: int,
    progress: Progress,
    keep_quantized: bool = False,
    form: CheckpointFormat | None = None,
) -> None:
    """Fill and pack `model` from `source`, or (None) at random. keep_quantized: hand matrices that
    come quantized to the model as they are. form: of quantized matrices that are several tensors.
    Raises Unsupported."""
    slots = list(model.weight_slots())
    if source is None:
        fill_randomly(slots, seed, progress)
    else:
        tensors = _read(source, config, model, keep_quantized, form, slots[0].target.device)
        tensors = (value for value in tensors if not model.is_elsewhere(value[0]))
        fill(slots, tensors, model.arch.tie_word_embeddings, progress)
    for done in model.pack():
        progress("packing weights", done)


def _read(
    source: Source,
    config: Config,
    model: Decoder,
    quantized: bool,
    form: CheckpointFormat | None,
    device: torch.device | str,
) -> Iterator[Value]:
    """Under the decoder's names. Layers of other pipeline stages are not read."""
    skip = model.is_elsewhere
    if isinstance(source, Gguf):
        return cut_joined(from_gguf(source, config, quantized, skip, device), model.arch)
    tensors: Iterator[Value] = (
        (value for value in source.tensors() if not skip(value[0]))
        if isinstance(source, PytorchFiles)
        else from_safetensors(source, skip=skip)
    )
    if form is not None:
        tensors = Assembler(form, shapes_of(source)).assembled(tensors, device)
    tensors = ((name, value) for name, value in tensors if not kv_dtype.is_scale(name))
    return converted(tensors, config, model.arch)


def shapes_of(source: Path | PytorchFiles) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by name, from the files' headers. Raises Unsupported."""
    if isinstance(source, PytorchFiles):
        return {name: tuple(tensor.shape) for name, tensor in source.tensors()}
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    weights = safetensors_files(source)
    check_safetensors(source)
    for path in weights.paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if weights.has(name, path):
                    shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def tensors_named(
    source: Source | None, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint whose names are wanted; none of a GGUF file, which has other
    names. Reads nothing else but headers. Raises Unsupported."""
    if isinstance(source, PytorchFiles):
        yield from (pair for pair in source.tensors() if wanted(pair[0]))
    if not isinstance(source, Path):
        return
    from safetensors import safe_open

    names = {name for name in shapes_of(source) if wanted(name)}
    if not names:
        return
    weights = safetensors_files(source)
    for path in weights.paths:
        with safe_open(path, framework="pt") as file:
            for name in names.intersection(file.keys()):
                if weights.has(name, path):
                    yield name, file.get_tensor(name)


def converted(tensors: Iterable[Value], config: Config, arch: Architecture) -> Iterator[Value]:
    """From the family's names and shapes to the decoder's. Families that join or rename matrices
    take quantized ones as they are (models/checkpoint.py)."""
    convert = family(config).tensors
    for name, tensor in tensors:
        if convert is None:
            yield name, tensor
            continue
        if not isinstance(tensor, Tensor) and convert is gpt2.tensors:
            tensor = tensor.dequantize()
        yield from cast(Iterator[Value], convert(name, cast(Tensor, tensor), arch))


def cut_joined(values: Iterable[Value], arch: Architecture) -> Iterator[Value]:
    """From a GGUF file's tensors to the decoder's, which have other names where they are joined."""
    for name, value in values:
        yield from cast(Iterator[Value], split(name, cast(Tensor, value), arch))


def fill(
    slots: Iterable[WeightSlot],
    tensors: Iterable[Value],
    tie_word_embeddings: bool,
    progress: Progress,
) -> None:
    """Every slot from the tensor of its name. Raises Unsupported for a tensor that no slot wants
    (other than a bias of zeros), one of another shape than its slot's, and a slot without a
    tensor."""
    by_name = {slot.name: slot for slot in slots}
    missing = set(by_name)
    for name, tensor in tensors:
        if name.endswith(IGNORED) or (tie_word_embeddings and name == "lm_head.weight"):
            continue
        slot = by_name.get(name)
        if slot is None and _is_no_bias(name, tensor):
            continue
        if slot is None:
            raise Unsupported(
                f"the checkpoint has a tensor {name} {list(tensor.shape)} that this architecture does not use"
            )
        if slot.shape != tensor.shape:
            raise Unsupported(
                f"tensor {name} has shape {list(tensor.shape)} where the configuration asks for {list(slot.shape)}"
            )
        slot.fill(tensor)
        missing.discard(name)
        progress("loading weights", 1 - len(missing) / len(by_name))
    if missing:
        raise Unsupported(
            f"the checkpoint lacks {len(missing)} of {len(by_name)} tensors, among them {min(missing)}"
        )


def _is_no_bias(name: str, value: Tensor | Quantized | StoredMatrix) -> bool:
    """Whether this is a bias of zeros, which AutoGPTQ saves for layers that have none."""
    return name.endswith(".bias") and isinstance(value, Tensor) and not value.any()


def fill_randomly(slots: Sequence[WeightSlot], seed: int, progress: Progress) -> None:
    """N(0, 0.02), each tensor from a seed of its own so that order does not matter; norms are
    ones."""
    for done, slot in enumerate(slots):
        target = slot.target
        if slot.name.endswith("norm.weight") and isinstance(target, Tensor):
            target.fill_(1)
        elif isinstance(target, Tensor) and slot.slice is None:
            target.normal_(0, DUMMY_STD, generator=_generator(slot.name, seed, target.device))
        else:
            whole = torch.empty(slot.shape, device=target.device)
            whole.normal_(0, DUMMY_STD, generator=_generator(slot.name, seed, whole.device))
            replace(slot, row_order=None).fill(whole)
        progress("making random weights", done / len(slots))


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ seed)


def from_safetensors(
    directory: Path, only_headers: bool = False, skip: Skip = lambda name: False
) -> Iterator[Named]:
    """Every tensor of the model in `directory`; `only_headers`: none, but each file is opened.
    Raises Unsupported for a broken or missing file, and for a tensor that two files have."""
    from safetensors import SafetensorError, safe_open

    weights = safetensors_files(directory)
    owners: dict[str, Path] = {}
    for path in weights.paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in weights.pick(path, file.keys(), owners):
                    if not only_headers and not skip(name):
                        yield name, file.get_tensor(name)
        except SafetensorError as error:
            size = path.stat().st_size
            raise Unsupported(
                f"{path} ({size:,} bytes) is broken or its download incomplete: {error}; fetch it again"
            ) from None


def tensors_for_transformers(source: Source | None) -> Callable[[], Iterator[Named]] | None:
    """The tensors of a source that transformers by itself would read from other files; None for all
    other sources."""
    if isinstance(source, Path) and not SAFETENSORS.is_conventional(source):
        return lambda: from_safetensors(source)
    if isinstance(source, PytorchFiles) and not PYTORCH.is_conventional(source.directory):
        return source.tensors
    return None


def check_safetensors(directory: Path) -> None:
    """Whether the files of `directory` are there and whole, as far as their headers say. Raises
    Unsupported."""
    for _ in from_safetensors(directory, only_headers=True):
        pass


def from_gguf(
    file: Gguf,
    config: Config,
    quantized: bool = False,
    skip: Skip = lambda name: False,
    device: torch.device | str = "cpu",
) -> Iterator[Value]:
    """Every weight, by as many threads as torch uses: quantized where asked for and its type is one
    of those that can stay so, else dequantized to float32. For a GPU quantized matrices stay in the
    file until a slot moves its part."""
    places = [place for place in file.places() if not skip(place.name)]
    on_cpu = torch.device(device).type == "cpu"

    def read(place: Place) -> Tensor | Quantized | StoredMatrix:
        value = file.weight(place, config, quantized)
        return value if isinstance(value, Tensor) or not on_cpu else value.to("cpu")

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for first in range(0, len(places), GROUP):
            group = places[first : first + GROUP]
            for place, value in zip(group, pool.map(read, group), strict=True):
                yield place.name, value
