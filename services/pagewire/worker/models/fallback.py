"""Any other decoder-only model that transformers knows, run through the paged cache: transformers
computes, attention is ours.

`plan` looks at a model without its weights, by running it on torch's meta device, and refuses by
name what cannot be served: no decoder, layers without attention, attention of another kind. `load`
makes it, and compares it with transformers' own attention before it serves. transformers is
imported only here, and only for such a model.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pagewire_kernels.backend import Ops
from pagewire_kernels.batch import Batch, make_batch
from torch import Tensor

from ...checkpoint import model_types
from .architecture import Architecture, Config, Unsupported
from .decoder import LogitsHook
from .fallback_attention import Attention, Call, Recorder
from .rope import NO_ROPE

log = logging.getLogger("pagewire.worker")
TOKENS = 12
CHUNKS = ((0, 5), (5, 11), (11, 12))
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far logits may be from those of transformers' own attention, relative to their size, by the
weights' type."""


@dataclass(frozen=True)
class OtherArchitecture(Architecture):
    """What is known of a model that transformers computes; count: its parameters."""

    count: int = 0

    @property
    def parameters(self) -> int:
        """The weights' count, all of them."""
        return self.count


@dataclass(frozen=True)
class Plan:
    """A model that can be served, not loaded yet. calls: what its layers ask of attention, in their
    order."""

    path: Path
    arch: OtherArchitecture
    config: Any
    calls: tuple[Call, ...]
    trust: bool

    def load(
        self,
        load_format: str,
        ops: Ops,
        dtype: torch.dtype,
        device: str,
        seed: int,
        tensors: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    ) -> "FallbackDecoder":
        """`tensors`: those of the checkpoint, where transformers would take other files than those
        that count; None: it finds them itself. Raises Unsupported: broken or missing weights, or
        logits that are not those of transformers' own attention."""
        attention = Attention(ops, self.calls, self.arch.head_dim, dtype)
        with _quietly(), torch.inference_mode(False), torch.no_grad():
            model = self._weights(load_format, dtype, seed, tensors).to(device).eval()
        decoder = FallbackDecoder(self.arch, model, attention)
        with _quietly(), torch.inference_mode():
            check(decoder, model, dtype, device)
        return decoder

    def _random(self, dtype: torch.dtype, seed: int) -> Any:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(self.config), dtype=dtype, trust_remote_code=self.trust
        )

    def _weights(
        self,
        load_format: str,
        dtype: torch.dtype,
        seed: int,
        tensors: Callable[[], Iterable[tuple[str, Tensor]]] | None,
    ) -> Any:
        """transformers' model with its weights. Raises Unsupported."""
        if load_format == "dummy":
            return self._random(dtype, seed)
        import transformers

        options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
        own_class = _own_class(self.config)
        try:
            if tensors is not None and own_class is not None:
                result: Any = own_class.from_pretrained(
                    None, config=copy.deepcopy(self.config), state_dict=dict(tensors()), **options
                )
            else:
                result = transformers.AutoModelForCausalLM.from_pretrained(
                    str(self.path),
                    local_files_only=True,
                    trust_remote_code=self.trust,
                    use_safetensors={"safetensors": True, "pt": False}.get(load_format),
                    **options,
                )
        except Unsupported:
            raise
        except Exception as error:  # transformers and the files' readers raise errors of many kinds
            raise Unsupported(
                f"the weights in {self.path} cannot be loaded: {_line(error)}"
            ) from None
        model, report = result
        self._check_report(report)
        return model

    def _check_report(self, report: Mapping[str, Any]) -> None:
        """What transformers says of a checkpoint's tensors. Raises Unsupported where the model
        lacks some."""
        missing = sorted(report["missing_keys"])
        if missing:
            raise Unsupported(
                f"the checkpoint in {self.path} lacks {len(missing)} tensors, among them {missing[0]}"
            )
        if report["mismatched_keys"]:
            raise Unsupported(
                f"the checkpoint in {self.path} differs: {_line(report['mismatched_keys'])}"
            )
        unused = sorted(report["unexpected_keys"])
        if unused:
            log.warning(
                "%d tensors of the checkpoint are not used by this model, among them %s",
                len(unused),
                unused[0],
            )


