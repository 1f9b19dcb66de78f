"""That every back end has all operations of the interface, called the same way."""

import inspect

import pytest
from pagewire_kernels import backend as interface
from pagewire_kernels.backend import FusedOps, Ops, backend


def operations(protocol: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in vars(protocol).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def missing(ops: object, protocol: type) -> list[str]:
    """Names of operations that are not there, or have other parameters."""
    wrong = []
    for name, wanted in operations(protocol).items():
        own = getattr(ops, name, None)
        parameters = [] if own is None else list(inspect.signature(own).parameters)
        expected = [parameter for parameter in wanted.parameters if parameter != "self"]
        if parameters[: len(expected)] != expected:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("device", interface.MODULES)
def test_a_back_end_is_complete(device: str) -> None:
    ops = backend(device)
    assert len(operations(Ops)) > 12 and missing(ops, Ops) == []
    if ops.fused is not None:
        assert len(operations(FusedOps)) == 8 and missing(ops.fused, FusedOps) == []


def test_what_only_some_have_is_said() -> None:
    cpu, cuda = backend("cpu"), backend("cuda")
    assert cpu.fused is None and cuda.fused is not None
    assert cpu.quantized is not None and cuda.quantized is not None


def test_a_process_has_one_set_of_operations_with_its_choices() -> None:
    from pagewire_kernels import cuda

    assert backend("cuda") is backend("cuda") is cuda.OPS
    assert cuda.OPS.choices.hopper_prefill and cuda.OPS.choices.gemm.by_shape == {}
