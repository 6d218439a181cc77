"""Conformance of the forms that touch memory or other threads: a kernel each, and what it must leave in `out`.

A kernel has 64 threads (or what `threads` says), `in` and `out` of 4096 u64, 8 KiB of shared memory at `s` (address S), and its thread t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from conformance import bits, from_bf16, round_to, to_bf16

WORDS = 4096
TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64".split()


@dataclass
class Kernel:
    name: str
    body: str
    expected: Callable   # of the input, u64[WORDS]: what out must begin with
    arch: int
    threads: int


KERNELS: list[Kernel] = []


def kernel(name: str, body: str, expected: Callable, arch: int = 80, threads: int = 64) -> None:
    KERNELS.append(Kernel(name, body, expected, arch, threads))


def asm(text: str, outs: str = "", ins: str = "") -> str:
    return f'asm volatile("{text}" : {outs} : {ins} : "memory");\n'


def put(c: str) -> str:
    return f'"={c}"(d)'


def take(c: str, value: str) -> str:
    return f'"{c}"({value})'


def kept(ctype: str, statement: str, slot: int) -> str:
    return f"{{ {ctype} d; {statement} out[{64 * slot} + t] = d; }}\n"


def constraint(kind: str) -> tuple[str, str]:
    return ("h", "uint16_t") if bits(kind) == 16 else ("l", "uint64_t") if bits(kind) == 64 else ("r", "uint32_t")


def extended(values, kind: str):
    """As a register holds it after a load: a byte in 32 bits, extended by its sign if it has one."""
    v = values & np.uint64((1 << bits(kind)) - 1)
    return v.astype(np.uint8).view(np.int8).astype(np.int32).view(np.uint32).astype(np.uint64) if kind == "s8" else v


ADDRESS = {"": ("l", "out + 2048 + 4 * t"), ".global": ("l", "out + 2048 + 4 * t"), ".shared": ("r", "S + 32 * t"), ".shared::cta": ("r", "S + 32 * t"), ".shared::cluster": ("r", "S + 32 * t")}


def round_trip(space: str, kind: str, store: str = "", load: str = "", slot: int = 0, load_space: str | None = None) -> str:
    """Store, load, and put into out what came back."""
    c, ctype = constraint(kind)
    a, where = ADDRESS[space]
    text = f"st{store}{space}.{kind} [%1], %2; ld{load}{space if load_space is None else load_space}.{kind} %0, [%1];"
    return kept(ctype, asm(text, put(c), take(a, where) + ", " + take(c, f"{ctype}(in[t])")), slot)


for _space in ("", ".global", ".shared"):
    kernel(f"ld st {_space} of each type", "".join(round_trip(_space, k, slot=i) for i, k in enumerate(TYPES)), lambda x: np.concatenate([extended(x[:64], k) for k in TYPES]))
_orders = [(".volatile", ".volatile"), (".relaxed.gpu", ".relaxed.gpu"), (".relaxed.sys", ".relaxed.sys"), (".release.gpu", ".acquire.gpu"), (".release.sys", ".acquire.sys")]
kernel("ld st with an order", "".join(round_trip(".global", "b32", st, ld, i) for i, (st, ld) in enumerate(_orders)), lambda x: np.tile(x[:64] & np.uint64(0xFFFFFFFF), 5))
kernel("ld st shared::", round_trip(".shared::cta", "b32") + "__syncthreads();" + round_trip(".shared::cluster", "b32", slot=1), lambda x: np.tile(x[:64] & np.uint64(0xFFFFFFFF), 2), arch=90)
_hints = [(".cg", ".cg"), (".cs", ".cs"), ("", ".ca"), ("", ".L1::no_allocate")]
kernel("ld st with a hint, of each type", "".join(round_trip(".global", k, ".cs", ".cs", i) for i, k in enumerate(TYPES)).replace(".cs.global", ".global.cs"), lambda x: np.concatenate([extended(x[:64], k) for k in TYPES]))
_hinted = "".join(
    "{ uint32_t d; " + asm(f"st.global{st}.b32 [%1], %2; ld.global{ld}.b32 %0, [%1];", '"=r"(d)', '"l"(out + 2048 + 4 * t), "r"(uint32_t(in[t]))') + f"out[{64 * i} + t] = d; }}"
    for i, (st, ld) in enumerate(_hints)
)
kernel("ld st with cache hints", _hinted, lambda x: np.tile(x[:64] & np.uint64(0xFFFFFFFF), 4))


def vectors(space: str, n: int, st: str = "", ld: str = "") -> str:
    regs = [f"x{i}" for i in range(n)]
    a, where = ADDRESS[space]
    text = f"{{.reg .b32 {', '.join(regs)}; st{space}{st}.v{n}.b32 [%1], {{{', '.join(['%2', '%3'] * (n // 2))}}}; ld{space}{ld}.v{n}.b32 {{{', '.join(regs)}}}, [%1]; "
    text += " ".join(f"mad.lo.u32 {r}, {r}, {2 * i + 1}, 7;" for i, r in enumerate(regs)) + f" add.u32 %0, x0, x1;{' add.u32 %0, %0, x2; add.u32 %0, %0, x3;' if n == 4 else ''}}}"
    return asm(text, put("r"), take(a, where) + ', "r"(uint32_t(in[t])), "r"(uint32_t(in[64 + t]))')


def vector_sum(x, n: int):
    a, b = x[:64].astype(np.uint32), x[64:128].astype(np.uint32)
    total = sum((v * np.uint32(2 * i + 1) + np.uint32(7) for i, v in enumerate([a, b] * (n // 2))), np.uint32(0) * a)
    return total.astype(np.uint64)


_plain = [("", 2, "", ""), ("", 4, "", ""), (".global", 2, "", ""), (".shared", 4, "", ""), (".global", 2, ".cs", ".cs"), (".global", 4, ".cs", ".cs")]
kernel("vectors", "uint32_t d;\n" + "".join(vectors(*v) + f"out[{64 * i} + t] = d; __syncthreads();\n" for i, v in enumerate(_plain)), lambda x: np.concatenate([vector_sum(x, v[1]) for v in _plain]))


def local(kind: str, slot: int) -> str:
    c, ctype = constraint(kind)
    text = f"{{.local .align 16 .b8 m[16]; st.local.{kind} [m], %1; ld.local.{kind} %0, [m];}}"
    return kept(ctype, asm(text, put(c), take(c, f"{ctype}(in[t])")), slot)


kernel("local memory", "".join(local(k, i) for i, k in enumerate(TYPES)), lambda x: np.concatenate([extended(x[:64], k) for k in TYPES]))
_local_vectors = "".join(
    asm(f"{{.local .align 16 .b8 m[16]; .reg .b32 p, q, r, s; st.local.v{n}.b32 [m], {{{', '.join(['%1', '%2'] * (n // 2))}}}; ld.local.v{n}.b32 {{{', '.join('pqrs'[:n])}}}, [m]; sub.u32 %0, {'pqrs'[n - 2]}, {'pqrs'[n - 1]};}}", '"=r"(d)', '"r"(uint32_t(in[t])), "r"(uint32_t(in[64 + t]))')
    + f"out[{64 * i} + t] = d;\n"
    for i, n in enumerate((2, 4))
)
kernel("local vectors", "uint32_t d;\n" + _local_vectors, lambda x: np.tile((x[:64].astype(np.uint32) - x[64:128].astype(np.uint32)).astype(np.uint64), 2))


def read_only(kind: str, hint: str, slot: int) -> str:
    c, ctype = constraint(kind)
    return kept(ctype, asm(f"ld.global.nc{hint}.{kind} %0, [%1];", put(c), take("l", "in + t")), slot)


kernel("ld.global.nc", "".join(read_only(k, "", i) for i, k in enumerate(TYPES)), lambda x: np.concatenate([extended(x[:64], k) for k in TYPES]))
_nc = [".L1::no_allocate", ".L1::evict_first", ".L2::128B", ".L2::256B"]
kernel("ld.global.nc with hints", "".join(read_only("b64", h, i) for i, h in enumerate(_nc)), lambda x: np.tile(x[:64], 4))
_nc_vectors = "uint64_t a, b; uint32_t c[4];\n" + asm("ld.global.nc.v2.b64 {%0, %1}, [%2];", '"=l"(a), "=l"(b)', '"l"(in + 2 * t)') + asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];", '"=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])', '"l"(in + 2 * t)')
kernel("ld.global.nc vectors", _nc_vectors + "out[t] = a - b; out[64 + t] = c[1] - c[2];", lambda x: np.concatenate([x[:128:2] - x[1:128:2], ((x[:128:2] >> np.uint64(32)).astype(np.uint32) - x[1:128:2].astype(np.uint32)).astype(np.uint64)]))

_spaces = "uint32_t p;\n" + "".join(
    asm(text, '"=r"(p)', ins) + f"out[{64 * i} + t] = p;\n"
    for i, (text, ins) in enumerate(
        [
            ("{.reg .pred q; .reg .b64 a; cvta.shared.u64 a, %1; isspacep.shared q, a; selp.u32 %0, 1, 0, q;}", '"l"(uint64_t(S))'),
            ("{.reg .pred q; .reg .b64 a; cvta.shared.u64 a, %1; isspacep.global q, a; selp.u32 %0, 1, 0, q;}", '"l"(uint64_t(S))'),
            ("{.reg .pred q; isspacep.global q, %1; selp.u32 %0, 1, 0, q;}", '"l"(out)'),
            ("{.reg .pred q; .reg .b64 a; .local .b8 m[4]; mov.u64 a, m; cvta.local.u64 a, a; isspacep.local q, a; cvta.to.local.u64 a, a; st.local.u32 [a], 5; selp.u32 %0, 1, 0, q;}", '"l"(out)'),
            ("{.reg .b64 a, b; cvta.shared.u64 a, %1; cvta.to.shared.u64 b, a; cvt.u32.u64 %0, b; sub.u32 %0, %0, %2;}", '"l"(uint64_t(S + 40)), "r"(S)'),
            ("{.reg .b64 a, b; cvta.to.global.u64 a, %1; cvta.global.u64 b, a; ld.global.b32 %0, [a]; ld.b32 %0, [b];}", '"l"(in)'),
            ("{.reg .b64 a; cvta.to.const.u64 a, %1; ld.const.b32 %0, [a]; cvta.const.u64 a, a; ld.u32 %0, [a];}", '"l"(constants + 1)'),
        ]
    )
)
kernel("state spaces", _spaces, lambda x: np.repeat(np.array([1, 0, 1, 1, 40, x[0] & np.uint64(0xFFFFFFFF), 77], np.uint64), 64))
_hint_only = asm("prefetch.global.L1 [%0]; prefetch.global.L2 [%0];", "", '"l"(in)') + asm("{.reg .b64 a; createpolicy.fractional.L2::evict_first.b64 a, 1.0; createpolicy.fractional.L2::evict_last.b64 a, 1.0; nanosleep.u32 20;}")
kernel("hints", _hint_only + "out[t] = t;", lambda x: np.arange(64, dtype=np.uint64))


# ---- atomics ---------------------------------------------------------------------------------------------------------------------
def atomic_result(op: str, kind: str, old, b, c):
    if kind.startswith("noftz") or kind[0] == "f":
        return float_add(kind.replace("noftz.", ""), old, b)
    n = bits(kind)
    signed = (lambda v: v - (1 << n) if kind[0] == "s" and v >> (n - 1) else v)
    o, v = signed(old), signed(b)
    return {"add": o + v, "min": min(o, v), "max": max(o, v), "and": o & v, "or": o | v, "xor": o ^ v, "exch": v, "cas": c if old == b else old, "inc": 0 if o >= v else o + 1, "dec": v if o == 0 or o > v else o - 1}[op] & (1 << n) - 1


def float_add(kind: str, old: int, b: int) -> int:
    if kind.endswith("x2"):
        return float_add(kind[:-2], old & 0xFFFF, b & 0xFFFF) | float_add(kind[:-2], old >> 16, b >> 16) << 16
    if kind == "bf16":
        return int(to_bf16(from_bf16(np.array([old], np.uint16)) + from_bf16(np.array([b], np.uint16)))[0])
    view = {"f16": (np.uint16, np.float16), "f32": (np.uint32, np.float32), "f64": (np.uint64, np.float64)}[kind]
    total = np.array([old], view[0]).view(view[1]).astype(np.longdouble) + np.array([b], view[0]).view(view[1]).astype(np.longdouble)
    return int(round_to(total, kind).astype(view[1]).view(view[0])[0])


OPS = {"add": "u32 s32 u64 f32 f64 noftz.f16 noftz.f16x2 noftz.bf16 noftz.bf16x2", "min": "u32 s32 u64 s64", "max": "u32 s32 u64 s64", "and": "b32 b64", "or": "b32 b64", "xor": "b32 b64", "exch": "b32 b64", "cas": "b16 b32 b64", "inc": "u32", "dec": "u32"}
ORDERS = ["", ".relaxed", ".acquire", ".release", ".acq_rel"]
SCOPES = ["", ".cta", ".gpu", ".sys"]


def atomic_cases(op: str):
    """Every type with the plain form, then every order, scope and space with the first type."""
    kinds = OPS[op].split()
    yield from (("", "", ".global", k) for k in kinds)
    yield from ((o, s, ".global", kinds[0]) for o in ORDERS[1:] for s in SCOPES[1:] if o)
    yield from (("", s, sp, kinds[0]) for s in SCOPES[1:] for sp in (".shared", ""))


def make_input(rng: np.random.Generator) -> np.ndarray:
    """Random words; where atomics add floats, small numbers whose sums have one right answer."""
    x = rng.integers(0, 1 << 63, WORDS, dtype=np.uint64) * np.uint64(2) + rng.integers(0, 2, WORDS, dtype=np.uint64)
    small = rng.integers(0, 64, WORDS) / 4
    as_bits = {"f32": small.astype(np.float32).view(np.uint32), "f64": small.view(np.uint64), "f16": small.astype(np.float16).view(np.uint16), "bf16": to_bf16(small)}
    for kind, slot in TYPE_SLOT.items():
        k = kind.replace("noftz.", "")
        for at in (64 * (40 + slot), 64 * (52 + slot)):
            if "f" in k:
                one = as_bits[k.removesuffix("x2")][at : at + 64].astype(np.uint64)
                x[at : at + 64] = one | one[::-1] << np.uint64(16) if k.endswith("x2") else one
    return x


def atomic_body(op: str, returns: bool) -> tuple[str, Callable]:
    cases = list(atomic_cases(op))
    if not returns:
        cases = [c for c in cases if c[0] in ("", ".relaxed", ".release")]
    body = ""
    for i, (order, scope, space, kind) in enumerate(cases):
        k = kind.replace("noftz.", "")
        c, ctype = constraint("u16" if k == "bf16" else k)
        a, where = ADDRESS[space]
        n = bits(k)
        value = f"{ctype}(in[{64 * 40} + 64 * {TYPE_SLOT[kind]} + t])"
        other = f"{ctype}(in[{64 * 52} + 64 * {TYPE_SLOT[kind]} + t])"
        more = ", %2" if op == "cas" else ""
        word = f"{order}{scope}{space}.{op}.{kind}"
        text = f"{{.reg .b{n} o; st{space}.b{n} [%1], %2; " + (f"atom{word} o, [%1], %3{more};" if returns else f"mov.b{n} o, %2; red{word} [%1], %3;") + f" ld{space}.b{n} %0, [%1]; xor.b{n} %0, %0, o;}}"
        statement = asm(text, put("&" + c), ", ".join((take(a, where), take(c, value), take(c, other))))
        body += f"{{ {ctype} d; {statement} out[{64 * (i % 30)} + t] {'+' if i >= 30 else ''}= d; }}\n"

    def expected(x):
        out = np.zeros((30, 64), np.uint64)
        for i, (_, _, _, kind) in enumerate(cases):
            old, b = x[64 * (40 + TYPE_SLOT[kind]) :][:64], x[64 * (52 + TYPE_SLOT[kind]) :][:64]
            mask = (1 << bits(kind.replace("noftz.", ""))) - 1
            out[i % 30] += np.array([(int(o) & mask) ^ atomic_result(op, kind, int(o) & mask, int(v) & mask, int(o) & mask) for o, v in zip(old, b)], np.uint64)
        return out[: min(30, len(cases))].reshape(-1)

    return body, expected


TYPE_SLOT = {k: i for i, k in enumerate(["u32", "s32", "u64", "s64", "f32", "f64", "noftz.f16", "noftz.f16x2", "noftz.bf16", "noftz.bf16x2", "b16"])} | {"b32": 0, "b64": 2}
for _op in OPS:
    kernel(f"atom {_op}", *atomic_body(_op, True), arch=90)
    if _op not in ("exch", "cas"):
        kernel(f"red {_op}", *atomic_body(_op, False), arch=90)
