"""The opcode forms that the translator knows. A form is a pattern of opcode, modifiers and types, and C++ for it.

Patterns are written as PTX writes them; `(a|b)` is a choice, `(.x)?` may be absent. Everything outside of the patterns is refused, so a
modifier that nobody has thought of cannot be dropped in silence. In the C++, `d` is the destination and `a`, `b`, `c`, `e` are the operands
after it, read as the last type of the pattern or as the type behind a colon; `{1}`, `{2}` … are the choices.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ptx import PtxError


class Form:
    def __init__(self, pattern: str, code: str | Callable, operands: int | None):
        self.pattern, self.code, self.operands = pattern, code, operands
        self.choices = [(m[1].split("|"), bool(m[2])) for m in re.finditer(r"\(([^()]*)\)(\??)", pattern)]
        self.regex = re.compile(pattern.replace(".", r"\."))
        self.seen: list[set[str]] = [set() for _ in self.choices]
        self.used = False

    def match(self, op: str) -> tuple[str, ...] | None:
        m = self.regex.fullmatch(op)
        return m and tuple(g or "" for g in m.groups())

    def note(self, groups: tuple[str, ...]) -> None:
        self.used = True
        for seen, group in zip(self.seen, groups):
            seen.add(group)

    def missing(self) -> list[str]:
        """Alternatives that no instruction has used so far."""
        if not self.used:
            return [self.pattern]
        return [f"{self.pattern}: {a}" for seen, (all_of_it, _) in zip(self.seen, self.choices) for a in all_of_it if a not in seen]


FORMS: dict[str, list[Form]] = {}  # by the first word of the opcode


def form(pattern: str, code: str | Callable, operands: int | None = None) -> None:
    """`operands`: how many there must be, unless the code says so or counts for itself."""
    f = Form(pattern, code, operands)
    for word in re.fullmatch(r"\(([^()]*)\).*|(\w+).*", pattern).groups():
        for w in (word or "").split("|"):
            if w:
                FORMS.setdefault(w.split(".")[0], []).append(f)


def all_forms() -> list[Form]:
    unique = {id(f): f for forms in FORMS.values() for f in forms}
    return list(unique.values())


def find(op: str) -> tuple[Form, tuple[str, ...]]:
    found = [(f, g) for f in FORMS.get(op.split(".")[0], []) if (g := f.match(op)) is not None]
    if len(found) != 1:
        raise PtxError(f"{'unknown' if not found else 'ambiguous'} opcode form: {op}")
    return found[0]


# ---- arithmetic ------------------------------------------------------------------------------------------------------------------
INT = "u16|s16|u32|s32|u64|s64"
HALVES = "f16|f16x2|bf16|bf16x2"

form(f"(add|sub).({INT})", "d = {1}(a, b)")
form("(add|sub).sat.s32", "d = {1}_sat(a:s32, b:s32)")
form(f"mul.lo.({INT})", "d = mul(a, b)")
form(f"mul.hi.({INT})", "d = mul_hi(a, b)")
form("mul.wide.(u16|s16|u32|s32)", "d = mul_wide(a, b)")
form(f"mad.lo.({INT})", "d = mad_lo(a, b, c)")
form("mad.hi.(u32|s32)", "d = mad_hi(a, b, c)")
form("mad.wide.(u16|s16|u32|s32)", "d = mad_wide<{T}>(a, b, c:Wide<{T}>)")
form(f"(div|rem).({INT})", "d = {1}(a, b)")
form("(abs|neg).(s16|s32|s64)", "d = {1}(a)")
form(f"(min|max).({INT})", "d = {1}(a, b)")
form("(popc|clz|brev).(b32|b64)", "d = {1}(a)")
form("bfind.(u32|s32|u64|s64)", "d = bfind(a)")
form("bfe.(u32|s32|u64|s64)", "d = bfe(a, b:u32, c:u32)")
form("bfi.(b32|b64)", "d = bfi(a, b, c:u32, e:u32)")
form("dp4a.(u32|s32).(u32|s32)", "d = dp4a<{1}, {2}>(a:u32, b:u32, c:u32)")
form("(and|or|xor).(pred|b16|b32|b64)", "d = bit_{1}(a, b)")
form("not.(pred|b16|b32|b64)", "d = bit_not(a)")
form("shl.(b16|b32|b64)", "d = shl(a, b:u32)")
form("shr.(b16|b32|b64|u16|u32|u64|s16|s32|s64)", "d = shr(a, b:u32)")
form("shf.(l|r).(wrap|clamp).b32", "d = shf_{1}_{2}(a:u32, b:u32, c:u32)")
form("lop3.b32", "d = lop3(a:u32, b:u32, c:u32, e:u32)")
form("prmt.b32", "d = prmt(a:u32, b:u32, c:u32)")
form("selp.(b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64)", "d = c:pred ? a : b")

form("(add|sub|mul)(.rn)?.(f32|f64)", "d = {1}(a, b)")
form("(add|sub|mul)(.rn)?.ftz.f32", "d = ftz({1}(ftz(a:f32), ftz(b:f32)))")
form("(add|mul).sat.f32", "d = saturate({1}(a:f32, b:f32))")
form("fma.rn.(f32|f64)", "d = fma(a, b, c)")
form("fma.rn.ftz.f32", "d = ftz(fma(ftz(a:f32), ftz(b:f32), ftz(c:f32)))")
form("fma.rn.sat.f32", "d = saturate(fma(a:f32, b:f32, c:f32))")
form("div.rn.(f32|f64)", "d = div(a, b)")
form("div.(full|approx).f32", "d = div(a:f32, b:f32)")
form("rcp.(rn|approx).f32", "d = rcp(a:f32)")
form("rcp.(rn.f64|approx.ftz.f64)", "d = rcp(a:f64)")
form("sqrt.(rn|approx).f32", "d = sqrt(a:f32)")
form("sqrt.rn.f64", "d = sqrt(a:f64)")
form("(rsqrt|ex2|lg2|sin|cos).approx.f32", "d = {1}(a:f32)")
form("(rcp|sqrt|rsqrt|ex2|lg2|sin|cos).approx.ftz.f32", "d = ftz({1}(ftz(a:f32)))")
form("tanh.approx.f32", "d = tanh(a:f32)")
form("(ex2|tanh).approx.(f16|f16x2)", "d = {1}(a)")
form("(min|max).(f32|f64)", "d = {1}(a, b)")
form("(min|max).NaN.f32", "d = {1}_nan(a:f32, b:f32)")
form("(min|max).ftz.f32", "d = ftz({1}(ftz(a:f32), ftz(b:f32)))")
form("(abs|neg).(f32|f64)", "d = {1}(a)")
form("(abs|neg).ftz.f32", "d = ftz({1}(a:f32))")
form("copysign.f32", "d = copysign(a:f32, b:f32)")

form("(add|sub|mul)(.rn)?.(f16|f16x2)", "d = {1}(a, b)")
form("(add|sub|mul)(.rn)?.(bf16|bf16x2)", "d = {1}(a, b)")
form(f"fma.rn.({HALVES})", "d = fma(a, b, c)")
form(f"fma.rn.relu.({HALVES})", "d = relu(fma(a, b, c))")
form(f"(min|max).({HALVES})", "d = {1}(a, b)")
form(f"(min|max).NaN.({HALVES})", "d = {1}_nan(a, b)")
form(f"(abs|neg).({HALVES})", "d = {1}(a)")

# ---- conversions -----------------------------------------------------------------------------------------------------------------
ALL_INT = "u8|s8|u16|s16|u32|s32|u64|s64"
ROUND = {"rni": "near", "rzi": "zero", "rmi": "down", "rpi": "up"}


def _cvt_int(g, ins) -> str:
    return f"d = convert{'_sat' if g[0] else ''}<{g[1]}>(a)"


form(f"cvt(.sat)?.({ALL_INT}).({ALL_INT})", _cvt_int)
form(f"cvt.rn.(f16|f32|f64).({ALL_INT})", "d = from_int<{1}>(a)")
form("cvt.rn.bf16.(u16|s16|u32|s32)", "d = from_int<bf16>(a)")
form("cvt.(rni|rzi|rmi|rpi).(u8|s8|u16|s16|u32|s32|u64|s64).(f16|f32|f64)", lambda g, ins: f"d = to_int<{g[1]}, Round::{ROUND[g[0]]}>(a)")
form("cvt.(rni|rzi|rmi|rpi).ftz.(u32|s32|u64|s64).f32", lambda g, ins: f"d = to_int<{g[1]}, Round::{ROUND[g[0]]}>(ftz(a:f32))")
form("cvt.(rni|rzi).sat.(u8|s8|u16|s16).f32", lambda g, ins: f"d = to_int<{g[1]}, Round::{ROUND[g[0]]}>(a:f32)")
form("cvt.(rni|rzi|rmi|rpi).(f32.f32|f16.f16|f64.f64)", lambda g, ins: f"d = to_whole<{g[1][:3]}, Round::{ROUND[g[0]]}>(a:{g[1][:3]})")
form("cvt(.ftz)?.f32.(f16|bf16)", "d = to_float<f32>(a)")
form("cvt.f64.(f16|f32)", "d = to_float<f64>(a)")
form("cvt.rn.(f16|bf16).f32", "d = to_float<{1}>(a:f32)")
form("cvt.rn.relu.(f16|bf16).f32", "d = relu(to_float<{1}>(a:f32))")
form("cvt.rn.(f16|f32).f64", "d = to_float<{1}>(a:f64)")
form("cvt.rz.f16.f32", "d = to_f16_zero(a:f32)")
form("cvt.rn.(f16|bf16)x2.f32", "d = pack<{1}>(a:f32, b:f32)")
form("cvt.rn.relu.(f16|bf16)x2.f32", "d = relu(pack<{1}>(a:f32, b:f32))")
form("cvt.sat.f32.f32", "d = saturate(a:f32)")

# ---- comparisons -----------------------------------------------------------------------------------------------------------------
INT_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _setp(g, ins) -> str:
    """setp.CMP.BOOL.type p|q, a, b, c: p = cmp BOOL c, q = !cmp BOOL c."""
    compare, boolean, kind = g[0], g[1], g[2]
    ins.expect(4 if boolean else 3)
    targets = [t.strip() for t in ins.operands[0].split("|")]
    kind = kind.replace("b", "u", 1) if kind[0] == "b" and kind != "bf16" else kind
    test = f"{INT_COMPARE.get(compare, compare)}({ins.value(1, kind)}, {ins.value(2, kind)})"
    with_c = {"": "{}", ".and": "({} && C)", ".or": "({} || C)", ".xor": "({} != C)"}[boolean]
    with_c = with_c.replace("C", ins.value(3, "pred")) if boolean else with_c
    sets = [f"{ins.register(t)} = {with_c.format(v)};" for t, v in zip(targets, ("t", "!t")) if t != "_"]
    return f"const bool t = {test}; " + " ".join(sets)


form("setp.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)(.and|.or|.xor)?.(b16|b32|b64|u16|u32|u64|s16|s32|s64)", _setp)
form("setp.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(.and|.or|.xor)?.(f16|bf16|f32|f64)", _setp)


# ---- moves -----------------------------------------------------------------------------------------------------------------------
def _mov(g, ins) -> str:
    """Also between a register and the parts of it: mov.b32 {lo, hi}, r."""
    ins.expect(2)
    d, s = ins.operands
    bits = ins.bits(g[0])
    if d.startswith("{"):
        parts = ins.vector(0)
        width = bits // len(parts)
        sets = " ".join(f"{ins.register(p)} = u{width}(v >> {i * width});" for i, p in enumerate(parts) if p != "_")
        return f"const b{bits} v = {ins.value(1, f'b{bits}')}; {sets}"
    if s.startswith("{"):
        parts = ins.vector(1)
        width = bits // len(parts)
        return ins.put(0, " | ".join(f"b{bits}({ins.value_of(p, f'u{width}')}) << {i * width}" for i, p in enumerate(parts)))
    return ins.put(0, ins.value(1, g[0]))


form("mov.(pred|b16|b32|b64|b128|u16|u32|u64|s16|s32|s64|f32|f64)", _mov)
