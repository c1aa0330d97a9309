"""PTX text to modules, kernels and instructions; nothing here knows what an instruction does."""

import dataclasses
import math
import re

import numpy as np

from ptx_simulator.errors import PtxError
from ptx_simulator.numerics import DT, UDT, f32, f64, u64


@dataclasses.dataclass(frozen=True)
class Reg:
    i: int
    ty: str


@dataclasses.dataclass(frozen=True)
class Imm:
    text: str


@dataclasses.dataclass(frozen=True)
class Sym:
    name: str
    scope: tuple


@dataclasses.dataclass(frozen=True)
class Special:
    name: str


@dataclasses.dataclass(frozen=True)
class Vec:
    items: tuple


@dataclasses.dataclass(frozen=True)
class Mem:
    base: object
    off: int
    extra: object = None


@dataclasses.dataclass(frozen=True)
class Not:
    op: object


@dataclasses.dataclass(frozen=True)
class Pair:
    a: object
    b: object


SINK = "_"
NUM = re.compile(
    r"^-?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?"
    r"|\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d+U?)$"
)
DIRECTIVE_LINE = re.compile(r"\.(loc|file|section|pragma|noreturn)\b")


def split_top(s):
    """Splits at commas outside of [], {} and ()."""
    out, depth, cur = [], 0, ""
    for ch in s:
        depth += ch in "[{("
        depth -= ch in "]})"
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


class Ins:
    """One decoded instruction; `fn(m, sel)` executes it for the selected threads."""

    def __init__(self, text, line, scope, K):
        self.text = " ".join(text.split())
        self.line = line
        self.scope = scope
        self.ctl = False
        g = re.match(r"@(!?)\s*([%\w$]+)\s+", self.text)
        body = self.text
        self.guard = None
        if g:
            self.guard = (K.operand(g[2], scope).i, bool(g[1]))
            body = self.text[g.end() :]
        op, _, rest = body.partition(" ")
        self.opcode = op
        self.name, *self.mods = op.split(".")
        self.ops = [K.operand(o, scope) for o in split_top(rest)]
        self.regs = frozenset(registers_of(self.ops)) | ({self.guard[0]} if g else set())

    def take(self, *choices, default=None, required=False):
        """Removes and returns the modifier that is in choices."""
        for c in choices:
            if c in self.mods:
                self.mods.remove(c)
                return c
        if required:
            self.bad(f"needs one of {choices}")
        return default

    def drop(self, *names):
        for n in names:
            while n in self.mods:
                self.mods.remove(n)

    def bad(self, why=""):
        raise NotImplementedError(f"line {self.line}: {self.opcode}: {why or 'not modelled'} [{self.text[:160]}]")

    def typ(self, *allowed):
        if not self.mods or self.mods[-1] not in DT or (allowed and self.mods[-1] not in allowed):
            self.bad("type")
        return self.mods.pop()

    def done(self):
        if self.mods:
            self.bad(f"modifier(s) {'.'.join(self.mods)}")


def registers_of(o):
    if isinstance(o, Reg):
        yield o.i
    elif isinstance(o, (list, tuple)):
        for x in o:
            yield from registers_of(x)
    elif dataclasses.is_dataclass(o):
        for f in dataclasses.fields(o):
            yield from registers_of(getattr(o, f.name))


class Kernel:
    """A parsed `.entry`: registers, shared/local variables, labels and decoded instructions."""

    def __init__(self, module, name, params, attrs, body, line0):
        self.module = module
        self.name = name
        self.params = params
        self.attrs = attrs
        self.regtypes = []
        self.names = {}
        self.labels = {}
        self.ins = []
        self.reads, self.writes = {}, set()  # register -> first reader; written registers
        self.shared, self.local = {}, {}
        self._parse(body, line0)

    def _parse(self, body, line):
        pos, scopes, nid = 0, (0,), 0
        label = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
        while True:
            m = re.compile(r"\s*").match(body, pos)
            line += body.count("\n", pos, m.end())
            pos = m.end()
            if pos >= len(body):
                break
            if body[pos] == "{":
                nid += 1
                scopes += (nid,)
                pos += 1
                continue
            if body[pos] == "}":
                scopes = scopes[:-1]
                pos += 1
                continue
            if m := label.match(body, pos):
                self.labels[scopes[-1], m[1]] = len(self.ins)
                pos = m.end()
                continue
            if DIRECTIVE_LINE.match(body, pos):
                end = body.find("\n", pos)
                end = len(body) if end < 0 else end
                if body.startswith(".section", pos):
                    break
                pos = end
                continue
            end = body.find(";", pos)
            if end < 0:
                raise PtxError(f"line {line}: statement without ';': {body[pos : pos + 60]!r}")
            s = body[pos:end].strip()
            if s.startswith(".reg"):
                self._reg(s, scopes)
            elif s.startswith((".shared", ".local")):
                (self.shared if s.startswith(".shared") else self.local).update([parse_var(s)])
            elif s.startswith("."):
                raise NotImplementedError(f"line {line}: directive {s.split()[0]}")
            elif s:
                self.ins.append(Ins(s, line, scopes, self))
            line += body.count("\n", pos, end + 1)
            pos = end + 1

    def _reg(self, s, scopes):
        _, ty, names = s.split(None, 2)
        ty = ty[1:]
        if ty not in DT:
            raise NotImplementedError(f".reg .{ty}")
        for n in split_top(names):
            m = re.match(r"([%\w$]+)<(\d+)>$", n)
            for x in [f"{m[1]}{i}" for i in range(int(m[2]))] if m else [n]:
                self.names[scopes[-1], x] = Reg(len(self.regtypes), ty)
                self.regtypes.append(ty)

    def operand(self, s, scope):
        s = s.strip()
        if s == "_":
            return SINK
        if s[0] == "{":
            return Vec(tuple(self.operand(x, scope) for x in split_top(s[1:-1])))
        if s[0] == "[":
            a, *extra = split_top(s[1:-1])
            m = re.match(r"(.*?)\s*(?:\+\s*(-?\w+))?$", a)
            return Mem(
                self.operand(m[1], scope), int(m[2], 0) if m[2] else 0, self.operand(extra[0], scope) if extra else None
            )
        if s[0] == "!":
            return Not(self.operand(s[1:], scope))
        if NUM.match(s):
            return Imm(s)
        if "|" in s:
            return Pair(*(self.operand(x, scope) for x in s.split("|")))
        for k in reversed(scope):
            if (r := self.names.get((k, s))) is not None:
                return r
        if s.startswith("%") or s.startswith("WARP_SZ"):
            return Special(s)
        if m := re.match(r"([\w$]+)\s*\+\s*(\d+)$", s):
            return Mem(Sym(m[1], scope), int(m[2]))
        return Sym(s, scope)

    def target(self, o):
        for k in reversed(o.scope):
            if (k, o.name) in self.labels:
                return self.labels[k, o.name]
        raise PtxError(f"unknown label {o.name}")


