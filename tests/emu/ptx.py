"""PTX as nvcc writes it, read into functions of statements. Nothing is understood here; what has an unexpected shape is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b128": 128}
BITS |= {t: 32 for t in ("b32", "u32", "s32", "f32", "f16x2", "bf16x2")} | {t: 64 for t in ("b64", "u64", "s64", "f64")}


class PtxError(Exception):
    """Something that the translator does not know, with the line of the PTX."""


@dataclass
class Variable:
    space: str
    name: str
    type: str
    align: int
    count: int | None  # None: of unknown size, as dynamic shared memory is
    init: list[str]

    @property
    def bytes(self) -> int:
        return BITS[self.type] // 8 * (self.count or 0)


@dataclass
class Statement:
    kind: str  # label, instruction, loc, open, close, variable, registers, targets
    line: int
    text: str = ""
    op: str = ""
    operands: list[str] = field(default_factory=list)
    predicate: str = ""  # with its ! if negated
    value: object = None


@dataclass
class Function:
    name: str
    entry: bool
    params: list[Variable]
    results: list[Variable]
    max_threads: int
    cluster: tuple[int, int, int]
    body: list[Statement]


@dataclass
class Module:
    variables: list[Variable]
    functions: list[Function]
    files: dict[str, str]


_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local|param)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)"
    r"(?:\s+\.ptr(?:\s*\.\w+)?(?:\s*\.align\s+\d+)?)?\s+([\w$%]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(.*))?$",
    re.S,
)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:\s*,\s*function_name\s+[^,]+,\s*inlined_at\s+(\d+)\s+(\d+)\s+\d+)?")


def parse_variable(text: str, line: int) -> Variable:
    m = _VARIABLE.match(text.strip())
    if not m or m[3] not in BITS:
        raise PtxError(f"line {line}: cannot read the variable: {text.strip()}")
    space, align, kind, name, count, init = m.groups()
    size = None if count == "" else int(count) if count is not None else 1
    values = [v.strip() for v in init.strip().strip("{}").split(",")] if init else []
    return Variable(space, name, kind, int(align or BITS[kind] // 8), size, values)


def split_operands(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class Reader:
    """Goes through the text of a module, statement by statement."""

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
        self.text = re.sub(r"//[^\n]*", "", text)
        self.at = self.counted = 0
        self.lines = 1

    def line(self) -> int:
        self.lines += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.lines

    def skip_space(self) -> bool:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at < len(self.text)

    def match(self, pattern: str) -> re.Match | None:
        m = re.compile(pattern, re.S).match(self.text, self.at)
        if m:
            self.at = m.end()
        return m

    def until(self, stops: str) -> str:
        """The text up to one of `stops` outside of brackets; the stop is skipped and is the last character."""
        depth, start = 0, self.at
        for i in range(start, len(self.text)):
            c = self.text[i]
            if depth == 0 and c in stops:
                self.at = i + 1
                return self.text[start : i + 1]
            depth += (c in "([{") - (c in ")]}")
        raise PtxError(f"line {self.line()}: the text ends within a statement")

    def module(self) -> Module:
        variables, functions = [], []
        while self.skip_space():
            line = self.line()
            if self.match(r"\.(version|target|address_size|file)\b[^\n]*"):
                continue
            if self.match(r"\.section\b[^{]*\{"):
                self.until("}")
            elif self.match(r"\.(pragma|alias)\b"):
                self.until(";")
            elif re.compile(r"(\.(visible|extern|weak|common)\s+)*\.(entry|func)\b").match(self.text, self.at):
                head = self.until("{;")
                if head.endswith("{"):
                    functions.append(self.function(head[:-1], line))
            else:
                variables.append(parse_variable(self.until(";")[:-1], line))
        return Module(variables, functions, self.files)

    def function(self, head: str, line: int) -> Function:
        group = r"\(((?:[^()]|\([^()]*\))*)\)"
        m = re.search(rf"\.(entry|func)\s*(?:{group})?\s*([\w$]+)\s*(?:{group})?", head, re.S)
        if not m:
            raise PtxError(f"line {line}: cannot read the head of a function")
        threads = re.search(r"\.(?:max|req)ntid\s+([\d, ]+)", head)
        cluster = re.search(r"\.reqnctapercluster\s+([\d, ]+)", head)
        sizes = [int(v) for v in cluster[1].split(",")] if cluster else []
        product = 1
        for v in threads[1].split(",") if threads else ["1024"]:
            product *= int(v)

        def read(text: str | None) -> list[Variable]:
            return [parse_variable(p, line) for p in split_operands(text or "")]

        return Function(m[3], m[1] == "entry", read(m[4]), read(m[2]), product, tuple((sizes + [1, 1, 1])[:3]), list(self.body()))

    def body(self):
        depth = 1
        while True:
            if not self.skip_space():
                raise PtxError("the text ends within a function")
            line = self.line()
            if self.match(r"\{"):
                depth += 1
                yield Statement("open", line)
            elif self.match(r"\}"):
                depth -= 1
                if not depth:
                    return
                yield Statement("close", line)
            elif m := self.match(r"\.loc\b[^\n]*"):
                yield Statement("loc", line, value=_LOC.match(m[0]).groups())
            elif m := self.match(r"([\w$]+)\s*:(?!:)"):
                yield Statement("label", line, m[1])
            elif self.match(r"\.pragma\b"):
                self.until(";")
            elif self.match(r";"):
                continue
            else:
                yield self.statement(" ".join(self.until(";")[:-1].split()), line)

    def statement(self, text: str, line: int) -> Statement:
        if text.startswith(".reg"):
            m = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
            return Statement("registers", line, value=(m[1], [v.strip() for v in m[2].split(",")]))
        if text.startswith(".branchtargets"):
            return Statement("targets", line, value=split_operands(text[len(".branchtargets") :]))
        if text.startswith("."):
            return Statement("variable", line, value=parse_variable(text, line))
        m = re.fullmatch(r"(?:@(!?[\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if not m:
            raise PtxError(f"line {line}: cannot read: {text}")
        return Statement("instruction", line, text, m[2].rstrip("."), split_operands(m[3]), m[1] or "")


def parse(text: str) -> Module:
    return Reader(text).module()
