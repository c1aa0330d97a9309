"""Fields of a run's configuration that have no effect beside others: refused, or told in a line, never ignored."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

from qlora_jax.choices import OWN_BLOCKS
from qlora_jax.defaults import DEFAULT_DATASET


@dataclasses.dataclass(frozen=True)
class Idle:
    """Fields that have no effect under a condition.

    Attributes:
        fields: of `TrainConfig`.
        when: (configuration) -> the condition holds.
        why: end of "`fields` has no effect ..."; {name} stands for the value of a field.
        advice: end of an error.
        refused: "changed", where one is not its default: command lines of the reference program spell many defaults
            out, which contradicts nothing. "given", with its default too. "never", where it only waits for the other
            field to be changed back, as `eval_steps` does for `do_eval`.
    """

    fields: tuple[str, ...]
    when: Callable[[Any], bool]
    why: str
    advice: str = "leave it out"
    refused: Literal["changed", "given", "never"] = "changed"


_ONE = "leave out one of them"
_ADD = "give that too, or leave it out"

IDLE = (
    Idle(("quant_type", "double_quant", "block_size"), lambda c: c.bits in (8, 16), "with `bits={bits}`"),
    Idle(
        ("double_quant", "block_size"), lambda c: c.bits in ("auto", 4) and c.quant_type in OWN_BLOCKS,
        "with `quant_type={quant_type}`, which has its own",
    ),
    Idle(("kernel",), lambda c: c.bits in (8, 16), "with `bits={bits}`", refused="never"),
    Idle(
        ("lora_r", "lora_alpha", "lora_modules"), lambda c: c.adapter is not None, "with `adapter`, which has its own",
        refused="never",
    ),
    Idle(("sequence_length",), lambda c: not c.packing, "without `packing`", _ADD),
    Idle(("group_by_length",), lambda c: c.packing, "with `packing`"),
    Idle(("eval_dataset", "eval_split", "eval_dataset_size"), lambda c: not c.do_eval, "with `do_eval=False`", _ONE),
    Idle(
        ("max_eval_samples", "eval_steps", "per_device_eval_batch_size"), lambda c: not c.do_eval,
        "with `do_eval=False`", refused="never",
    ),
    Idle(("eval_dataset_size",), lambda c: c.eval_dataset is not None, "with `eval_dataset`", _ONE),
    Idle(("eval_dataset_size",), lambda c: c.eval_split is not None, "with `eval_split`", _ONE),
    Idle(
        ("eval_dataset_size",), lambda c: c.dataset == DEFAULT_DATASET,
        f"with `dataset={DEFAULT_DATASET}`, which has held-out rows of its own",
    ),
    Idle(
        ("max_steps",), lambda c: c.num_train_epochs is not None, "with `num_train_epochs={num_train_epochs}`", _ONE
    ),
    Idle(("warmup_ratio",), lambda c: c.warmup_steps is not None, "with `warmup_steps={warmup_steps}`", _ONE),
    Idle(("adam_beta1", "adam_beta2"), lambda c: c.optim in ("adafactor", "sgd"), "with `optim={optim}`"),
    Idle(("adam_epsilon",), lambda c: "adamw" not in c.optim, "with `optim={optim}`"),
    Idle(
        ("gradient_checkpointing",),
        lambda c: c.remat is not None and c.gradient_checkpointing == (c.remat == "none"),
        "with `remat={remat}`, which says the opposite", _ONE, "given",
    ),
    Idle(("temperature", "top_k", "top_p"), lambda c: not c.do_sample, "without `do_sample`", _ADD),
    Idle(
        ("max_new_tokens", "do_sample"), lambda c: c.prompts is None and c.dataset != DEFAULT_DATASET,
        "without `prompts`", refused="never",
    ),
    Idle(("save_steps",), lambda c: c.save_strategy == "no", "with `save_strategy=no`", refused="never"),
    Idle(
        ("run_name",), lambda c: c.report_to not in ("wandb", "all"), "with `report_to={report_to}`", refused="never"
    ),
)  # fmt: skip
"""Every such combination; what trains a model has no effect without `do_train` either, and is not listed."""


def changed_fields(config: Any) -> frozenset[str]:
    """List the fields that do not have their default."""
    return frozenset(field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default)


def idle_fields(config: Any) -> frozenset[str]:
    """List the fields that have no effect beside the others."""
    return frozenset(name for rule in IDLE if rule.when(config) for name in rule.fields)


def idle_refusals(config: Any, given: Collection[str], changed: Collection[str] = ()) -> list[str]:
    """List a sentence for every field that has no effect and says another thing than the rest.

    Args:
        config: values by field.
        given: fields that were given, be it with their defaults.
        changed: those among them that do not have their defaults.
    """
    return [
        f"`{name}={getattr(config, name)}` has no effect {text}; {rule.advice}."
        for rule, name, text in _idle(config, given)
        if rule.refused == "given" or (rule.refused == "changed" and name in changed)
    ]


def idle_notes(config: Any, given: Collection[str]) -> list[str]:
    """List a sentence for every field that was given and has no effect; of a configuration without `idle_refusals`."""
    return list({name: f"`{name}` has no effect {text}." for _, name, text in _idle(config, given)}.values())


def _idle(config: Any, given: Collection[str]) -> Iterator[tuple[Idle, str, str]]:
    """Rule, field and reason of every field that was given and has no effect."""
    for rule in IDLE:
        if rule.when(config):
            text = rule.why.format(**vars(config))
            yield from ((rule, name, text) for name in rule.fields if name in given)
