"""Vectors of 16 float32 lanes for Numba kernels: LLVM's `<16 x float>` as a Numba type with its arithmetic.

Numba's own loops leave `exp` scalar (PyPI's llvmlite ships without SVML), which makes a scan ten times slower. Kernels
written with these vectors control the registers: on AVX-512 one vector is one register, elsewhere LLVM splits it.
Memory is accessed through plain integer addresses, so any stride is free. It may hold bfloat16, for which Numba has no
type: that is the upper half of a float32, so loading it is a shift, and storing it a rounding.

No fast-math flag is set anywhere: NaN and infinity must propagate, and the rounding trick of `exp2` would be optimised
away.
"""

import operator

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable


LANES = 16
_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_LONG = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT_VECTOR = ir.VectorType(_INT, LANES)
_SHORT_VECTOR = ir.VectorType(ir.IntType(16), LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)


class Float32x16(types.Type):
    """Numba's name for `<16 x float>`."""

    def __init__(self):
        super().__init__(name="float32x16")


float32x16 = Float32x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _VECTOR)


def _constant(value):
    return ir.Constant(_VECTOR, [float(value)] * LANES)


def _int_constant(value):
    return ir.Constant(_INT_VECTOR, [value] * LANES)


def _broadcast(builder, scalar, vector_type=_VECTOR):
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), ir.Constant(_INT_VECTOR, [0] * LANES))


def _declare(builder, name, result, arguments):
    module = builder.module
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(result, arguments), name)


def _multiply_add(builder, a, b, c):
    # fmuladd fuses where the CPU can; unlike fma it never becomes a library call.
    function = _declare(builder, "llvm.fmuladd.v16f32", _VECTOR, [_VECTOR] * 3)
    return builder.call(function, [a, b, c])


def _polynomial(builder, x, coefficients):
    """Horner's rule; coefficients from the constant upwards."""
    value = _constant(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = _multiply_add(builder, value, x, _constant(coefficient))
    return value


def _clamp(builder, x, low, high):
    # These comparisons are false for NaN, which thus passes through.
    x = builder.select(builder.fcmp_ordered("<", x, _constant(low)), _constant(low), x)
    return builder.select(builder.fcmp_ordered(">", x, _constant(high)), _constant(high), x)


# Relative minimax polynomial of 2**f on [-1/2, 1/2] with p(0) = 1 (so exp(0) is exactly 1): error 9e-8.
_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
# Adding this rounds to an integer n and leaves n + 127, the biased exponent of 2**n, in the low bits.
_ROUND = 1.5 * 2**23 + 127.0


def _exp2(builder, x):
    # The scale is 0 from -127 down and infinity from 128 up, so underflow and overflow are correct.
    return _exp2_bounded(builder, _clamp(builder, x, -127.0, 128.0))


def _exp2_bounded(builder, x):
    rounded = builder.fadd(x, _constant(_ROUND))
    fraction = builder.fsub(x, builder.fsub(rounded, _constant(_ROUND)))
    scale = builder.shl(builder.bitcast(rounded, _INT_VECTOR), _int_constant(23))
    return builder.fmul(_polynomial(builder, fraction, _EXP2), builder.bitcast(scale, _VECTOR))


# log1p(y) = 2 atanh(s), s = y / (2 + y); minimax of atanh(s) / s in s * s on [0, 1/9]: error 4e-9.
_ATANH = (1.0, 0.3333320915699005, 0.2001076340675354, 0.14000903069972992, 0.1400599330663681)
_LOG2E = 1.4426950408889634


def _absolute(builder, x):
    return builder.call(_declare(builder, "llvm.fabs.v16f32", _VECTOR, [_VECTOR]), [x])


def _exp_minus_abs(builder, x):
    return _exp2(builder, builder.fmul(_absolute(builder, x), _constant(-_LOG2E)))


def _softplus(builder, x):
    # max(x, 0) + log1p(exp(-|x|)): no overflow, and exact to a few ulp on both sides.
    y = _exp_minus_abs(builder, x)
    s = builder.fdiv(y, builder.fadd(y, _constant(2.0)))
    series = _polynomial(builder, builder.fmul(s, s), _ATANH)
    positive = builder.select(builder.fcmp_ordered("<", x, _constant(0.0)), _constant(0.0), x)
    return _multiply_add(builder, builder.fadd(s, s), series, positive)


def _sigmoid(builder, x):
    y = _exp_minus_abs(builder, x)
    top = builder.select(builder.fcmp_ordered("<", x, _constant(0.0)), y, _constant(1.0))
    return builder.fdiv(top, builder.fadd(y, _constant(1.0)))


def _vector_function(emit, num_arguments):
    """An intrinsic of `num_arguments` vectors whose instructions `emit(builder, *vectors)` generates."""

    def lower(context, builder, signature, arguments):
        return emit(builder, *arguments)

    # Numba types intrinsics by their Python signature, so each arity is spelt out.
    if num_arguments == 1:

        def typing(typingctx, a):
            return (float32x16(float32x16), lower) if a == float32x16 else None
    elif num_arguments == 2:

        def typing(typingctx, a, b):
            return (float32x16(float32x16, float32x16), lower) if a == float32x16 else None
    else:

        def typing(typingctx, a, b, c):
            return (float32x16(float32x16, float32x16, float32x16), lower) if a == float32x16 else None

    return intrinsic(typing)


exp2 = _vector_function(_exp2, 1)
exp2_bounded = _vector_function(_exp2_bounded, 1)  # for -127 <= x < 128 or NaN
softplus = _vector_function(_softplus, 1)
sigmoid = _vector_function(_sigmoid, 1)
absolute = _vector_function(_absolute, 1)
# Ignores NaN in `b`.
maximum = _vector_function(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", b, a), b, a), 2)
multiply_add = _vector_function(_multiply_add, 3)


def _define_operator(function, emit):
    @type_callable(function)
    def typing(context):
        def typer(a, b):
            if a == float32x16 and b == float32x16:
                return float32x16

        return typer

    @lower_builtin(function, float32x16, float32x16)
    def lower(context, builder, signature, arguments):
        return emit(builder, *arguments)


_define_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_define_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_define_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))


