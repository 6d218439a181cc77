"""Conformance of mma, ldmatrix, stmatrix, movmatrix and wgmma: fragments as the PTX manual lays them out, products by numpy; and the source of
all kernels that are not plain arithmetic: `python conformance_matrices.py KERNELS.cu`. See conformance_machine.py."""

from __future__ import annotations

import sys
from pathlib import Path

import conformance_threads  # noqa: F401  (adds its kernels)
import numpy as np
from conformance_machine import KERNELS, asm, kernel

LANES = np.arange(32)
WIDTH = {"f16": 16, "bf16": 16, "s8": 8, "u8": 8, "s4": 4, "u4": 4}


def elements(words: np.ndarray, kind: str) -> np.ndarray:
    """The numbers in 32-bit registers, on a last axis. For f16 and bf16 the kernels make small numbers of the low bits."""
    n = 32 // WIDTH[kind]
    if "f" in kind:
        return np.stack([(words >> np.uint64(3 * i) & np.uint64(7)).astype(np.int64) - 4 for i in range(2)], -1)
    v = np.stack([(words >> np.uint64(WIDTH[kind] * i)).astype(np.int64) & (1 << WIDTH[kind]) - 1 for i in range(n)], -1)
    return np.where(v >= 1 << (WIDTH[kind] - 1), v - (1 << WIDTH[kind]), v) if kind[0] == "s" else v


def register(kind: str, at: str) -> str:
    """C++ for a register of matrix elements."""
    if "f" not in kind:
        return f"uint32_t(in[{at}])"
    return f"small_{kind}(in[{at}])"


