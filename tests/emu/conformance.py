"""What each arithmetic form of PTX must compute, by numpy; and the kernels that try it, one a row of the table below.

`python conformance.py KERNELS.cu` writes the kernels: thread t reads its operands, executes the instruction for every combination of the
row's choices, and writes the results. test_conformance.py compares them, on the emulated GPUs and on a real one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

THREADS = 64
INT = "u16 s16 u32 s32 u64 s64"
HALVES = "f16 f16x2 bf16 bf16x2"
NUMPY = {"f16": np.float16, "f32": np.float32, "f64": np.float64} | {f"{c}{b}": np.dtype(f"{'i' if c == 's' else 'u'}{b // 8}") for c in "usb" for b in (8, 16, 32, 64)}


def bits(kind: str) -> int:
    return 1 if kind == "pred" else 32 if kind.endswith("x2") else 16 if kind == "bf16" else int(kind[1:])


@dataclass
class Row:
    text: str                   # the instruction, with its choices in braces; operands follow as d, a, b, …
    choices: dict[str, list[str]]
    out: str                    # type of the result, and of the operands; may name a choice
    ins: list[str]
    reference: Callable
    tolerance: float = 0        # relative; for approximations
    arch: int = 80
    asm: str = ""               # around the instruction I, where it is not `I %d, %a, %b, …`
    limit: float = np.inf       # of the operands

    def cases(self):
        for values in itertools.product(*self.choices.values()):
            yield dict(zip(self.choices, values))

    def types(self, chosen: dict[str, str]) -> list[str]:
        return [t.format(**chosen) for t in [self.out, *self.ins]]


ROWS: list[Row] = []


def row(text: str, out: str, ins: str, reference: Callable, tolerance: float = 0, arch: int = 80, asm: str = "", limit: float = np.inf, **choices: str) -> None:
    split = {k: [c if c != "-" else "" for c in v.split()] for k, v in choices.items()}
    ROWS.append(Row(text, split, out, ins.split(), reference, tolerance, arch, asm, limit))


# ---- values ----------------------------------------------------------------------------------------------------------------------
def from_bf16(stored: np.ndarray) -> np.ndarray:
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounded once, from float64."""
    values = np.asarray(values, np.float64)
    with np.errstate(all="ignore"):
        step = 2.0 ** np.maximum(np.frexp(values)[1] - 8, -133)
        rounded = np.where(np.isfinite(values), np.rint(values / step) * step, values).astype(np.float32)
    return np.where(np.isnan(values), 0x7FFF, rounded.view(np.uint32) >> 16).astype(np.uint16)


def decode(stored: np.ndarray, kind: str) -> np.ndarray:
    """Bits in u64 as numbers: exact in their own type, f16 and bf16 in float64; pairs with a second axis."""
    if kind == "pred":
        return stored.astype(bool)
    if kind.endswith("x2"):
        return np.stack([decode(stored & np.uint64(0xFFFF), kind[:-2]), decode(stored >> np.uint64(16) & np.uint64(0xFFFF), kind[:-2])], 1)
    if kind == "bf16":
        return from_bf16(stored.astype(np.uint16))
    values = stored.astype(f"u{bits(kind) // 8}").view(NUMPY[kind])
    return values.astype(np.float64) if kind == "f16" else values


