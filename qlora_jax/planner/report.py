"""Plans as people read them."""

from collections.abc import Mapping, Sequence

from qlora_jax.device_memory import CONTEXT_BYTES, RESERVE_FRACTION
from qlora_jax.formatting import format_bytes, table
from qlora_jax.planner.accounting import ALLOWANCE, TEMPORARIES, Plan
from qlora_jax.planner.bounds import Bound

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
    """As the paper counts and as tools show: '5.20 GB (4.84 GiB)'."""
    return f"{count / 1e9:.2f} GB ({count / 2**30:.2f} GiB)"


def _name(name: str) -> str:
    return _TITLES.get(name) or _NAMES.get(name, name.replace("_", " "))


def verdict(plan: Plan) -> str:
    """Whether it fits and by how much, in a few words."""
    over = plan.device_bytes - plan.device_limit
    words = f"fits, {_both_units(-over)} to spare" if over <= 0 else f"does not fit: {_both_units(over)} too much"
    if plan.host_limit is not None and plan.host_bytes > plan.host_limit:
        words += f"; the host lacks {_both_units(plan.host_bytes - plan.host_limit)}"
    return words


def describe(plan: Plan) -> str:
    """Bytes by class, a column for each program of the step, and what they come to."""
    columns = [phase.by_class | {ALLOWANCE: plan.allowance.total} for phase in plan.phases]
    names = list(dict.fromkeys(name for column in columns for name in column if name not in _TITLES)) + list(_TITLES)
    rows = [["on the device", *(phase.program.name for phase in plan.phases)]]
    for name in names:
        cells = [format_bytes(column.get(name, 0)) for column in columns]
        rows.append([_name(name), *cells])
    rows.append(["total", *(format_bytes(sum(column.values())) for column in columns)])
    lines = [table(rows)]
    if plan.host:
        host = [(_name(name), format_bytes(count)) for name, count in plan.host.items()]
        lines.append(table([("on the host (pinned)", ""), *host]))
    lines.append(f"Device: {_both_units(plan.device_bytes)} of {_both_units(plan.device_limit)}: {verdict(plan)}")
    limit = "" if plan.host_limit is None else f" of {_both_units(plan.host_limit)}"
    lines.append(f"Host (pinned): {_both_units(plan.host_bytes)}{limit}")
    return "\n".join(lines)


def describe_bound(bound: Bound, dataset_seconds: float | None = None) -> str:
    """The bound in words, each figure with the side it is a bound on."""
    words = (
        f"A step takes at least {bound.seconds:.3g} s (by {bound.limited_by}), at most {bound.tokens_per_second:,.0f} "
        "tokens/s: a bound from data-sheet peaks, not a prediction"
    )
    if dataset_seconds is not None:
        words += f"; the dataset at least {dataset_seconds / 3600:.2g} h an epoch"
    return words + "."


def comparison(rows: Mapping[str, tuple[Plan, Bound, int | None] | str], *, with_longest: bool) -> str:
    """A line for each GPU; a text in place of a plan says why there is none."""
    head = ["GPU", "memory", "device", "host", "fits", *(["max_seq"] if with_longest else []), "s/step >=", "tok/s <="]
    lines: list[Sequence[str]] = [head]
    for name, found in rows.items():
        if isinstance(found, str):
            continue
        plan, bound, longest = found
        lines.append(
            [
                name,
                *map(format_bytes, (plan.device_limit, plan.device_bytes, plan.host_bytes)),
                "yes" if plan.fits else "no",
                *([f"{longest:,}" if longest is not None else "?"] if with_longest else []),
                f"{bound.seconds:.3g}",
                f"{bound.tokens_per_second:,.0f}",
            ]
        )
    return "\n".join([table(lines), *(f"  {name}: {found}" for name, found in rows.items() if isinstance(found, str))])