def a_matrix(x, kind: str, registers: int) -> np.ndarray:
    """A[16][k]: register r of lane 4g + q holds row g + 8·(r mod 2), columns from (32/width)·(q + 4·(r div 2))."""
    per = 32 // WIDTH[kind]
    a = np.zeros((16, registers // 2 * 4 * per), np.int64)
    for r in range(registers):
        for lane, v in zip(LANES, elements(x[32 * r : 32 * r + 32], kind)):
            col = per * (lane % 4 + 4 * (r // 2))
            a[lane // 4 + 8 * (r % 2), col : col + per] = v
    return a


def b_matrix(x, kind: str, registers: int) -> np.ndarray:
    per = 32 // WIDTH[kind]
    b = np.zeros((registers * 4 * per, 8), np.int64)
    for r in range(registers):
        for lane, v in zip(LANES, elements(x[256 + 32 * r : 256 + 32 * r + 32], kind)):
            row = per * (lane % 4 + 4 * r)
            b[row : row + per, lane // 4] = v
    return b


def mma(op: str, k: int, a: str, b: str, out: str) -> None:
    na, nb, nd = k * WIDTH[a] // 64, k * WIDTH[b] // 128, 2 if out == "f16" else 4
    body = f"const uint32_t a[] = {{{', '.join(register(a, f'{32 * r} + t') for r in range(na))}}}, b[] = {{{', '.join(register(b, f'{256 + 32 * r} + t') for r in range(nb))}}};\n"
    c = {"f32": "__float_as_uint(float(int(in[{}] & 15)))", "f16": "small_f16(in[{}])", "s32": "uint32_t(in[{}])"}[out]
    body += f"const uint32_t c[] = {{{', '.join(c.format(f'{512 + 32 * r} + t') for r in range(nd))}}};\n"
    kinds = "f" if out == "f32" else "r"
    body += "float f[4];\n" if out == "f32" else "uint32_t d[4];\n"
    regs = iter(range(99))
    lists = [", ".join(f"%{next(regs)}" for _ in range(n)) for n in (nd, na, nb, nd)]
    outs = ", ".join(f'"={kinds}"({"f" if out == "f32" else "d"}[{i}])' for i in range(nd))
    ins = ", ".join([f'"r"(a[{i}])' for i in range(na)] + [f'"r"(b[{i}])' for i in range(nb)] + [f'"f"(__uint_as_float(c[{i}]))' if out == "f32" else f'"r"(c[{i}])' for i in range(nd)])
    body += asm(f"{op} {{{lists[0]}}}, {{{lists[1]}}}, {{{lists[2]}}}, {{{lists[3]}}};", outs, ins)
    body += "".join(f"out[{32 * i} + t] = {f'__float_as_uint(f[{i}])' if out == 'f32' else f'd[{i}]'};\n" for i in range(nd))

    def expected(x):
        total = a_matrix(x, a, na) @ b_matrix(x, b, nb)
        rows = []
        for r in range(4):
            s = total[LANES // 4 + 8 * (r // 2), 2 * (LANES % 4) + r % 2]
            if out == "s32":
                s = s + x[512 + 32 * r :][:32].astype(np.uint32).view(np.int32)
                rows.append((np.clip(s, -(2**31), 2**31 - 1) if "satfinite" in op else s).astype(np.int64).astype(np.uint32))
            elif out == "f32":
                rows.append((s + (x[512 + 32 * r :][:32] & np.uint64(15)).astype(np.int64)).astype(np.float32).view(np.uint32))
            else:
                rows.append((s + elements(x[512 + 32 * (r // 2) :][:32], "f16")[:, r % 2]).astype(np.float16).view(np.uint16).astype(np.uint32))
        if out == "f16":
            rows = [rows[0] | rows[1] << np.uint32(16), rows[2] | rows[3] << np.uint32(16)]
        return np.concatenate(rows).astype(np.uint64)

    kernel(op, body, expected, threads=32)


for _k in (8, 16):
    for _t in ("f16", "bf16"):
        mma(f"mma.sync.aligned.m16n8k{_k}.row.col.f32.{_t}.{_t}.f32", _k, _t, _t, "f32")
    mma(f"mma.sync.aligned.m16n8k{_k}.row.col.f16.f16.f16.f16", _k, "f16", "f16", "f16")
for _bits, _ks in ((8, (16, 32)), (4, (32, 64))):
    for _k in _ks:
        for _a, _b, _sat in ((f"s{_bits}", f"s{_bits}", ""), (f"u{_bits}", f"s{_bits}", ".satfinite"), (f"s{_bits}", f"u{_bits}", ""), (f"u{_bits}", f"u{_bits}", "")):
            mma(f"mma.sync.aligned.m16n8k{_k}.row.col{_sat}.s32.{_a}.{_b}.s32", _k, _a, _b, "s32")


# ---- 8x8 matrices ----------------------------------------------------------------------------------------------------------------
def halves(x) -> np.ndarray:
    """The 2 KiB of shared memory as rows of 8 halves."""
    return x[:256].view(np.uint16).reshape(128, 8)


ROW = (LANES * 5 + 3) % 32  # which row of the memory each lane addresses


def fragments(matrix: np.ndarray, transposed: bool) -> np.ndarray:
    m = matrix.T if transposed else matrix
    pair = m.reshape(32, 2).astype(np.uint64)
    return pair[:, 0] | pair[:, 1] << np.uint64(16)


def ldmatrix(count: int, trans: str, space: str) -> None:
    op = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16"
    regs = ", ".join(f"%{i}" for i in range(count))
    body = "for (int i = t; i < 256; i += 32) s[i] = in[i];\n__syncthreads(); uint32_t d[4];\n"
    body += asm(f"{op} {{{regs}}}, [%{count}];", ", ".join(f'"=r"(d[{i}])' for i in range(count)), '"r"(S + (t * 5 + 3) % 32 * 16)')
    body += "".join(f"out[{32 * i} + t] = d[{i}];\n" for i in range(count))
    kernel(op, body, lambda x: np.concatenate([fragments(halves(x)[ROW[8 * j : 8 * j + 8]], bool(trans)) for j in range(count)]), threads=32)


def stmatrix(count: int, trans: str, space: str) -> None:
    op = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16"
    body = "for (int i = t; i < 64; i += 32) s[i] = 0;\n__syncthreads();\n"
    body += asm(f"{op} [%0], {{{', '.join(f'%{i + 1}' for i in range(count))}}};", "", ", ".join(['"r"(S + (t * 5 + 3) % 32 * 16)', *(f'"r"(uint32_t(in[{32 * i} + t]))' for i in range(count))]))
    body += "__syncthreads(); for (int i = t; i < 64; i += 32) out[i] = s[i];"

    def expected(x):
        rows = np.zeros((32, 8), np.uint16)
        for j in range(count):
            words = x[32 * j : 32 * j + 32]
            m = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16) & np.uint64(0xFFFF)], 1).astype(np.uint16).reshape(8, 8)
            rows[ROW[8 * j : 8 * j + 8]] = m.T if trans else m
        return rows.reshape(-1).view(np.uint64)

    kernel(op, body, expected, arch=90, threads=32)


for _count, _trans, _space in ((1, "", "shared"), (2, ".trans", "shared"), (4, "", "shared"), (4, ".trans", "shared::cta")):
    ldmatrix(_count, _trans, _space)
    stmatrix(_count, _trans, _space)
_mov = "uint32_t d;" + asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;", '"=r"(d)', '"r"(uint32_t(in[t]))') + "out[t] = d;"
kernel("movmatrix", _mov, lambda x: fragments((x[:32].astype(np.uint32)).view(np.uint16).reshape(8, 8), True), threads=32)


# ---- wgmma -----------------------------------------------------------------------------------------------------------------------
def wgmma(n: int, out: str, a: str, b: str, mode: int = 0, transpose_b: int = 0, a_registers: bool = False, negate: int = 1) -> None:
    """D[64][n] = A[64][k]·B[n][k]ᵀ added to itself once. A and B are put into shared memory by place() of the prelude."""
    k = 32 if out == "s32" else 16
    nd = n // 4 if out == "f16" else n // 2
    op = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{out}.{a}.{b}"
    size, ctype = (1, "int8_t") if k == 32 else (2, "uint16_t")
    store = {"f16": "uint16_t(small_f16({}))", "bf16": "uint16_t(small_bf16({}))"}.get(a, "int8_t({})")
    body = f"auto A = reinterpret_cast<{ctype}*>(s), B = reinterpret_cast<{ctype}*>(s + 1024);\n"
    body += f"for (int i = t; i < 64 * {k}; i += 128) A[place<{size}>({mode}, i / {k}, i % {k})] = {store.format('in[i]')};\n"
    at = f"i / {k}, i % {k}" if not transpose_b else f"i % {k}, i / {k}"
    body += f"for (int i = t; i < {n} * {k}; i += 128) B[{'place_transposed' if transpose_b else f'place<{size}>'}({mode}, {f'i / {k}, i % {k}' if transpose_b else at})] = {store.format('in[i * 2 + 1 & 4095]')};\n"
    body += asm("fence.proxy.async;") + "__syncthreads();\n"
    dtype, letter = ("float", "f") if out == "f32" else ("uint32_t", "r")
    body += f"{dtype} d[{nd}] = {{}};\n"
    if a_registers:
        first = f"in[(t / 32 * 16 + t % 32 / 4) * {k} + t % 4 * 2"
        pairs = [f"pair({first} + {8 * k * (r % 2) + 8 * (r // 2)}], {first} + {8 * k * (r % 2) + 8 * (r // 2) + 1}])" for r in range(4)]
        body += f"uint32_t a[4] = {{{', '.join(pairs)}}};\n"
    # Without these the compiler sets the registers to zero after the fence, and reads them before the wait: nothing ties it.
    pins = [f'for (int i = 0; i < {count}; ++i) asm volatile("" : "+{kind}"({name}[i]) :: "memory");\n' for name, kind, count in (("d", letter, nd), ("a", "r", 4))]
    body += pins[0] + (pins[1] if a_registers else "") + asm("wgmma.fence.sync.aligned;")
    regs = ", ".join(f"%{i}" for i in range(nd))
    numbers = "" if k == 32 else f", {negate}, 1" + (f", {transpose_b}" if a_registers else f", 0, {transpose_b}")
    operand = f"{{%{nd + 2}, %{nd + 3}, %{nd + 4}, %{nd + 5}}}" if a_registers else f"%{nd + 2}"
    given = ", ".join(f'"r"(a[{i}])' for i in range(4)) if a_registers else f'"l"(descriptor({mode}, S, 0))'
    for scale in (0, 1):
        text = f"{{.reg .pred p; setp.ne.u32 p, %{nd + 1}, 0; {op} {{{regs}}}, {operand}, %{nd}, p{numbers};}}"
        body += asm(text, ", ".join(f'"+{letter}"(d[{i}])' for i in range(nd)), f'"l"(descriptor({mode}, S + 8192, {transpose_b})), "n"({scale}), {given}')
    body += asm("wgmma.commit_group.sync.aligned;") + asm("wgmma.wait_group.sync.aligned 0;") + pins[0]
    word = "__float_as_uint(d[i])" if out == "f32" else "d[i]"
    body += f"uint64_t sum = 0; for (int i = 0; i < {nd}; ++i) sum += uint64_t({word}) * (2 * i + 1); out[t] = sum;\n"
    body += f"for (int i = 0; i < {min(nd, 16)}; ++i) out[128 + 128 * i + t] = {word};"

    def expected(x):
        i, j = np.arange(64 * k), np.arange(n * k)
        words_a, words_b = x[i], x[j * 2 + 1 & 4095]
        read = (lambda w, kind: elements(w, kind)[:, 0]) if k == 16 else (lambda w, kind: w.astype(np.uint8).view(np.int8 if kind == "s8" else np.uint8).astype(np.int64))
        total = negate * 2 * read(words_a, a).reshape(64, k) @ read(words_b, b).reshape(n, k).T
        t, v = np.arange(128)[:, None], np.arange(n // 2)[None]
        mine = total[t // 32 * 16 + t % 32 // 4 + 8 * (v // 2 % 2), v // 4 * 8 + t % 4 * 2 + v % 2]
        if out == "f16":
            h = mine.astype(np.float16).view(np.uint16).astype(np.uint64)
            words = h[:, ::2] | h[:, 1::2] << np.uint64(16)
        else:
            words = (mine.astype(np.float32).view(np.uint32) if out == "f32" else mine.astype(np.int32).view(np.uint32)).astype(np.uint64)
        total = (words * (2 * np.arange(nd, dtype=np.uint64) + np.uint64(1))).sum(1, dtype=np.uint64)
        return np.concatenate([total, words[:, : min(nd, 16)].T.reshape(-1)])

    kernel(f"{op}, swizzle {mode}, transpose {transpose_b}{', A in registers' if a_registers else ''}", body, expected, arch=90, threads=128)


for _n in (8, 16, 32, 64, 112, 128, 256):
    wgmma(_n, "f32", "f16", "f16")
    wgmma(_n, "f32", "bf16", "bf16")
    wgmma(_n, "s32", *(("s8", "s8"), ("u8", "u8"), ("s8", "u8"), ("u8", "s8"))[_n // 8 % 4])
wgmma(64, "f16", "f16", "f16")
wgmma(32, "s32", "u8", "s8", mode=3)
wgmma(32, "s32", "s8", "u8", mode=3)
wgmma(16, "s32", "u8", "u8")
for _mode in (1, 2, 3):
    wgmma(32, "f32", "f16", "f16", mode=_mode, negate=-1)
wgmma(64, "f32", "f16", "f16", mode=1, transpose_b=1)
wgmma(16, "f32", "f16", "f16", a_registers=True)


# ---- the source ------------------------------------------------------------------------------------------------------------------
PRELUDE = """// Made by conformance_matrices.py.
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Two small whole numbers out of the low bits of a word.
__device__ uint32_t small_f16(uint64_t v) {
  const __half2 h = __floats2half2_rn(float(int(v & 7) - 4), float(int(v >> 3 & 7) - 4));
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ uint32_t small_bf16(uint64_t v) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(float(int(v & 7) - 4), float(int(v >> 3 & 7) - 4));
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ uint32_t pair(uint64_t low, uint64_t high) { return (small_f16(low) & 0xffff) | small_f16(high) << 16; }
// Where element (row, k) of a K-major operand of wgmma lies, in elements of `size` bytes. mode: 0 no swizzle, 1 of 128, 2 of 64, 3 of 32 bytes.
// Without a swizzle 8 rows of 16 bytes are a unit; units that are neighbours in k are 128 bytes apart, in rows 256.
template <int size>
__device__ int place(int mode, int row, int k) {
  const int b = k * size, width = 256 >> mode;
  int at = mode ? row * width + b : row / 8 * 256 + b / 16 * 128 + row % 8 * 16 + b % 16;
  if (mode) at ^= (at >> 7 & ((8 >> (mode - 1)) - 1)) << 4;
  return at / size;
}
// B[n][k] of 2 bytes with n contiguous, swizzle of 128 bytes: 64 values of n a row, a row for each k.
__device__ int place_transposed(int, int n, int k) {
  int at = k * 128 + n * 2;
  at ^= (at >> 7 & 7) << 4;
  return at / 2;
}
__device__ uint64_t descriptor(int mode, uint32_t address, int transposed) {
  const uint64_t leading = mode ? 1 : 128 / 16, stride = mode ? (transposed ? 1024 : 8 * (256 >> mode)) / 16 : 256 / 16;
  return uint64_t(address >> 4 & 0x3fff) | leading << 16 | stride << 32 | uint64_t(mode) << 62;
}
__constant__ uint32_t constants[4] = {76, 77, 78, 79};
__device__ __noinline__ uint32_t times_three(uint32_t v) { return 3 * v; }
"""


def source() -> str:
    out, cases = [PRELUDE], ""
    for i, k in enumerate(KERNELS):
        body = f"  __shared__ alignas(1024) uint64_t s[2048];\n  const uint32_t t = threadIdx.x, S = uint32_t(__cvta_generic_to_shared(s));\n  (void)S, (void)s;\n{k.body}"
        guarded = f"#if __CUDA_ARCH__ >= 900\n{body}\n#endif" if k.arch == 90 else body
        out.append(f"__global__ void __launch_bounds__({k.threads}) kernel{i}(const uint64_t* in, uint64_t* out) {{\n{guarded}\n}}")
        cases += f"case {i}: kernel{i}<<<1, {k.threads}, 0, cudaStream_t(stream)>>>(in, out); break; "
    out.append(f'extern "C" __attribute__((visibility("default"))) int run_kernel(int i, const uint64_t* in, uint64_t* out, void* stream) {{\n  switch (i) {{ {cases} }}\n  return cudaGetLastError();\n}}')
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source())