@intrinsic
def splat(typingctx, value):
    """A vector with the float `value` in each lane."""

    def lower(context, builder, signature, arguments):
        scalar = context.cast(builder, arguments[0], signature.args[0], types.float32)
        return _broadcast(builder, scalar)

    return float32x16(value), lower


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, ir.PointerType(pointee))


def _element(builder, address, index, pointee):
    """Pointer to element `index` of an array that starts at the integer `address`."""
    return builder.gep(_pointer(builder, address, pointee), [index], source_etype=pointee)


@intrinsic
def load(typingctx, address, index):
    """Load vector `index` at `address`, which need not be aligned."""

    def lower(context, builder, signature, arguments):
        return builder.load(_element(builder, *arguments, _VECTOR), align=4)

    return float32x16(types.int64, types.int64), lower


@intrinsic
def store(typingctx, address, index, vector):
    """Store vector `index` at `address`, which need not be aligned."""

    def lower(context, builder, signature, arguments):
        builder.store(arguments[2], _element(builder, *arguments[:2], _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, float32x16), lower


@intrinsic
def load_splat(typingctx, address, index):
    """Load float `index` at `address` into each lane."""

    def lower(context, builder, signature, arguments):
        return _broadcast(builder, builder.load(_element(builder, *arguments, _FLOAT), align=4))

    return float32x16(types.int64, types.int64), lower


def _first_lanes(builder, count):
    counts = _broadcast(builder, builder.trunc(count, _INT), _INT_VECTOR)
    return builder.icmp_signed("<", ir.Constant(_INT_VECTOR, list(range(LANES))), counts)


def _lane_memory(memory_type, alignment, widen, narrow):
    """Functions that load and store the first lanes of a vector which are of `memory_type` in memory."""
    suffix = f"v{LANES}{'f' if memory_type == _VECTOR else 'i'}{8 * alignment}.p0"
    align = ir.Constant(_INT, alignment)

    @intrinsic
    def load_all(typingctx, address):
        def lower(context, builder, signature, arguments):
            return widen(builder, builder.load(_pointer(builder, arguments[0], memory_type), align=alignment))

        return float32x16(types.int64), lower

    @intrinsic
    def load_masked(typingctx, address, count):
        def lower(context, builder, signature, arguments):
            values = [_pointer(builder, arguments[0], memory_type), align, _first_lanes(builder, arguments[1])]
            values.append(ir.Constant(memory_type, None))  # zeros
            types_ = [value.type for value in values]
            return widen(
                builder, builder.call(_declare(builder, f"llvm.masked.load.{suffix}", memory_type, types_), values)
            )

        return float32x16(types.int64, types.int64), lower

    @intrinsic
    def store_all(typingctx, address, vector):
        def lower(context, builder, signature, arguments):
            pointer = _pointer(builder, arguments[0], memory_type)
            builder.store(narrow(builder, arguments[1]), pointer, align=alignment)
            return context.get_dummy_value()

        return types.void(types.int64, float32x16), lower

    @intrinsic
    def store_masked(typingctx, address, vector, count):
        def lower(context, builder, signature, arguments):
            address, vector, count = arguments
            values = [narrow(builder, vector), _pointer(builder, address, memory_type), align]
            values.append(_first_lanes(builder, count))
            types_ = [value.type for value in values]
            builder.call(_declare(builder, f"llvm.masked.store.{suffix}", ir.VoidType(), types_), values)
            return context.get_dummy_value()

        return types.void(types.int64, float32x16, types.int64), lower

    @njit(forceinline=True)
    def load_first(address, count):
        """Load `count` <= 16 lanes at `address`, zero in the others; memory beyond them is not touched."""
        if count == 16:
            return load_all(address)
        return load_masked(address, count)

    @njit(forceinline=True)
    def store_first(address, vector, count):
        """Store the first `count` <= 16 lanes at `address`; memory beyond them is not touched."""
        if count == 16:
            store_all(address, vector)
        else:
            store_masked(address, vector, count)

    return load_first, store_first


def _from_bfloat16(builder, halves):
    return builder.bitcast(builder.shl(builder.zext(halves, _INT_VECTOR), _int_constant(16)), _VECTOR)


def _to_bfloat16(builder, x):
    # To nearest, ties to even: add half a unit in the last place, less one bit if that place is even. A NaN could
    # overflow to something else.
    bits = builder.bitcast(x, _INT_VECTOR)
    odd = builder.and_(builder.lshr(bits, _int_constant(16)), _int_constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _int_constant(0x7FFF))), _int_constant(16))
    halves = builder.select(builder.fcmp_unordered("uno", x, x), _int_constant(0x7FC0), rounded)
    return builder.trunc(halves, _SHORT_VECTOR)


