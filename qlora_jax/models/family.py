"""A family of models: what it is called, what it reads, and the names of its tensors in every format.

One table of names serves conversion, GGUF files, PEFT adapters, merging and export, both ways.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from flax import nnx

from qlora_jax.nn.linear import QLoRAConfig

LAYER = "{i}"
"""In a `Name`, the number of the layer."""


class Name(NamedTuple):
    """A module's name in every format; its tensors are called `.weight` and `.bias` in all of them.

    Attributes:
        ours: dotted path in the model; a module inside `layers` has all layers on a leading axis.
        hf: in Hugging Face's checkpoints, with `{i}` for the layer.
        gguf: in llama.cpp's files; None if it has none there.
        gguf_layout: llama.cpp's change of the values, undone when read: "as_is"; "interleaved_heads", rows of each head
            in the order of interleaved rotary embedding; "plus_one", 1 was added.
        peft_name: in PEFT's files, where that is not `hf`: the module's path in memory.
    """

    ours: str
    hf: str
    gguf: str | None = None
    gguf_layout: str = "as_is"
    peft_name: str | None = None

    @property
    def peft(self) -> str:
        """Name in PEFT's files, without their `base_model.model.`."""
        return self.peft_name or self.hf


class GGUF(NamedTuple):
    """Description of a family in llama.cpp's files.

    Attributes:
        architecture: `general.architecture`, which also begins the metadata keys.
        hf_architecture: written as `architectures` of the config.json that is made of the metadata.
        hf_model_type: written as its `model_type`.
        fields: metadata key, without the architecture -> field of config.json, beside those of every decoder.
        reads: further metadata keys, without the architecture, that `derived` reads; any other is refused.
        derived: (the config.json made so far, lookup of a metadata key without the architecture, llama.cpp's names of
            the tensors) -> further fields of config.json.
        written: (configuration) -> metadata, without the architecture, to write beside those of every decoder.
        rope: name of the rotary table that the metadata of every decoder describe.
    """

    architecture: str
    hf_architecture: str
    hf_model_type: str
    fields: Mapping[str, str] = {}
    reads: tuple[str, ...] = ()
    derived: Callable[[Mapping[str, Any], Callable[[str], Any], Collection[str]], dict[str, Any]] = (
        lambda config, metadata, tensors: {}
    )
    written: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    rope: str = "default"


class Family(NamedTuple):
    """A family of models.

    Attributes:
        title: for people.
        architectures: names of Hugging Face's classes.
        config: config.json -> typed configuration, see `qlora_jax.models.decoder.DecoderConfig`.
        model: (configuration, how it is stored and computed) -> the model without its weights.
        names: (configuration) -> the table of its modules' names.
        lora_groups: name of a group of linears, such as "attention" -> the last parts of their paths.
        peft_task: PEFT's task type.
        gguf: llama.cpp's description, None if it has none.
        ignored: (configuration) -> regular expressions of checkpoint tensors that carry nothing the model needs.
        skipped: regular expressions of checkpoint tensors of parts that are left out -> what they are, for people.
        other_parts: (configuration) -> the model has parts that are left out, whose linears may be called as those of
            `lora_groups` are.
        aliases: (configuration) -> beginnings of tensor names that some checkpoints have -> that of the table.
    """

    title: str
    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], Any]
    model: Callable[[Any, QLoRAConfig], nnx.Module]
    names: Callable[[Any], tuple[Name, ...]]
    lora_groups: Mapping[str, tuple[str, ...]]
    peft_task: str = "CAUSAL_LM"
    gguf: GGUF | None = None
    ignored: Callable[[Any], tuple[str, ...]] = lambda config: ()
    skipped: Mapping[str, str] = {}
    other_parts: Callable[[Any], bool] = lambda config: False
    aliases: Callable[[Any], Mapping[str, str]] = lambda config: {}