class FallbackDecoder:
    """Called like decoder.Decoder, from which it differs in who computes what is no attention."""

    def __init__(self, arch: Architecture, model: Any, attention: Attention) -> None:
        self.arch = arch
        self.rank_arch = arch
        self.attention_name = attention.name
        self._model = model
        self._attention = attention
        model.set_attn_implementation(attention.name)

    def packed(self) -> Iterator[Tensor]:
        """None: its matrices are transformers' own, which no kernel of Pagewire reads."""
        yield from ()

    def __call__(
        self,
        ids: Tensor,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        logits_indices: Tensor | None,
        tick: Callable[[], None],
        logits_hook: LogitsHook | None = None,
    ) -> Tensor:
        """See Decoder. With a `logits_hook`, the logits of all tokens exist at once."""
        keeps_all = logits_indices is None or logits_hook is not None
        kept = {} if keeps_all else {"logits_to_keep": logits_indices}
        with self._attention.running(cos_sin, caches, batch, tick):
            logits = self._model(
                input_ids=ids[None], position_ids=batch.positions[None], use_cache=False, **kept
            ).logits[0]
        if logits_hook is None:
            return logits
        logits_hook(lambda rows: logits[rows])
        return logits if logits_indices is None else logits[logits_indices]


def plan(path: Path, settings: Config, trust: bool) -> Plan:
    """Raises Unsupported with one line that says why this model cannot be served."""
    with _quietly():
        config = _config(path, settings, trust)
        _refuse(config)
        recorder = Recorder()
        model = _on_meta(config, recorder, trust)
    calls = tuple(recorder.calls)
    name = type(model).__name__
    layers = int(config.num_hidden_layers)
    if len(calls) != layers:
        raise Unsupported(
            f"{name} is not supported: {len(calls)} of its {layers} layers go through transformers' common attention; others (state-space, "
            "linear, convolutional, or attention of their own) cannot use the paged cache"
        )
    for call, layer_type in zip(
        calls, getattr(config, "layer_types", None) or ("",) * layers, strict=True
    ):
        hidden = (
            "hides its windows" if layer_type == "sliding_attention" and call.window is None else ""
        )
        if call.refused or hidden:
            raise Unsupported(f"{name} is not supported: its attention {call.refused or hidden}")
    if len({(call.kv_heads, call.size) for call in calls}) != 1:
        raise Unsupported(
            f"{name} is not supported: its layers differ in the number or size of their KV heads"
        )
    return Plan(path, _architecture(settings, config, model, calls), config, calls, trust)


def _architecture(
    settings: Config, config: Any, model: Any, calls: tuple[Call, ...]
) -> OtherArchitecture:
    return OtherArchitecture(
        model_type=str(settings["model_type"]),
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(getattr(config, "intermediate_size", None) or 0),
        num_layers=len(calls),
        num_heads=calls[0].heads,
        num_kv_heads=calls[0].kv_heads,
        head_dim=max(call.size for call in calls),
        norm_eps=0.0,
        max_position=_longest(config),
        tie_word_embeddings=False,
        rope=NO_ROPE,
        windows=tuple(call.window for call in calls),
        count=sum(parameter.numel() for parameter in model.parameters()),
    )


def _longest(config: Any) -> int:
    """Rotation that depends on the length of the longest sequence in a batch would give others
    wrong keys: the context ends before it."""
    longest = getattr(config, "max_position_embeddings", None)
    if not longest:
        raise Unsupported(
            f"the configuration of this {config.model_type} model does not say how long contexts may be"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = (
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or longest
    )
    return int(
        min(original, longest)
        if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic")
        else longest
    )


def _config(path: Path, settings: Config, trust: bool) -> Any:
    model_types.check_config(settings, trust)
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust
        )
    except Exception as error:  # validation errors are of many kinds
        raise Unsupported(
            f"the configuration of this {settings.get('model_type')} model is wrong: {_line(error)}"
        ) from None


