"""PTX to C++ that runs on the emulated machine: translate.py KERNEL.ptx KERNEL.cpp [--forms FORMS.json]

Each kernel becomes a function of the lane that runs it: registers are local variables, branches are gotos, and what is not arithmetic is a
call of the machine. Registers and labels of nested scopes get the number of their scope. Whatever is not known is an error with its line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import forms_machine  # noqa: F401  (adds its forms)
from forms import all_forms, find
from ptx import BITS, Function, Module, PtxError, Statement, Variable, parse

RED_ZONE = 64  # bytes between shared arrays, so that an overrun of one is seen
SPECIAL = {
    f"%{name}.{axis}": f"me.{path}.{axis}"
    for name, path in {"tid": "thread", "ntid": "team->launch->block", "ctaid": "block->index", "nctaid": "team->launch->grid"}.items()
    for axis in "xyz"
}
SPECIAL |= {f"%cluster_nctaid.{axis}": f"me.team->launch->cluster.{axis}" for axis in "xyz"}
SPECIAL |= {f"%cluster_ctaid.{axis}": f"(me.block->index.{axis} % me.team->launch->cluster.{axis})" for axis in "xyz"}
SPECIAL |= {f"%clusterid.{axis}": f"(me.block->index.{axis} / me.team->launch->cluster.{axis})" for axis in "xyz"}
SPECIAL |= {
    "%laneid": "me.lane", "%warpid": "me.warp", "%cluster_ctarank": "me.block->rank", "%cluster_nctarank": "u32(me.team->blocks.size())",
    "%dynamic_smem_size": "me.team->launch->dynamic_bytes",
}  # fmt: skip
NO_DESTINATION = ("st", "red", "bra", "brx", "bar", "barrier", "cp", "mbarrier", "stmatrix", "call")


def clean(name: str) -> str:
    return re.sub(r"\W", "_", name)


class Shared:
    """Where the shared arrays that a function can reach lie in the window of a block: those of the file, of functions that are called, its own."""

    def __init__(self, module: Module, function: Function):
        self.arrays: dict[str, tuple[int, int]] = {}
        self.dynamic: set[str] = set()
        at, align = RED_ZONE, 16
        inner = [s.value for f in module.functions if not f.entry for s in f.body if s.kind == "variable"]
        own = [s.value for s in function.body if s.kind == "variable"] if function.entry else []
        for v in [v for v in module.variables + inner + own if v.space == "shared"]:
            if v.count is None:
                self.dynamic.add(v.name)
                align = max(align, v.align)
                continue
            at = -(-at // v.align) * v.align
            self.arrays[v.name] = (at, v.bytes)
            at += v.bytes + RED_ZONE
        # Aligned as the kernel asks for and no more: one that relies on more than it asks for is found out.
        self.dynamic_offset = -(-at // align) * align
        if self.dynamic_offset % (2 * align) == 0:
            self.dynamic_offset += align

    def offset(self, name: str) -> int | None:
        if name in self.dynamic:
            return self.dynamic_offset
        return self.arrays[name][0] if name in self.arrays else None


class Instruction:
    """One statement on its way to C++: what the forms ask about it."""

    def __init__(self, body: Body, statement: Statement):
        self.body, self.operands, self.op = body, list(statement.operands), statement.op
        self.counted = False

    def expect(self, count: int | tuple[int, ...]) -> None:
        self.counted = True
        if len(self.operands) not in (count if isinstance(count, tuple) else (count,)):
            raise PtxError(f"{self.op} with {len(self.operands)} operands")

    def nothing(self, count: int) -> str:
        self.expect(count)
        return ";"

    bits = staticmethod(BITS.__getitem__)

    def storage(self, kind: str) -> str:
        return kind if kind[0] in "us" else f"u{BITS[kind]}"

    def register(self, name: str) -> str:
        found = self.body.lookup(name.strip())
        if not found or found[1] == "memory":
            raise PtxError(f"unknown register {name}")
        return found[0]

    def vector(self, i: int) -> list[str]:
        text = self.operands[i]
        return [p.strip() for p in text[1:-1].split(",")] if text.startswith("{") else [text]

    def value(self, i: int, kind: str) -> str:
        if i >= len(self.operands):
            raise PtxError(f"{self.op} with {len(self.operands)} operands")
        return self.value_of(self.operands[i], kind)

    def value_of(self, text: str, kind: str) -> str:
        text = text.strip()
        if text.startswith("!"):
            return f"!{self.register(text[1:])}"
        if found := self.body.lookup(text):
            return found[0] if kind == "pred" else f"u64({found[0]})" if found[1] == "memory" else f"get<{kind}>({found[0]})"
        if text in SPECIAL:
            return f"get<{kind}>(u32({SPECIAL[text]}))"
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            return f"bits<{kind}>(0x{m[1] or m[2]}ull)"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            number = f"{int(text.rstrip('U'), 0) & (1 << 64) - 1:#x}ull"
            return f"bool({number})" if kind == "pred" else f"bits<{kind}>({number})"
        if m := re.fullmatch(r"([\w$%.]+)\+(-?\d+)", text):
            return f"{kind}({self.value_of(m[1], kind)} + {m[2]})"
        if m := re.fullmatch(r"generic\(([\w$]+)\)", text):
            return f"{kind}({self.body.symbol(m[1])})"
        return f"{kind}({self.body.symbol(text)})"

    def put(self, i: int, expression: str) -> str:
        return f"put({self.register(self.operands[i])}, {expression});" if self.operands[i] != "_" else f"{expression};"

    def address(self, i: int) -> str:
        m = re.fullmatch(r"\[\s*(.*?)\s*\]", self.operands[i]) if i < len(self.operands) else None
        if not m:
            raise PtxError(f"{self.op}: operand {i} is no address")
        return self.address_of(m[1])

    def address_of(self, text: str) -> str:
        base, _, offset = (p.strip() for p in text.partition("+"))
        found = self.body.lookup(base)
        start = f"u64({found[0]})" if found else f"u64({base})" if base.isdigit() else f"u64({self.body.symbol(base)})"
        return f"{start} + s64({offset})" if offset else start

    def site(self) -> str:
        return f"S + {self.body.site}"

    def branch(self, label: str) -> str:
        return ("back_edge(me, " + self.site() + "); " if label in self.body.passed else "") + f"goto {self.body.label(label)};"

    def branch_table(self) -> str:
        cases = " ".join(f"case {i}: {self.branch(label)}" for i, label in enumerate(self.body.targets[self.operands[1]]))
        return f"switch ({self.value(0, 'u32')}) {{ {cases} }}"

    def call(self) -> str:
        operands = self.operands
        self.expect((1, 2, 3))
        results = operands.pop(0)[1:-1].split(",") if operands[0].startswith("(") else []
        arguments = operands[1][1:-1].split(",") if len(operands) > 1 else []
        if operands[0] not in self.body.callable:
            raise PtxError(f"call of {operands[0]}, which is not in this file")
        memory = [self.body.lookup(p.strip())[0] for p in [*results, *arguments] if p.strip()]
        return f"F_{clean(operands[0])}({', '.join(['me', *memory])});"

    def register_count(self) -> str:
        count = int(self.operands[0])
        if count % 8 or not 24 <= count <= 256:
            raise PtxError(f"setmaxnreg {count}: a multiple of 8 from 24 to 256 is needed")
        return ";"

    def code(self) -> str:
        form, groups = find(self.op)
        form.note(groups)
        if form.operands is not None:
            self.expect(form.operands)
        text = form.code if isinstance(form.code, str) else form.code(groups, self)
        text = self.fill(text, groups) if text.startswith("d = ") else text
        if not self.counted:
            raise PtxError(f"the form {form.pattern} does not count its operands")
        return text

    def fill(self, text: str, groups: tuple[str, ...]) -> str:
        """A form's `d = f(a, b:u32)` with the operands in place."""
        for i, g in enumerate(groups):
            text = text.replace(f"{{{i + 1}}}", g)
        last = groups[-1] if groups else ""
        text = text.replace("{T}", last)
        names = "dabce"
        expression = text[4:]
        used = [names.index(m) for m in re.findall(r"(?<![\w<])([abce])(?![\w(<])", expression)]
        self.expect(max(used) + 1)
        replaced = re.sub(r"(?<![\w<])([abce])(?![\w(<])(?::(\w+(?:<\w+>)?))?", lambda m: self.value(names.index(m[1]), m[2] or last), expression)
        if self.body.lookup(self.operands[0]) and self.body.lookup(self.operands[0])[1] == "pred":
            return f"{self.register(self.operands[0])} = {replaced};"
        return self.put(0, replaced)


