"""What a run would need of a GPU that need not be there: bytes by class, the longest sequence, a bound on its time."""

from qlora_jax.memory.accounting import Allowance, Phase, Plan, Program, base_bytes, tree_bytes
from qlora_jax.memory.bounds import Bound, Products, Work, bound, count_products, visible_fraction
from qlora_jax.memory.report import comparison, describe, describe_bound, verdict
from qlora_jax.memory.search import Longest, longest_sequence

__all__ = [
    "Allowance",
    "Bound",
    "Longest",
    "Phase",
    "Plan",
    "Products",
    "Program",
    "Work",
    "base_bytes",
    "bound",
    "comparison",
    "count_products",
    "describe",
    "describe_bound",
    "longest_sequence",
    "tree_bytes",
    "verdict",
    "visible_fraction",
]
