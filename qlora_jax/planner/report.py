"""Plans in words."""

from qlora_jax.device_memory import CONTEXT_BYTES, RESERVE_FRACTION
from qlora_jax.formatting import format_bytes, table
from qlora_jax.planner.accounting import ALLOWANCE, TEMPORARIES, Plan, Program
from qlora_jax.planner.bounds import Bound
from qlora_jax.planner.scopes import OTHER

_SHOWN_SCOPES = 4
_NAMES = {
    "base_packed": "packed base",
    "unquantised_norm": "unquantised norms",
    "optimizer_device": "optimizer",
    "optimizer_host": "optimizer",
}
_TITLES = {
    TEMPORARIES: "activations and temporaries",
    ALLOWANCE: f"allowance: CUDA context {format_bytes(CONTEXT_BYTES)}, reserve {RESERVE_FRACTION:.0%}",
}


def _both_units(count: int) -> str:
    """Write a byte count in the paper's unit and in that of tools: '5.20 GB (4.84 GiB)'."""
    return f"{count / 1e9:.2f} GB ({count / 2**30:.2f} GiB)"


def class_title(name: str) -> str:
    """Write a class of bytes for people."""
    return _TITLES.get(name) or _NAMES.get(name, name.replace("_", " "))


def verdict(plan: Plan) -> str:
    """Say in a few words if a plan fits, and by how much."""
    over = plan.device_excess
    words = f"fits, {_both_units(-over)} to spare" if over <= 0 else f"does not fit: {_both_units(over)} too much"
    if plan.host_excess > 0:
        words += f"; the host lacks {_both_units(plan.host_excess)}"
    return words


def describe(plan: Plan) -> str:
    """Write bytes by class, a column for each program of the step, and their totals."""
    columns = [phase.by_class | {ALLOWANCE: plan.allowance.total} for phase in plan.phases]
    names = list(dict.fromkeys(name for column in columns for name in column if name not in _TITLES)) + list(_TITLES)
    rows = [["on the device", *(phase.program.name for phase in plan.phases)]]
    for name in names:
        cells = [format_bytes(column.get(name, 0)) for column in columns]
        rows.append([class_title(name), *cells])
    rows.append(["total", *(format_bytes(sum(column.values())) for column in columns)])
    lines = [table(rows)]
    if plan.host:
        host = [(class_title(name), format_bytes(count)) for name, count in plan.host.items()]
        lines.append(table([("on the host (pinned)", ""), *host]))
    lines.extend(_scopes(phase.program) for phase in plan.phases if set(phase.program.scopes) - {OTHER})
    lines.append(f"Device: {_both_units(plan.device_bytes)} of {_both_units(plan.device_limit)}: {verdict(plan)}")
    limit = "" if plan.host_limit is None else f" of {_both_units(plan.host_limit)}"
    lines.append(f"Host (pinned): {_both_units(plan.host_bytes)}{limit}")
    return "\n".join(lines)


def _scopes(program: Program) -> str:
    """Write the scopes that hold most temporaries of a program at the fullest moment of its heap."""
    largest = sorted(program.scopes.items(), key=lambda item: -item[1])[:_SHOWN_SCOPES]
    shares = ", ".join(f"{name} {format_bytes(count)}" for name, count in largest)
    return f"Most of the temporaries of {program.name}, of {format_bytes(program.temporaries)}: {shares}"


def describe_bound(bound: Bound, dataset_seconds: float | None = None) -> str:
    """Put a bound in words; every figure says which side it bounds."""
    words = (
        f"A step takes at least {bound.seconds:.3g} s (by {bound.limited_by}), at most {bound.tokens_per_second:,.0f} "
        "tokens/s: a bound from data-sheet peaks, not a prediction"
    )
    if dataset_seconds is not None:
        words += f"; the dataset at least {dataset_seconds / 3600:.2g} h an epoch"
    return words + "."