class Body:
    """The body of a function."""

    def __init__(self, function: Function, shared: Shared, module_symbols: dict[str, str], callable_: set[str], sites: dict, files: dict[str, str]):
        self.function, self.shared, self.module_symbols, self.callable = function, shared, module_symbols, callable_
        self.sites, self.files, self.site = sites, files, 0
        self.scopes: list[dict[str, tuple[str, str]]] = [{}]
        self.labels: list[dict[str, str]] = [self.find_labels(0)]
        self.count, self.passed, self.targets, self.inlined = 0, set(), {}, {}
        self.declarations: list[str] = []
        self.lines: list[str] = []
        self.params = {}
        at = 0
        for p in function.params if function.entry else []:
            at = -(-at // p.align) * p.align
            self.params[p.name] = (at, p.bytes)
            at += p.bytes
        if not function.entry:
            self.scopes[0] |= {p.name: (f"P_{clean(p.name)}", "memory") for p in [*function.results, *function.params]}
        self.watched = {
            r for s in function.body if s.op.startswith("wgmma.mma") for o in s.operands[:2] if o.startswith("{") for r in re.findall(r"[\w$%]+", o)
        }

    def find_labels(self, start: int) -> dict[str, str]:
        """The labels of the scope that begins at a statement, its inner scopes left out."""
        depth, found, number = 0, {}, start
        for s in itertools.islice(self.function.body, start, None):
            depth += (s.kind == "open") - (s.kind == "close")
            if depth < 0:
                break
            if s.kind == "label" and depth == 0:
                found[s.text] = f"L{number}_{clean(s.text)}"
        return found

    def lookup(self, name: str) -> tuple[str, str] | None:
        return next((s[name] for s in reversed(self.scopes) if name in s), None)

    def label(self, name: str) -> str:
        for scope in reversed(self.labels):
            if name in scope:
                return scope[name]
        raise PtxError(f"unknown label {name}")

    def symbol(self, name: str) -> str:
        if name in self.params:
            return f"u64(P + {self.params[name][0]})"
        if (offset := self.shared.offset(name)) is not None:
            return f"(me.block->rank << kRankShift | {offset}u)"
        if name in self.module_symbols:
            return self.module_symbols[name]
        raise PtxError(f"unknown operand {name}")

    def declare(self, statement: Statement) -> None:
        scope = f"_{self.count}" if len(self.scopes) > 1 else ""
        if statement.kind == "variable":
            v: Variable = statement.value
            if v.space in ("local", "param"):
                name = f"M_{clean(v.name)}{scope}"
                self.declarations.append(f"alignas(16) u8 {name}[{max(v.bytes, 1)}];")
                self.scopes[-1][v.name] = (name, "memory")
            return
        kind, names = statement.value
        if kind not in BITS:
            raise PtxError(f"unknown type .{kind}")
        ctype = "bool" if kind == "pred" else "b128" if kind == "b128" else f"u{BITS[kind]}"
        for text in names:
            m = re.fullmatch(r"(.*)<(\d+)>", text)
            for name in [f"{m[1]}{i}" for i in range(int(m[2]))] if m else [text]:
                self.scopes[-1][name] = (f"R{clean(name)}{scope}", kind)
        self.declarations.append(f"{ctype} " + ", ".join(self.scopes[-1][n][0] for t in names for n in self.expand(t)) + ";")

    @staticmethod
    def expand(text: str) -> list[str]:
        m = re.fullmatch(r"(.*)<(\d+)>", text)
        return [f"{m[1]}{i}" for i in range(int(m[2]))] if m else [text]

    def note_site(self, groups: tuple[str | None, ...]) -> None:
        """The line, and the outermost one that it was inlined at: .loc names the nearest alone, lines before it name the others."""
        file, line, *outer = groups
        outer = tuple(outer) if outer[0] else None
        if outer:
            self.inlined[file, line] = outer
        for _ in range(8):
            outer = self.inlined.get(outer, outer)
        key = (self.files.get(file, "?"), int(line), self.files[outer[0]] if outer else None, int(outer[1]) if outer else 0)
        self.site = self.sites.setdefault(key, len(self.sites))

    def registers_in_flight(self, s: Statement) -> str:
        """Calls that see whether an instruction touches what a wgmma still holds."""
        if s.op.startswith("wgmma"):
            return ""
        calls = []
        for i, operand in enumerate(s.operands):
            for r in re.findall(r"%[\w$]+", operand):
                if r in self.watched:
                    write = i == 0 and s.op.split(".")[0] not in NO_DESTINATION
                    calls.append(f"use_register(me, &{self.lookup(r)[0]}, {'true' if write else 'false'}, S + {self.site}); ")
        return "".join(calls)

    def translate(self) -> str:
        for i, s in enumerate(self.function.body):
            try:
                self.one(i, s)
            except (PtxError, LookupError, ValueError, TypeError) as e:  # an operand of an unexpected shape trips over anything
                raise PtxError(f"line {s.line}: {e or type(e).__name__}: {s.text}") from None
        return "\n".join([*self.declarations, *self.lines])

    def one(self, i: int, s: Statement) -> None:
        if s.kind == "open":
            self.count += 1
            self.scopes.append({})
            self.labels.append(self.find_labels(i + 1))
        elif s.kind == "close":
            self.scopes.pop()
            self.labels.pop()
        elif s.kind in ("registers", "variable"):
            self.declare(s)
        elif s.kind == "loc":
            self.note_site(s.value)
        elif s.kind == "label":
            self.passed.add(s.text)
            self.lines.append(f"{self.label(s.text)}:;")
            self.table = s.text
        elif s.kind == "targets":
            self.targets[self.table] = s.value
        else:
            guard = f"if ({'!' if s.predicate[0] == '!' else ''}{Instruction(self, s).register(s.predicate.lstrip('!'))}) " if s.predicate else ""
            self.lines.append(f"{guard}{{ {self.registers_in_flight(s)}{Instruction(self, s).code()} }}")


def initial_bytes(v: Variable) -> str:
    size = BITS[v.type] // 8
    numbers = []
    for text in v.init:
        if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            numbers.append(int(m[1], 16))
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            numbers.append(int(text.rstrip("U"), 0))
        else:
            raise PtxError(f"the variable {v.name} is initialised with {text}")
    return ",".join(str(b) for n in numbers for b in (n & (1 << 8 * size) - 1).to_bytes(size, "little"))


def translate(text: str, arch: int) -> str:
    module = parse(text)
    sites, symbols, out = {}, {}, []
    for v in module.variables:
        if v.space in ("global", "const"):
            symbols[v.name] = f"G_{clean(v.name)}"
            init = initial_bytes(v)
            out.append(f"static const u8 I_{clean(v.name)}[] = {{{init or 0}}};")
            out.append(f'static const u64 G_{clean(v.name)} = add_global("{v.name}", {v.bytes}, {v.align}, I_{clean(v.name)}, {init.count(",") + 1 if init else 0});')
    called = {f.name for f in module.functions if not f.entry}
    signatures, bodies, rows = [], [], []
    for number, f in enumerate(module.functions):
        shared = Shared(module, f)
        body = Body(f, shared, symbols, called, sites, module.files)
        code = body.translate()
        if f.entry:
            signature = f"static void K{number}(Lane& me, const u8* P)"
            rows.append(register(number, f, body, shared, arch))
        else:
            signature = f"static void F_{clean(f.name)}(" + ", ".join(["Lane& me", *(f"u8* P_{clean(p.name)}" for p in [*f.results, *f.params])]) + ")"
        signatures.append(signature + ";")
        bodies.append(f"{signature} {{\n{code}\n}}")
    table = ",\n".join(f"{{{json.dumps(f)}, {line}, {json.dumps(c) if c else 'nullptr'}, {n}}}" for f, line, c, n in sites) or '{"", 0, nullptr, 0}'
    head = ['#include "ptx.h"', "namespace emu::ops { namespace {", f"const Site site_table[] = {{\n{table}}};", "const u32 S = add_sites(site_table, sizeof site_table / sizeof *site_table);"]
    return "\n".join([*head, *out, *signatures, *bodies, *rows, "}}"]) + "\n"


def register(number: int, f: Function, body: Body, shared: Shared, arch: int) -> str:
    names = {n for s in f.body for o in s.operands for n in re.findall(r"[\w$]+", o)}
    spans = [shared.arrays[n] for n in shared.arrays if n in names or body.callable]

    def table(pairs) -> str:
        return "{" + ", ".join(f"{{{a}, {b}}}" for a, b in pairs) + "}"

    cluster = ", ".join(str(c) for c in f.cluster)
    return (
        f'const RegisterKernel register{number}{{Kernel{{"{f.name}", {arch}, K{number}, {table(body.params.values())}, {table(spans)}, '
        f"{shared.dynamic_offset}, {f.max_threads}, {{{cluster}}}}}}};"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ptx", type=Path)
    parser.add_argument("cpp", type=Path)
    parser.add_argument("--forms", type=Path, help="write which alternatives of which forms were used")
    args = parser.parse_args()
    text = args.ptx.read_text()
    target = re.search(r"\.target\s+sm_(\d+)", text)
    try:
        args.cpp.write_text(translate(text, int(target[1])))
    except PtxError as e:
        print(f"{args.ptx}: {e}", file=sys.stderr)
        return 1
    if args.forms:
        args.forms.write_text(json.dumps({f.pattern: [sorted(s) for s in f.seen] for f in all_forms() if f.used}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
