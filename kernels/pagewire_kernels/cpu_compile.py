"""Native functions compiled, by name: products and dense copies of a format by LLVM alone, the
others by Numba. Needs no torch.
"""

from typing import Any, Final

from .cpu_format import FORMATS
from .cpu_target import NEEDED, NoNativeCode, machine

FORMAT_BY_NAME: Final = {form.name: form for form in FORMATS}
OF_C: Final = ("sqrtf", "memset", "memcpy")
_unfinished: list[Any] = []
"""What Numba's engine still refers to, in case someone else has it compile something in this
process."""
ENTRY: Final = """
define void @{name}(i64 %task) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @{inner}(ptr %result, ptr %error, i64 %task)
  ret void
}}
"""


def compiled(name: str) -> tuple[str, bytes]:
    """(the symbol, an object file with it). Raises NoNativeCode where Numba is needed and
    missing."""
    kind, _, form = name.partition("_")
    return _by_llvm(kind, form) if form in FORMAT_BY_NAME else _by_numba(name)


def _by_llvm(kind: str, form: str) -> tuple[str, bytes]:
    import llvmlite.binding as llvm

    from . import cpu_emit

    made = cpu_emit.module(kind, FORMAT_BY_NAME[form])
    made.triple = llvm.get_process_triple()
    target_machine = machine()
    parsed = llvm.parse_assembly(str(made))
    parsed.data_layout = str(target_machine.target_data)
    passes = llvm.create_pass_builder(
        target_machine, llvm.create_pipeline_tuning_options(speed_level=2)
    )
    passes.getModulePassManager().run(parsed, passes)
    return made.name, target_machine.emit_object(parsed)


def _by_numba(name: str) -> tuple[str, bytes]:
    """Numba's function returns a status and gives its result and its errors to addresses; the team
    calls one that does not."""
    numba = load_numba()
    import llvmlite.binding as llvm
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler_lock import global_compiler_lock

    from . import cpu_gumbel, cpu_kernels, cpu_layers, cpu_team

    function = {
        "multiply": cpu_team.multiply,
        "make_dense": cpu_team.make_dense,
        "decode": cpu_layers.decode,
        "find_candidates": cpu_gumbel.find_candidates,
    }[name]
    arguments = (numba.types.int64,)
    dispatcher = cpu_kernels.inlined(function)
    with global_compiler_lock:
        # Only the whole is turned into machine code, further down, not each part alone as well.
        finalize = JITCodeLibrary._finalize_specific
        JITCodeLibrary._finalize_specific = lambda self: None
        try:
            dispatcher.compile(arguments)
            made = dispatcher.overloads[arguments]
            made.library.finalize()
        finally:
            JITCodeLibrary._finalize_specific = finalize
    _unfinished.append(made)
    parsed = llvm.parse_assembly(
        made.library.get_llvm_str() + ENTRY.format(name=name, inner=made.fndesc.llvm_func_name)
    )
    foreign = {
        f.name for f in parsed.functions if f.is_declaration and not f.name.startswith("llvm.")
    }
    assert foreign <= {*NEEDED, *OF_C}, f"{name} calls {sorted(foreign)}"
    return name, machine().emit_object(parsed)


def load_numba() -> Any:
    """The library. Raises NoNativeCode where it cannot be imported."""
    try:
        import numba
    except ImportError as error:
        raise NoNativeCode(f"Numba cannot be imported ({error})") from None
    return numba
