"""Rematerialisation policies: what the backward pass of a layer finds in memory, and what it computes again."""

from collections.abc import Callable
from typing import Any

import jax

from qlora_jax.choices import Remat
from qlora_jax.nn.attention import ATTENTION
from qlora_jax.nn.linear import SAVED

# Name of a layer's input.
LAYER_INPUT = "layer_input"

_policies = jax.checkpoint_policies
POLICIES: dict[str, Any] = {
    "full": _policies.nothing_saveable,
    "save_attention": _policies.save_only_these_names(ATTENTION),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "none": _policies.save_only_these_names(SAVED, ATTENTION),
}
"""Policy of each name, for the body of a scan over layers:

full: only the layer's input is kept, on the device; the layer is computed twice.
save_attention: its input and what attention returned (and its row statistics); attention is computed once.
offload: only its input is kept, in pinned host memory; the device holds one layer's at a time.
none: the outputs of its linears and of attention are kept. Scores and elementwise results are computed again even so,
    which is cheaper than writing and reading them.
"""


def rematerialised(body: Callable[..., Any], remat: Remat, prevent_cse: bool = False) -> Callable[..., Any]:
    """Apply a policy of `POLICIES` to a layer.

    Args:
        body: the layer.
        remat: name of the policy.
        prevent_cse: keep XLA from merging the recomputation with the forward pass. Needed where both stand in one
            computation; in the body of a loop they do not, and there it only blocks fusion.
    """
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=POLICIES[remat])