load_first, store_first = _lane_memory(_VECTOR, 4, lambda builder, x: x, lambda builder, x: x)
_load_first_bfloat16, _store_first_bfloat16 = _lane_memory(_SHORT_VECTOR, 2, _from_bfloat16, _to_bfloat16)


@njit(forceinline=True)
def load_sequence(address, count, bfloat16):
    """Load `count` channels of a sequence; `bfloat16`, a compile-time constant, tells what it is in memory."""
    if bfloat16:
        return _load_first_bfloat16(address, count)
    return load_first(address, count)


@njit(forceinline=True)
def store_sequence(address, vector, count, bfloat16):
    """Store `count` channels of a sequence."""
    if bfloat16:
        _store_first_bfloat16(address, vector, count)
    else:
        store_first(address, vector, count)


@intrinsic
def store_lane_sums(typingctx, address, index, a, b, c, d):
    """Store the sum of each vector's lanes in floats `index` to `index + 3` at `address`."""

    def lower(context, builder, signature, arguments):
        def fold(x, y, halves):
            # Add the second half of each run of lanes to its first half, x's runs before y's.
            first, second = (ir.Constant(ir.VectorType(_INT, len(half)), half) for half in halves)
            return builder.fadd(builder.shuffle_vector(x, y, first), builder.shuffle_vector(x, y, second))

        def halves(run, lanes):
            starts = range(0, lanes, run)
            return [[start + half + lane for start in starts for lane in range(run // 2)] for half in (0, run // 2)]

        a, b, c, d = arguments[2:]
        sums = fold(fold(a, b, halves(16, 32)), fold(c, d, halves(16, 32)), halves(8, 32))
        sums = fold(sums, sums, halves(4, 16))
        sums = fold(sums, sums, halves(2, 8))
        builder.store(
            sums, builder.bitcast(_element(builder, *arguments[:2], _FLOAT), ir.PointerType(sums.type)), align=4
        )
        return context.get_dummy_value()

    vectors = (float32x16,) * 4
    return types.void(types.int64, types.int64, *vectors), lower


@intrinsic
def any_above(typingctx, vector, limits):
    """Whether any lane exceeds that of `limits`; NaN never does."""

    def lower(context, builder, signature, arguments):
        mask = builder.bitcast(builder.fcmp_ordered(">", *arguments), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", mask, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(float32x16, float32x16), lower


def _prefetch(for_writing):
    def prefetch(typingctx, address):
        def lower(context, builder, signature, arguments):
            pointer = _pointer(builder, arguments[0], ir.IntType(8))
            function = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, _INT, _INT, _INT])
            # Keep in all caches (3), data (1).
            builder.call(function, [pointer, *[ir.Constant(_INT, value) for value in (for_writing, 3, 1)]])
            return context.get_dummy_value()

        return types.void(types.int64), lower

    return intrinsic(prefetch)


# Prefetch the cache line at an address, which need not be valid.
prefetch, prefetch_write = _prefetch(0), _prefetch(1)


def _scalar_memory(llvm_type, numba_type):
    """Load and store intrinsics for arrays of one scalar type."""

    def load_scalar(typingctx, address, index):
        def lower(context, builder, signature, arguments):
            return builder.load(_element(builder, *arguments, llvm_type), align=4)

        return numba_type(types.int64, types.int64), lower

    def store_scalar(typingctx, address, index, value):
        def lower(context, builder, signature, arguments):
            builder.store(arguments[2], _element(builder, *arguments[:2], llvm_type), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), lower

    return intrinsic(load_scalar), intrinsic(store_scalar)


load_float, store_float = _scalar_memory(_FLOAT, types.float32)
load_int, _ = _scalar_memory(_LONG, types.int64)


@intrinsic
def load_bfloat16(typingctx, address):
    """Load the bfloat16 at `address` as a float."""

    def lower(context, builder, signature, arguments):
        half = builder.load(_pointer(builder, arguments[0], ir.IntType(16)), align=2)
        return builder.bitcast(builder.shl(builder.zext(half, _INT), ir.Constant(_INT, 16)), _FLOAT)

    return types.float32(types.int64), lower


@intrinsic
def take_ticket(typingctx, address, index):
    """Atomically increment int64 `index` at `address` and return its old value; threads take their work with it."""

    def lower(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _element(builder, *arguments, _LONG), ir.Constant(_LONG, 1), "monotonic")

    return types.int64(types.int64, types.int64), lower