def round_to(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as the result type holds them, pairs with a second axis."""
    if kind.endswith("x2"):
        return round_to(values, kind[:-2])
    if kind == "bf16":
        return from_bf16(to_bf16(values))
    if kind in ("f16", "f32", "f64"):
        return np.asarray(values).astype(NUMPY[kind]).astype(np.float64)
    return np.asarray(values).astype(bool if kind == "pred" else NUMPY[kind])


def inputs(kind: str, rng: np.random.Generator, limit: float = np.inf) -> np.ndarray:
    """Bits in u64: the corners of the type, then random ones."""
    n = bits(kind)
    if kind == "pred":
        return rng.integers(0, 2, THREADS, dtype=np.uint64)
    if kind.endswith("x2"):
        return inputs(kind[:-2], rng) | inputs(kind[:-2], rng) << np.uint64(16)
    if kind[0] in "usb" and kind != "bf16":
        corners = [0, 1, 2, 3, (1 << n) - 1, 1 << (n - 1), (1 << (n - 1)) - 1, n, n - 1]
        some = rng.integers(0, 1 << n, THREADS, dtype=np.uint64, endpoint=False) if n < 64 else rng.integers(0, 1 << 63, THREADS, dtype=np.uint64) * np.uint64(2)
        some[20:] = rng.integers(0, min(2 * n, 1 << n), THREADS - 20)  # as positions, lengths and shifts are
        some[: len(corners)] = rng.permutation(np.array(corners, np.uint64))
        return rng.permutation(some)
    values = np.concatenate([rng.standard_normal(24) * 4, 10.0 ** rng.uniform(-4, 4, 24), [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 0.5, 1.5, -2.5, 6e-8, 65504, 3e5, 1e-7, 7, -7]])
    values = rng.permutation(np.where(np.abs(values) <= limit, values, 0.75) if limit < np.inf else values)
    with np.errstate(over="ignore"):
        stored = to_bf16(values) if kind == "bf16" else values.astype(NUMPY[kind]).view(f"u{n // 8}")
    return stored.astype(np.uint64)


# ---- the table -------------------------------------------------------------------------------------------------------------------
def wide(a):
    return a.astype(object)


def cut(values, kind: str):
    """Python integers modulo 2^n."""
    mask = (1 << bits(kind)) - 1
    return np.array([int(v) & mask for v in values], np.uint64).astype(f"u{bits(kind) // 8}").view(NUMPY[kind])


def shift(a, b, left: bool, kind: str):
    amount = [min(int(x), bits(kind)) for x in b]
    return cut([int(v) << s if left else int(v) >> s for v, s in zip(a, amount)], kind)


def bit_list(v, n: int) -> list[int]:
    return [int(v) >> i & 1 for i in range(n)]


def from_bits(each) -> int:
    return sum(b << i for i, b in enumerate(each))


def bfe(v, position, length, kind):
    n, position, length = bits(kind), int(position) & 255, int(length) & 255
    source = bit_list(v, n)
    sign = source[min(position + length - 1, n - 1)] if kind[0] == "s" and length else 0
    return from_bits([(source[position + i] if position + i < n else sign) if i < length else sign for i in range(n)])


def bfi(a, b, position, length, n):
    position, length = int(position) & 255, int(length) & 255
    return from_bits([(int(a) >> (i - position) & 1) if position <= i < position + length else int(b) >> i & 1 for i in range(n)])


def prmt(a, b, pick):
    both, r = int(b) << 32 | int(a), 0
    for i in range(4):
        n = int(pick) >> 4 * i & 15
        byte = both >> 8 * (n & 7) & 255
        r |= ((255 if byte & 128 else 0) if n & 8 else byte) << 8 * i
    return r


def truncated(op, a, b):
    with np.errstate(all="ignore"):
        q = [abs(int(x)) // abs(int(y)) * (1 if (int(x) < 0) == (int(y) < 0) else -1) for x, y in zip(a, b)]
    return q if op == "div" else [int(x) - int(y) * v for x, y, v in zip(a, b, q)]


def each(f, *arrays):
    return [f(*(int(v) for v in values)) for values in zip(*arrays)]


def nonzero(b):
    return np.where(b == 0, b.dtype.type(3), b)


row("{op}.{t}", "{t}", "{t} {t}", lambda c, a, b: a + b if c["op"] == "add" else a - b, op="add sub", t=INT)
row("{op}.sat.s32", "s32", "s32 s32", lambda c, a, b: np.clip(a.astype(np.int64) + (b if c["op"] == "add" else -b.astype(np.int64)), -(2**31), 2**31 - 1), op="add sub")
row("mul.lo.{t}", "{t}", "{t} {t}", lambda c, a, b: a * b, t=INT)
row("mul.hi.{t}", "{t}", "{t} {t}", lambda c, a, b: cut([v >> bits(c["t"]) for v in wide(a) * wide(b)], c["t"]), t=INT)
DOUBLE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
for _t, _w in DOUBLE.items():
    row(f"mul.wide.{_t}", _w, f"{_t} {_t}", lambda c, a, b, w=_w: cut(wide(a) * wide(b), w))
    row(f"mad.wide.{_t}", _w, f"{_t} {_t} {_w}", lambda c, a, b, d, w=_w: cut(wide(a) * wide(b) + wide(d), w))
row("mad.lo.{t}", "{t}", "{t} {t} {t}", lambda c, a, b, d: a * b + d, t=INT)
row("mad.hi.{t}", "{t}", "{t} {t} {t}", lambda c, a, b, d: cut([(x >> 32) + y for x, y in zip(wide(a) * wide(b), wide(d))], c["t"]), t="u32 s32")
row("{op}.{t}", "{t}", "{t} {t}", lambda c, a, b: cut(truncated(c["op"], a, b), c["t"]), op="div rem", t=INT)
row("{op}.{t}", "{t}", "{t}", lambda c, a: np.abs(a) if c["op"] == "abs" else -a, op="abs neg", t="s16 s32 s64")
row("{op}.{t}", "{t}", "{t} {t}", lambda c, a, b: np.minimum(a, b) if c["op"] == "min" else np.maximum(a, b), op="min max", t=INT)
row("{op}.{t}", "u32", "{t}", lambda c, a: each(lambda v: v.bit_count() if c["op"] == "popc" else bits(c["t"]) - v.bit_length(), a), op="popc clz", t="b32 b64")
row("brev.{t}", "{t}", "{t}", lambda c, a: cut(each(lambda v: from_bits(bit_list(v, bits(c["t"]))[::-1]), a), c["t"]), t="b32 b64")
row("bfind.{t}", "u32", "{t}", lambda c, a: cut(each(lambda v: (v if v >= 0 else ~v).bit_length() - 1, a), "u32"), t="u32 s32 u64 s64")
row("bfe.{t}", "{t}", "{t} u32 u32", lambda c, a, p, n: cut([bfe(*v, c["t"]) for v in zip(a, p, n)], c["t"]), t="u32 s32 u64 s64")
row("bfi.{t}", "{t}", "{t} {t} u32 u32", lambda c, a, b, p, n: cut([bfi(*v, bits(c["t"])) for v in zip(a, b, p, n)], c["t"]), t="b32 b64")


def dp4a(c, a, b, d):
    x, y = (np.stack([(v >> np.uint32(8 * i)).astype(np.uint8).view(np.int8 if c[k] == "s32" else np.uint8) for i in range(4)]).astype(np.int64) for v, k in ((a, "x"), (b, "y")))
    return cut((x * y).sum(0) + d.astype(np.int64), "u32")


row("dp4a.{x}.{y}", "u32", "u32 u32 u32", dp4a, x="u32 s32", y="u32 s32")
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
row("{op}.{t}", "{t}", "{t} {t}", lambda c, a, b: LOGIC[c["op"]](a, b), op="and or xor", t="pred b16 b32 b64")
row("not.{t}", "{t}", "{t}", lambda c, a: ~a, t="pred b16 b32 b64")
row("shl.{t}", "{t}", "{t} u32", lambda c, a, b: shift(a, b, True, c["t"]), t="b16 b32 b64")
row("shr.{t}", "{t}", "{t} u32", lambda c, a, b: shift(a, b, False, c["t"]), t="b16 b32 b64 u16 u32 u64 s16 s32 s64")


def shf(c, a, b, n):
    def one(a, b, n):
        n = n & 31 if c["m"] == "wrap" else min(n, 32)
        both = b << 32 | a
        return both << n >> 32 if c["d"] == "l" else both >> n

    return cut(each(one, a, b, n), "u32")


row("shf.{d}.{m}.b32", "u32", "u32 u32 u32", shf, d="l r", m="wrap clamp")
row("lop3.b32", "u32", "u32 u32 u32", lambda c, a, b, d: a & b | ~a & d, asm="I %d, %a, %b, %c, 0xca;")
row("prmt.b32", "u32", "u32 u32 u32", lambda c, a, b, s: cut([prmt(*v) for v in zip(a, b, s)], "u32"))
row("selp.{t}", "{t}", "{t} {t} pred", lambda c, a, b, p: np.where(p, a, b), t="b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64")

FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}


def exact(f, *values):
    """In higher precision than the type's: the caller rounds once."""
    with np.errstate(all="ignore"):
        return f(*(v.astype(np.longdouble) for v in values))


def flush(v):
    return np.where(np.abs(v) < 2.0**-126, np.copysign(v.dtype.type(0), v), v)


def clamp(v):
    return np.where(np.isnan(v), 0, np.clip(v, 0, 1))


row("{op}{r}.{t}", "{t}", "{t} {t}", lambda c, a, b: exact(FLOAT[c["op"]], a, b), op="add sub mul", r="- .rn", t="f32 f64")
row("{op}{r}.ftz.f32", "f32", "f32 f32", lambda c, a, b: flush(exact(FLOAT[c["op"]], flush(a), flush(b))), op="add sub mul", r="- .rn")
row("{op}.sat.f32", "f32", "f32 f32", lambda c, a, b: clamp(exact(FLOAT[c["op"]], a, b)), op="add mul")
row("fma.rn.{t}", "{t}", "{t} {t} {t}", lambda c, a, b, d: exact(lambda x, y, z: x * y + z, a, b, d), 3e-7, t="f32 f64")
row("fma.rn.{m}.f32", "f32", "f32 f32 f32", lambda c, a, b, d: (flush if c["m"] == "ftz" else clamp)(exact(lambda x, y, z: x * y + z, *((flush(v) if c["m"] == "ftz" else v) for v in (a, b, d)))), 3e-7, m="ftz sat")
row("div.rn.{t}", "{t}", "{t} {t}", lambda c, a, b: exact(np.divide, a, b), t="f32 f64")
row("div.{m}.f32", "f32", "f32 f32", lambda c, a, b: exact(np.divide, a, b), 3e-7, m="full approx", limit=1e30)
APPROXIMATE = {"rcp": lambda v: 1 / v, "sqrt": np.sqrt, "rsqrt": lambda v: 1 / np.sqrt(v), "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh}
row("{op}.{m}.f32", "f32", "f32", lambda c, a: exact(APPROXIMATE[c["op"]], a), 3e-7, op="rcp sqrt", m="rn approx")
row("rcp.{m}.f64", "f64", "f64", lambda c, a: exact(APPROXIMATE["rcp"], a), 1e-5, m="rn approx.ftz")
row("sqrt.rn.f64", "f64", "f64", lambda c, a: exact(np.sqrt, a))
row("{op}.approx{m}.f32", "f32", "f32", lambda c, a: exact(APPROXIMATE[c["op"]], a), 4e-6, op="rsqrt ex2 lg2", m="- .ftz")
row("{op}.approx.ftz.f32", "f32", "f32", lambda c, a: exact(APPROXIMATE[c["op"]], a), 3e-7, op="rcp sqrt")
row("{op}.approx{m}.f32", "f32", "f32", lambda c, a: exact(APPROXIMATE[c["op"]], a), 4e-6, op="sin cos", m="- .ftz", limit=3)
row("tanh.approx.f32", "f32", "f32", lambda c, a: exact(np.tanh, a), 2e-3)
row("{op}.approx.{t}", "{t}", "{t}", lambda c, a: exact(APPROXIMATE[c["op"]], a), 4e-3, op="ex2 tanh", t="f16 f16x2")
row("{op}.{t}", "{t}", "{t} {t}", lambda c, a, b: exact(FLOAT[c["op"]], a, b), op="min max", t="f32 f64")
NAN = {"min": np.minimum, "max": np.maximum}
row("{op}.NaN.f32", "f32", "f32 f32", lambda c, a, b: exact(NAN[c["op"]], a, b), op="min max")
row("{op}.ftz.f32", "f32", "f32 f32", lambda c, a, b: exact(FLOAT[c["op"]], flush(a), flush(b)), op="min max")
row("{op}.{t}", "{t}", "{t}", lambda c, a: np.abs(a) if c["op"] == "abs" else -a, op="abs neg", t=f"f32 f64 {HALVES}")
row("{op}.ftz.f32", "f32", "f32", lambda c, a: flush(np.abs(a) if c["op"] == "abs" else -a), op="abs neg")
row("copysign.f32", "f32", "f32 f32", lambda c, a, b: np.copysign(b, a))
row("{op}{r}.{t}", "{t}", "{t} {t}", lambda c, a, b: exact(FLOAT[c["op"]], a, b), op="add sub mul", r="- .rn", t="f16 f16x2")
row("{op}{r}.{t}", "{t}", "{t} {t}", lambda c, a, b: exact(FLOAT[c["op"]], a, b), arch=90, op="add sub mul", r="- .rn", t="bf16 bf16x2")
row("fma.rn.{t}", "{t}", "{t} {t} {t}", lambda c, a, b, d: exact(lambda x, y, z: x * y + z, a, b, d), t=HALVES)
row("fma.rn.relu.{t}", "{t}", "{t} {t} {t}", lambda c, a, b, d: exact(lambda x, y, z: np.where(np.isnan(x * y + z), np.nan, np.maximum(x * y + z, 0)), a, b, d), t=HALVES)
row("{op}.{t}", "{t}", "{t} {t}", lambda c, a, b: exact(FLOAT[c["op"]], a, b), op="min max", t=HALVES)
row("{op}.NaN.{t}", "{t}", "{t} {t}", lambda c, a, b: exact(NAN[c["op"]], a, b), op="min max", t=HALVES)

# ---- conversions -----------------------------------------------------------------------------------------------------------------
ALL_INT = "u8 s8 u16 s16 u32 s32 u64 s64"
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_int(values, kind: str):
    """Saturates; NaN is 0, and 2^63 for 64 bits."""
    low, high = (0, 2 ** bits(kind) - 1) if kind[0] == "u" else (-(2 ** (bits(kind) - 1)), 2 ** (bits(kind) - 1) - 1)
    nan = (1 << 63) if bits(kind) == 64 else 0
    return cut([nan if np.isnan(v) else low if v < low else high if v > high else int(v) for v in values], kind)


def saturated(c, a):
    low, high = (0, 2 ** bits(c["d"]) - 1) if c["d"][0] == "u" else (-(2 ** (bits(c["d"]) - 1)), 2 ** (bits(c["d"]) - 1) - 1)
    return cut([min(max(int(v), low), high) for v in a], c["d"])


def relu(v):
    return np.where(np.isnan(v), np.nan, np.maximum(v, 0))


row("cvt.{d}.{s}", "{d}", "{s}", lambda c, a: cut(a, c["d"]), d=ALL_INT, s=ALL_INT)
for _d, _s in (("u8 u16 u32 u64", "s8 s16 s32 s64"), ("s8 s16 s32", "u32 u64 s64"), ("s64", "u64"), ("s8", "u8 u16")):  # where it can matter
    row("cvt.sat.{d}.{s}", "{d}", "{s}", saturated, d=_d, s=_s)
row("cvt.rn.{d}.{s}", "{d}", "{s}", lambda c, a: a.astype(np.float64) if c["d"] == "f16" else a.astype(NUMPY[c["d"]]), d="f16 f32 f64", s=ALL_INT)
row("cvt.rn.bf16.{s}", "bf16", "{s}", lambda c, a: a.astype(np.float64), arch=90, s="u16 s16 u32 s32")
row("cvt.{r}.{d}.{s}", "{d}", "{s}", lambda c, a: to_int(WHOLE[c["r"]](a), c["d"]), r="rni rzi rmi rpi", d=ALL_INT, s="f16 f32 f64")
row("cvt.{r}.ftz.{d}.f32", "{d}", "f32", lambda c, a: to_int(WHOLE[c["r"]](flush(a)), c["d"]), r="rni rzi rmi rpi", d="u32 s32 u64 s64")
row("cvt.{r}.sat.{d}.f32", "{d}", "f32", lambda c, a: to_int(WHOLE[c["r"]](a), c["d"]), r="rni rzi", d="u8 s8 u16 s16")
row("cvt.{r}.{t}.{t}", "{t}", "{t}", lambda c, a: WHOLE[c["r"]](a), r="rni rzi rmi rpi", t="f32 f16 f64")
row("cvt{m}.f32.f16", "f32", "f16", lambda c, a: a, m="- .ftz")
row("cvt.f32.bf16", "f32", "bf16", lambda c, a: a, arch=90)
row("cvt.f64.{s}", "f64", "{s}", lambda c, a: a, s="f16 f32")
row("cvt.rn.{d}.f32", "{d}", "f32", lambda c, a: a, d="f16 bf16")
row("cvt.rn.relu.{d}.f32", "{d}", "f32", lambda c, a: relu(a), d="f16 bf16")
row("cvt.rn.{d}.f64", "{d}", "f64", lambda c, a: a, d="f16 f32")
row("cvt.rz.f16.f32", "f16", "f32", lambda c, a: np.where(np.abs(a.astype(np.float16)) > np.abs(a), np.nextafter(a.astype(np.float16), np.float16(0)), a.astype(np.float16)))
row("cvt.rn.{d}x2.f32", "{d}x2", "f32 f32", lambda c, a, b: np.stack([b, a], 1), d="f16 bf16")
row("cvt.rn.relu.{d}x2.f32", "{d}x2", "f32 f32", lambda c, a, b: relu(np.stack([b, a], 1)), d="f16 bf16")
row("cvt.sat.f32.f32", "f32", "f32", lambda c, a: clamp(a))

# ---- comparisons and moves -------------------------------------------------------------------------------------------------------
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def setp(c, a, b, p=None):
    """Bit 0 the predicate, bit 1 the second one."""
    op = c["c"]
    unordered = np.isnan(a) | np.isnan(b) if c["t"] in ("f16", "bf16", "f32", "f64") else np.zeros(THREADS, bool)
    t = ~unordered if op == "num" else unordered if op == "nan" else COMPARE[op[:2]](a, b) | unordered if len(op) == 3 else COMPARE[op](a, b) & ~unordered
    q = ~t
    if p is not None:
        t, q = LOGIC[c["b"]](t, p), LOGIC[c["b"]](q, p)
    return t.astype(np.uint32) | q.astype(np.uint32) << np.uint32(1)


_SETP = "{{.reg .pred p, q; I p|q, %a, %b{}; selp.u32 %d, 1, 0, p; @q or.b32 %d, %d, 2;}}"
_BOOL = _SETP.replace("I p", "setp.ne.u32 r, %c, 0; I p").replace("p, q;", "p, q, r;").format(", r")
for _t, _ops in (("b16 b32 b64", "eq ne"), ("u16 u32 u64", "eq ne lt le gt ge lo ls hi hs"), ("s16 s32 s64", "eq ne lt le gt ge"), ("f32 f64", "eq ne lt le gt ge equ neu ltu leu gtu geu num nan")):
    row("setp.{c}.{t}", "u32", "{t} {t}", setp, asm=_SETP.format(""), c=_ops, t=_t)
for _t in ("f16", "bf16"):
    row("setp.{c}.{t}", "pred", "{t} {t}", lambda c, a, b: setp(c, a, b) & np.uint32(1), arch=90 if _t == "bf16" else 80, c="lt neu eq nan", t=_t)
row("setp.{c}.{b}.{t}", "u32", "{t} {t} u32", lambda c, a, b, p: setp(c, a, b, p != 0), asm=_BOOL, c="lt ne", b="and or xor", t="s32 f32")
row("mov.{t}", "{t}", "{t}", lambda c, a: a, t="pred b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64")
row("mov.b32", "b32", "b32", lambda c, a: a >> np.uint32(16) | a << np.uint32(16), asm="{.reg .b16 x, y; I {x, y}, %a; I %d, {y, x};}")
row("mov.b64", "b64", "b64", lambda c, a: a >> np.uint64(32) | a << np.uint64(32), asm="{.reg .b32 x, y; I {x, y}, %a; I %d, {y, x};}")
row("mov.b128", "b64", "b64 b64", lambda c, a, b: a ^ (b + np.uint64(1)), asm="{.reg .b128 q; .reg .b64 x, y; I q, {%a, %b}; I {x, y}, q; add.u64 y, y, 1; xor.b64 %d, x, y;}")


# ---- the kernels -----------------------------------------------------------------------------------------------------------------
NAMES = "dabce"  # the result and the operands, as forms.py calls them


def assembly(r: Row, chosen: dict[str, str]) -> str:
    """The asm statement: predicates come and go as numbers."""
    types = r.types(chosen)
    names = NAMES[: len(types)]
    register = {n: f"%{i}" for i, n in enumerate(names)}
    before = after = ""
    for n, t in zip(names, types):
        if t == "pred":
            before += f".reg .pred p{n}; " + ("" if n == "d" else f"setp.ne.u32 p{n}, {register[n]}, 0; ")
            after += f" selp.u32 {register[n]}, 1, 0, p{n};" if n == "d" else ""
            register[n] = f"p{n}"
    text = (r.asm or "I " + ", ".join(f"%{n}" for n in names) + ";").replace("I ", r.text.format(**chosen) + " ")
    for n in names:
        text = text.replace(f"%{n}", register[n])
    text = f"{{{before}{text}{after}}}"
    kind = {t: ("h", "uint16_t") if bits(t) == 16 else ("l", "uint64_t") if bits(t) == 64 else ("r", "uint32_t") for t in types}
    operands = ", ".join(f'"{kind[t][0]}"({kind[t][1]}({n}))' for n, t in zip(names[1:], types[1:]))
    return f'{kind[types[0]][1]} d; asm volatile("{text}" : "={kind[types[0]][0]}"(d) : {operands});'


def source() -> str:
    out = ['// Made by conformance.py.\n#include <cstdint>\n#include <cuda_runtime.h>']
    for i, r in enumerate(ROWS):
        body = []
        for k, chosen in enumerate(r.cases()):
            loads = "".join(f"const uint64_t {n} = in[{(4 * k + j) * THREADS} + t]; " for j, n in enumerate(NAMES[1 : 1 + len(r.ins)]))
            body.append(f"  {{ {loads}{assembly(r, chosen)} out[{k * THREADS} + t] = d; }}")
        guard = ("#if __CUDA_ARCH__ >= 900\n", "\n#endif") if r.arch == 90 else ("", "")
        code = guard[0] + "\n".join(["  const int t = threadIdx.x;", *body]) + guard[1]
        out.append(f"__global__ void row{i}(const uint64_t* in, uint64_t* out) {{\n{code}\n}}")
    cases = " ".join(f"case {i}: row{i}<<<1, {THREADS}, 0, cudaStream_t(stream)>>>(in, out); break;" for i in range(len(ROWS)))
    out.append(f'extern "C" __attribute__((visibility("default"))) int run_row(int i, const uint64_t* in, uint64_t* out, void* stream) {{\n  switch (i) {{ {cases} }}\n  return cudaGetLastError();\n}}')
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source())
