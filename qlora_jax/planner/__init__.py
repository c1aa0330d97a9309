"""What a run would need of a GPU that need not be there: bytes by class, the longest sequence, a bound on its time."""

from qlora_jax.planner.accounting import Allowance, Phase, Plan, Program, base_bytes, tree_bytes
from qlora_jax.planner.bounds import Bound, MatmulFlops, StepCost, bound, causal_fraction, count_products
from qlora_jax.planner.report import comparison, describe, describe_bound, verdict
from qlora_jax.planner.search import Longest, longest_sequence

__all__ = [
    "Allowance",
    "Bound",
    "Longest",
    "MatmulFlops",
    "Phase",
    "Plan",
    "Program",
    "StepCost",
    "base_bytes",
    "bound",
    "causal_fraction",
    "comparison",
    "count_products",
    "describe",
    "describe_bound",
    "longest_sequence",
    "tree_bytes",
    "verdict",
]
