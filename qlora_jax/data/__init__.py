"""Data: rows from files and the hub, row formats, token masks, and resumable batches of bounded shapes."""

from qlora_jax.data.batching import (
    TOKEN_FIELDS,
    Batch,
    Batches,
    Field,
    abstract_batch,
    bucket_lengths,
    evaluation_batches,
)
from qlora_jax.data.demo import default_prompts, follows_style
from qlora_jax.data.formats import CHAT, FORMATS, Message, RowFormat, read_messages
from qlora_jax.data.loading import HUB_NAMES, Rows, evaluated_split, load_rows, split_names, split_rows
from qlora_jax.data.tokenization import (
    IGNORED,
    DataReport,
    Example,
    check_tokens,
    encode_conversation,
    encode_prompt,
    encode_text,
    eos_ids,
    tokenize_rows,
)

__all__ = [
    "CHAT",
    "FORMATS",
    "HUB_NAMES",
    "IGNORED",
    "TOKEN_FIELDS",
    "Batch",
    "Batches",
    "DataReport",
    "Example",
    "Field",
    "Message",
    "RowFormat",
    "Rows",
    "abstract_batch",
    "bucket_lengths",
    "check_tokens",
    "default_prompts",
    "encode_conversation",
    "encode_prompt",
    "encode_text",
    "eos_ids",
    "evaluated_split",
    "evaluation_batches",
    "follows_style",
    "load_rows",
    "read_messages",
    "split_names",
    "split_rows",
    "tokenize_rows",
]
