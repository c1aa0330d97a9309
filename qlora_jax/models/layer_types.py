"""Attentions of layers from the fields of config.json that name their kinds."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.nn.attention import Attention


def attentions_of(
    fields: Mapping[str, Any], *, scale: float | None = None, ropes: Mapping[str, str] | None = None
) -> tuple[Attention, ...]:
    """Attention of each layer by `layer_types`, whose absent value transformers' class has filled in.

    Args:
        fields: of config.json; `sliding_window` is the window of layers of type sliding_attention.
        scale: of the scores.
        ropes: type of a layer -> name of its rotary table; by default one table turns all.

    Raises:
        UserError: layers slide, and there is no window.
    """
    types, window = fields["layer_types"], fields.get("sliding_window")
    if "sliding_attention" in types and fields.get("use_sliding_window") is False:
        raise UserError("config.json: layer_types has sliding_attention, but use_sliding_window is false.")
    if "sliding_attention" in types and window is None:
        raise UserError("config.json: sliding_window is missing, but layer_types has sliding_attention.")
    by_type = {
        kind: Attention(
            window=window if kind == "sliding_attention" else None,
            rope="default" if ropes is None else ropes[kind],
            scale=scale,
        )
        for kind in set(types)
    }
    return tuple(by_type[kind] for kind in types)
