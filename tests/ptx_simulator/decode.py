"""Instructions to functions: the table of builders and what builders share.

A builder takes (kernel, instruction), consumes the modifiers it models and returns fn(cta, sel), which executes the
instruction for the selected threads. A modifier that is left over is not modelled, which is an error at once.
"""

from ptx_simulator.errors import PtxError
from ptx_simulator.operands import dst, src
from ptx_simulator.parsing import registers_of

BUILD = {}


def op(*names):
    def deco(f):
        for n in names:
            BUILD[n] = f
        return f

    return deco


def decode(kernel, collect=None):
    """Gives every instruction of the kernel its `fn`; what is not modelled raises NotImplementedError.

    With a list in `collect` the messages are gathered there instead.
    """
    for i in kernel.ins:
        try:
            build(kernel, i)
        except NotImplementedError as e:
            if collect is None:
                raise
            collect.append(str(e))
    for r, i in kernel.reads.items():
        if r not in kernel.writes and collect is None:
            name = next(n for (_, n), x in kernel.names.items() if x.i == r)
            raise PtxError(f"line {i.line}: reads {name}, which no instruction writes [{i.text[:100]}]")
    wg = frozenset().union(*(registers_of(i.ops[:2]) for i in kernel.ins if i.opcode.startswith("wgmma.mma_async")))
    for i in kernel.ins:
        i.touches = i.regs & wg if i.name != "wgmma" else frozenset()
    return kernel


def build(kernel, ins):
    """Decodes one instruction with the builder of its name and wraps it in its guard predicate."""
    b = BUILD.get(ins.name)
    if b is None:
        ins.bad()
    fn = b(kernel, ins)
    ins.done()
    if ins.guard:
        g, neg = ins.guard
        inner = fn
        kernel.reads.setdefault(g, ins)

        def fn(cta, sel):
            p = cta.registers[g][sel]
            p = ~p if neg else p
            if p.all():
                return inner(cta, sel)
            if p.any():
                return inner(cta, cta.ids(sel)[p])

    ins.fn = fn


def control(f):
    """Marks a builder whose instruction may change pc/blocked state."""

    def g(kernel, ins):
        ins.ctl = True
        return f(kernel, ins)

    return g


def simple(kernel, ins, ty, f, n, dty=None):
    """d = f(a, b, ..) elementwise."""
    if len(ins.ops) != n + 1:
        ins.bad("operand count")
    a = [src(kernel, ins, o, ty) for o in ins.ops[1:]]
    d = dst(kernel, ins, ins.ops[0], dty or ty)
    if n == 1:
        (x,) = a
        return lambda cta, sel: d(cta, sel, f(x(cta, sel)))
    if n == 2:
        x, y = a
        return lambda cta, sel: d(cta, sel, f(x(cta, sel), y(cta, sel)))
    return lambda cta, sel: d(cta, sel, f(*[x(cta, sel) for x in a]))
