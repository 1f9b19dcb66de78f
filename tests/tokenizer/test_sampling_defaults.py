"""The sampling that a model's generation_config.json recommends, and which file --generation-config
selects."""

import json
import logging
from pathlib import Path

import pytest
from pagewire.checkpoint.sampling_defaults import sampling_defaults
from pagewire.config import ModelConfig, TokenizerConfig
from pagewire.tokenizer.service import load_text
from pagewire_protocol.sampling import SamplingDefaults


def write(directory: Path, **values: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


def test_the_model_s_file_or_another_or_none(tmp_path: Path) -> None:
    model = write(tmp_path / "model", temperature=0.6, top_k=20, max_new_tokens=512, eos_token_id=2)
    other = write(tmp_path / "other", top_p=0.8, repetition_penalty=1.1)
    assert sampling_defaults("auto", model) == SamplingDefaults(
        temperature=0.6, top_k=20, max_tokens=512
    )
    assert sampling_defaults("vllm", model) == SamplingDefaults()
    assert sampling_defaults(str(other), model) == SamplingDefaults(
        top_p=0.8, repetition_penalty=1.1
    )
    assert sampling_defaults("auto", tmp_path / "model.gguf") == SamplingDefaults()
    with pytest.raises(ValueError, match="nowhere"):
        sampling_defaults(str(tmp_path / "nowhere"), model)


def test_values_out_of_bounds_are_left_out_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write(tmp_path / "model", temperature="hot", top_p=1.5, top_k=5, min_p=None)
    with caplog.at_level(logging.INFO):
        assert sampling_defaults("auto", model) == SamplingDefaults(top_k=5)
    lines = [record.getMessage() for record in caplog.records]
    assert [name for name in ("temperature", "top_p") if f"{name}=" in " ".join(lines)] == [
        "temperature",
        "top_p",
    ]
    assert "top_k=5" in lines[-1]


def test_the_tokenizer_tells_them_without_a_tokenizer_too(tmp_path: Path) -> None:
    model = write(tmp_path / "model", temperature=0.6)
    config = ModelConfig(model=str(model), skip_tokenizer_init=True)
    facts = load_text(config, TokenizerConfig()).facts
    assert facts.sampling_defaults == SamplingDefaults(temperature=0.6)