def parse_var(s):
    """'.shared .align 16 .b8 name[123]' -> (name, (align, nbytes or None if unsized/dynamic, init))."""
    s, _, init = s.partition("=")
    al = re.search(r"\.align\s+(\d+)", s)
    ty = re.findall(r"\.([bufs]\d+)\b", s)[-1]
    m = re.search(r"([\w$%]+)\s*((?:\[\d*\])*)\s*$", s)
    w = int(ty[1:]) // 8
    dims = re.findall(r"\[(\d*)\]", m[2])
    dyn = dims == [""] or (not dims and "dynamic_sh" in m[1]) or dims == ["0"]
    n = None if dyn else w * math.prod(int(d or 1) for d in dims)
    data = None
    if init.strip():
        vals = [v.strip() for v in init.strip().strip("{}").split(",")]
        if not all(NUM.match(v) for v in vals):
            raise NotImplementedError(f"initialiser of {m[1]}")
        data = b"".join(
            int(imm(Imm(v), ("b" if ty[0] != "f" else "f") + ty[1:]).view(UDT[w])).to_bytes(w, "little") for v in vals
        )
    return m[1], (int(al[1]) if al else w, n, data)


class Module:
    """A PTX file: module variables and entries (decoded lazily)."""

    def __init__(self, text):
        def blank(m):
            return "\n" * m[0].count("\n")

        text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        self.vars, self.entries = {}, {}
        pos = 0
        for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
            head = text[pos : m.start()]
            for v in re.findall(r"(?:\.(?:visible|extern|weak|common)\s+)*(\.(?:global|const|shared)\b[^;]*);", head):
                n, spec = parse_var(v)
                self.vars[n] = (v.split()[0][1:], *spec)
            close = text.index(")", m.end())
            open_ = text.index("{", close)
            d, q = 1, open_ + 1
            while d:
                d += {"{": 1, "}": -1}.get(text[q], 0)
                q += 1
            params = [self._param(p) for p in split_top(text[m.end() : close])]
            attrs = {
                k: [int(x) for x in v.replace(" ", "").split(",")]
                for k, v in re.findall(r"\.(maxntid|reqntid)\s+([\d, ]+)", text[close:open_])
            }
            self.entries[m[1]] = (params, attrs, text[open_ + 1 : q - 1], 1 + text.count("\n", 0, open_))
            pos = q

    @staticmethod
    def _param(p):
        ty = re.findall(r"\.([bufs]\d+)\b", p)[-1]
        al = re.search(r"\.align\s+(\d+)", p)
        m = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", p)
        w = int(ty[1:]) // 8
        ptr = ".ptr" in p
        return m[1], ty, (int(m[2]) if m[2] else None), (int(al[1]) if al and not ptr else w)

    def kernel(self, name):
        """The entry of that name, parsed but not decoded."""
        return Kernel(self, name, *self.entries[name])


def imm(o, ty):
    """An immediate as a numpy scalar of type ty ("Constants")."""
    s = o.text.rstrip("U")
    neg = s.startswith("-")
    s = s.lstrip("-")
    dt = DT[ty]
    if s[:2] in ("0f", "0F"):
        bits = int(s[2:], 16)
        src = f32
    elif s[:2] in ("0d", "0D"):
        bits = int(s[2:], 16)
        src = f64
    elif re.fullmatch(r"0[xX][0-9a-fA-F]+|0[bB][01]+|\d+", s):
        v = int(s, 8) if re.fullmatch(r"0[0-7]+", s) else int(s, 0)
        v = -v if neg else v
        if dt.kind == "f":
            raise PtxError(f"integer immediate {o.text} for .{ty}")
        if dt.kind == "b":
            return np.bool_(v != 0)
        return np.array(v & (1 << 8 * dt.itemsize) - 1, UDT[dt.itemsize]).view(dt)[()]
    else:
        bits = np.array(float(s), f64).view(u64).item()
        src = f64
    v = np.array(bits, UDT[np.dtype(src).itemsize]).view(src)
    v = -v if neg else v
    if dt.kind == "f":
        return v.astype(dt)[()]
    if v.itemsize != dt.itemsize:
        raise PtxError(f"float immediate {o.text} for .{ty}")
    return v.view(UDT[dt.itemsize]).view(dt)[()]
