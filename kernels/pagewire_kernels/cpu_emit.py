"""What products with quantized weights are in LLVM's terms: vectors of 16, of which LLVM makes what
the processor has (SSE, AVX2, AVX-512, NEON). Codes are widened in registers and multiplied in
float32, so that nothing is lost beyond the order of sums, and each weight is read once for all
rows. Knows no Numba.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# llvmlite's methods are made by decorators that its types do not see through.

from typing import Any, Final, NamedTuple

from llvmlite import ir

from .cpu_format import ROWS, Format

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16 = ir.HalfType()
F32 = ir.FloatType()
FUSE: Final = ("contract", "nsz")
MATMUL_ARGUMENTS: Final = 11
DEQUANTIZE_ARGUMENTS: Final = 7
TILES: Final = ((8, 1), (4, 1), (2, 2), (1, 3))
"""(rows of x, panels) that are worked on at a time: enough independent sums to hide the latency of
an addition, few enough for the registers of AVX2."""


def vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, ROWS)


def constant(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(value: int) -> ir.Constant:
    return ir.Constant(vector(I8), [value] * ROWS)


class Code:
    """What the kernels are written in: addresses are int64."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def load(self, address: Any, offset: int, value_type: ir.Type, align: int) -> Any:
        value = self.b.load(
            self.b.inttoptr(self.b.add(address, constant(offset)), value_type.as_pointer())
        )
        value.align = align
        return value

    def store(self, value: Any, address: Any, align: int) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def everywhere(self, scalar: Any) -> Any:
        nothing = ir.Constant(vector(scalar.type), ir.Undefined)
        first = self.b.insert_element(nothing, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, nothing, ir.Constant(vector(I32), [0] * ROWS))

    def times_plus(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, in one rounding where the processor can."""
        product = self.b.fmul(a, b, flags=FUSE)
        return product if c is None else self.b.fadd(product, c, flags=FUSE)

    def loop(self, start: Any, stop: Any, step: int, carried: list[Any], body: Any) -> list[Any]:
        """`body(i, values)` gives the next values, for i from start while i + step <= stop; returns
        (i, *values) at the end."""
        before = self.b.block
        head = self.b.append_basic_block("head")
        inside = self.b.append_basic_block("body")
        after = self.b.append_basic_block("after")
        self.b.branch(head)
        self.b.position_at_end(head)
        phis = [self.b.phi(value.type) for value in (start, *carried)]
        for phi, value in zip(phis, (start, *carried), strict=True):
            phi.add_incoming(value, before)
        following = self.b.add(phis[0], constant(step))
        self.b.cbranch(self.b.icmp_signed("<=", following, stop), inside, after)
        self.b.position_at_end(inside)
        values = body(phis[0], phis[1:])
        for phi, value in zip(phis, (following, *values), strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return list(phis)


class Group:
    """One group of a panel: its codes as vectors of float32, in the order of the inputs, its scales
    and minima."""

    def __init__(self, code: Code, form: Format, address: Any) -> None:
        self.code = code
        self.form = form
        self.address = address

    def pair(self, j: int) -> tuple[Any, Any]:
        """Codes of inputs 2j and 2j + 1."""
        b = self.code.b
        if self.form.bits == 8:
            halves = [
                self.code.load(self.address, ROWS * (2 * j + i), vector(I8), 1) for i in (0, 1)
            ]
            low, high = (b.sext(codes, vector(I32)) for codes in halves)
        else:
            both = self.code.load(self.address, ROWS * j, vector(I8), 1)
            low, high = (
                b.zext(codes, vector(I32))
                for codes in (b.and_(both, splat(15)), b.lshr(both, splat(4)))
            )
        return b.sitofp(low, vector(F32)), b.sitofp(high, vector(F32))

    def scales(self) -> Any:
        return self._floats(self.form.code_bytes)

    def minima(self) -> Any:
        return self._floats(self.form.code_bytes + self.form.scale_bytes)

    def _floats(self, offset: int) -> Any:
        number = self.code.load(self.address, offset, vector(F16 if self.form.half else F32), 2)
        return self.code.b.fpext(number, vector(F32)) if self.form.half else number


class Operands(NamedTuple):
    """Of a product, as int64. weight: address of the panels. x: of float32 rows, x_stride bytes
    apart. sums: of float32 [rows, groups], each group's sum of x. first, last: panels. out: of
    float32 rows, out_stride bytes apart. add: 1 adds to what is there."""

    weight: Any
    x: Any
    x_stride: Any
    sums: Any
    groups: Any
    rows: Any
    first: Any
    last: Any
    out: Any
    out_stride: Any
    add: Any


def _emit_tile(
    code: Code, form: Format, o: Operands, row: Any, panel: Any, rows: int, panels: int
) -> None:
    """out[row : row + rows, 16 columns of each panel]."""
    b = code.b
    panel_bytes = b.mul(o.groups, constant(form.group_bytes))
    sums_stride = b.mul(o.groups, constant(4))
    weights = [
        b.add(o.weight, b.mul(b.add(panel, constant(p)), panel_bytes)) for p in range(panels)
    ]
    inputs = [b.add(o.x, b.mul(b.add(row, constant(r)), o.x_stride)) for r in range(rows)]
    sums = [b.add(o.sums, b.mul(b.add(row, constant(r)), sums_stride)) for r in range(rows)]

    def body(group: Any, totals: list[Any]) -> list[Any]:
        groups = [
            Group(code, form, b.add(weight, b.mul(group, constant(form.group_bytes))))
            for weight in weights
        ]
        x_at = [b.add(x, b.mul(group, constant(4 * form.group))) for x in inputs]
        products = _emit_group_products(code, form, groups, x_at)
        return _emit_scaled(code, form, groups, group, products, sums, totals)

    zero = ir.Constant(vector(F32), [0.0] * ROWS)
    _, *totals = code.loop(constant(0), o.groups, 1, [zero] * (rows * panels), body)
    for i, total in enumerate(totals):
        r, p = divmod(i, panels)
        _emit_result(code, o, total, b.add(row, constant(r)), b.add(panel, constant(p)))


def _emit_group_products(
    code: Code, form: Format, groups: list[Group], x_at: list[Any]
) -> list[list[Any]]:
    """Codes times inputs, summed over one group: for each row and panel (rows * panels entries,
    panels of a row side by side) one sum or two. x_at: addresses of the rows' inputs.

    A tile of few sums gives each two chains of additions, since one would wait for itself.
    """
    rows = len(x_at)
    panels = len(groups)
    chains = 2 if rows * panels < 4 else 1
    products: list[list[Any]] = [[None] * chains for _ in range(rows * panels)]
    for j in range(form.group // 2):
        pairs = [group.pair(j) for group in groups]
        for i in (0, 1):
            k = 2 * j + i
            for r in range(rows):
                x = code.everywhere(code.load(x_at[r], 4 * k, F32, 4))
                for p in range(panels):
                    chain = products[r * panels + p]
                    chain[k % chains] = code.times_plus(pairs[p][i], x, chain[k % chains])
    return products


def _emit_scaled(
    code: Code,
    form: Format,
    groups: list[Group],
    group: Any,
    products: list[list[Any]],
    sums: list[Any],
    totals: list[Any],
) -> list[Any]:
    """`totals` with a group's products times its scales added, and its minima times the sum of its
    inputs. sums: addresses of the rows' sums by group."""
    b = code.b
    panels = len(groups)
    scales = [part.scales() for part in groups]
    minima = [part.minima() for part in groups] if form.minima else []
    results: list[Any] = []
    for i, total in enumerate(totals):
        r, p = divmod(i, panels)
        product = products[i][0]
        if len(products[i]) == 2:
            product = b.fadd(products[i][0], products[i][1], flags=FUSE)
        total = code.times_plus(product, scales[p], total)
        if form.minima:
            input_sum = code.load(b.add(sums[r], b.mul(group, constant(4))), 0, F32, 4)
            total = code.times_plus(minima[p], code.everywhere(input_sum), total)
        results.append(total)
    return results


def _emit_result(code: Code, o: Operands, total: Any, row: Any, panel: Any) -> None:
    """To its place in `out`, added to what is there if asked for."""
    b = code.b
    zero = ir.Constant(vector(F32), [0.0] * ROWS)
    place = b.add(b.add(o.out, b.mul(row, o.out_stride)), b.mul(panel, constant(4 * ROWS)))
    before = b.select(
        b.icmp_signed("!=", o.add, constant(0)), code.load(place, 0, vector(F32), 4), zero
    )
    code.store(b.fadd(total, before), place, 4)


def emit_matmul(code: Code, form: Format, o: Operands) -> None:
    """Rows by the largest tile that fits, panel after panel: a panel stays in the nearest cache for
    all rows."""

    def panels_of(rows: int, panels: int, row: Any, start: Any) -> Any:
        def body(panel: Any, _: list[Any]) -> list[Any]:
            _emit_tile(code, form, o, row, panel, rows, panels)
            return []

        return code.loop(start, o.last, panels, [], body)[0]

    row = constant(0)
    for rows, panels in TILES:

        def some(row: Any, _: list[Any], rows: int = rows, panels: int = panels) -> list[Any]:
            following = panels_of(rows, panels, row, o.first)
            if panels > 1:
                panels_of(rows, 1, row, following)
            return []

        row = code.loop(row, o.rows, rows, [], some)[0]


def emit_dequantize(
    code: Code,
    form: Format,
    weight: Any,
    groups: Any,
    first: Any,
    last: Any,
    out: Any,
    stride: Any,
    brief: Any,
) -> None:
    """out [K, 16 * panels], rows `stride` bytes apart: float32, or with `brief` bfloat16."""
    b = code.b
    short = b.icmp_signed("!=", brief, constant(0))

    def by_panel(panel: Any, _: list[Any]) -> list[Any]:
        def by_group(group: Any, _: list[Any]) -> list[Any]:
            index = b.add(b.mul(panel, groups), group)
            part = Group(code, form, b.add(weight, b.mul(index, constant(form.group_bytes))))
            scale = part.scales()
            minimum = part.minima() if form.minima else None
            for j in range(form.group // 2):
                for i, codes in enumerate(part.pair(j)):
                    k = b.add(b.mul(group, constant(form.group)), constant(2 * j + i))
                    _store_row(
                        code,
                        code.times_plus(codes, scale, minimum),
                        b.add(out, b.mul(k, stride)),
                        panel,
                        short,
                    )
            return []

        code.loop(constant(0), groups, 1, [], by_group)
        return []

    code.loop(first, last, 1, [], by_panel)


def _store_row(code: Code, value: Any, row: Any, panel: Any, short: Any) -> None:
    """Rounded to nearest even for bfloat16."""
    b = code.b
    with b.if_else(short) as (then, otherwise):
        with then:
            bits = b.bitcast(value, vector(I32))
            fixed = [ir.Constant(vector(I32), [number] * ROWS) for number in (16, 1, 0x7FFF)]
            odd = b.and_(b.lshr(bits, fixed[0]), fixed[1])
            rounded = b.lshr(b.add(bits, b.add(odd, fixed[2])), fixed[0])
            code.store(
                b.trunc(rounded, vector(I16)), b.add(row, b.mul(panel, constant(2 * ROWS))), 2
            )
        with otherwise:
            code.store(value, b.add(row, b.mul(panel, constant(4 * ROWS))), 4)


def module(operation: str, form: Format) -> ir.Module:
    """With one function, of int64 alone: `matmul`, whose arguments are Operands, or `dequantize`.
    It is named like the module."""
    count = MATMUL_ARGUMENTS if operation == "matmul" else DEQUANTIZE_ARGUMENTS
    result = ir.Module(f"{operation}_{form.name}")
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), [I64] * count), result.name)
    builder = ir.IRBuilder(function.append_basic_block())
    if operation == "matmul":
        emit_matmul(Code(builder), form, Operands(*function.args))
    else:
        emit_dequantize(Code(builder), form, *function.args)
    builder.ret_void()
    return result