def _refuse(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = next(iter(config.architectures or ()), "")
    own_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if config.is_encoder_decoder:
        raise Unsupported(
            f"{named or config.model_type} is an encoder with a decoder; only models of a decoder alone are supported"
        )
    if not getattr(config, "auto_map", None) and (
        own_class is None or (named and named != own_class)
    ):
        raise Unsupported(
            f"{named or config.model_type} is no causal language model; only those are supported"
        )
    if config.get_text_config() is not config:
        raise Unsupported(
            f"{named or config.model_type} is made of several models; only plain language models are supported"
        )
    if getattr(config, "quantization_config", None):
        raise Unsupported(
            f"quantized weights of {config.model_type}, which runs through transformers, are not supported; give unquantized safetensors"
        )
    unsupported = {
        layer_type
        for layer_type in getattr(config, "layer_types", None) or ()
        if layer_type not in ("full_attention", "sliding_attention")
    }
    if unsupported:
        raise Unsupported(
            f"{named or config.model_type} has layers of type {', '.join(sorted(unsupported))}, which is not supported"
        )


def _own_class(config: Any) -> Any:
    """transformers' class of a model; None where the code is the repository's."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "auto_map", None):
        return None
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def _on_meta(config: Any, recorder: Recorder, trust: bool) -> Any:
    """The model without memory, and one run through it, which `recorder` hears."""
    from transformers import AutoModelForCausalLM

    bare = copy.deepcopy(config)
    bare._experts_implementation = (
        "batched_mm"  # the only way through a mixture of experts that does not depend on values
    )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                bare, attn_implementation=recorder.name, trust_remote_code=trust
            ).eval()
            ids = torch.zeros(1, 4, dtype=torch.long)
            with torch.inference_mode():
                model(input_ids=ids, position_ids=torch.arange(4)[None], use_cache=False)
    except Unsupported:
        raise
    except Exception as error:  # whatever the model's code does when its attention is replaced
        name = next(iter(config.architectures or ()), config.model_type)
        own = isinstance(error, KeyError) and recorder.name in str(error)
        why = (
            "its attention is its own"
            if own
            else f"without its weights and with another attention it does not run ({_line(error)})"
        )
        raise Unsupported(f"{name} is not supported: {why}") from None
    return model


def check(decoder: FallbackDecoder, model: Any, dtype: torch.dtype, device: str) -> None:
    """A few tokens in chunks through the paged cache against all at once through transformers.
    Raises Unsupported."""
    arch = decoder.arch
    ids = torch.arange(3, 3 + TOKENS, device=device) * 7919 % arch.vocab_size
    caches = [
        torch.zeros(2, 1, arch.num_kv_heads, 16, arch.head_dim, dtype=dtype, device=device)
        for _ in range(arch.num_layers)
    ]
    still = torch.zeros(TOKENS, arch.head_dim, device=device)
    still[:, : arch.head_dim // 2] = 1
    through_cache = [
        decoder(
            ids[a:b],
            [still] * arch.num_layers,
            caches,
            make_batch([b - a], [b], [[0]], 16, device),
            None,
            lambda: None,
        )
        for a, b in CHUNKS
    ]
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids[None], use_cache=False).logits[0].float()
    model.set_attn_implementation(decoder.attention_name)
    error = (torch.cat(through_cache).float() - expected).norm(dim=-1) / (
        expected - expected.mean(-1, keepdim=True)
    ).norm(dim=-1)
    # The median: a mixture of experts may choose another expert for a token by rounding alone.
    if not error.median() <= TOLERANCE[dtype]:
        raise Unsupported(
            f"{type(model).__name__} is not supported: through the paged cache its logits are off by {error.median():.2g} of their size"
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers prints bars and tables and warns of much that is no concern of who serves a
    model."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    bars = theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _line(error: Any) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
