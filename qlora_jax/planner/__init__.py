"""Plans of a run for a GPU that need not be there: bytes by class, the longest sequence, bounds on its time.

`planner.decoding` has bounds on generation.
"""

from qlora_jax.planner.accounting import Allowance, BaseBytes, Phase, Plan, Program, tree_bytes
from qlora_jax.planner.bounds import Bound, MatmulFlops, StepCost, bound, count_products, visible_fraction
from qlora_jax.planner.report import describe, describe_bound, verdict
from qlora_jax.planner.search import Longest, longest_sequence

__all__ = [
    "Allowance",
    "BaseBytes",
    "Bound",
    "Longest",
    "MatmulFlops",
    "Phase",
    "Plan",
    "Program",
    "StepCost",
    "bound",
    "count_products",
    "describe",
    "describe_bound",
    "longest_sequence",
    "tree_bytes",
    "verdict",
    "visible_fraction",
]
