"""LoRA adapters as GGUF files, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) put beside a base of any type.

As llama.cpp's convert_lora_to_gguf.py writes them: `<tensor>.lora_a` [R, in] and `.lora_b` [out, R] in float32, the
rows of B in the order that llama.cpp has the base's rows in. Memory: the adapter, and one of its matrices.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

from qlora_jax.checkpoints.gguf_source import interleaved
from qlora_jax.checkpoints.gguf_writer import add_metadata, gguf_of
from qlora_jax.checkpoints.merging import Adapter
from qlora_jax.files import check_room
from qlora_jax.models import DecoderConfig, names


def write_gguf_adapter(adapter: Adapter, config: DecoderConfig, file: Path, *, title: str) -> None:
    """Write an adapter.

    Args:
        adapter: to write.
        config: of its base.
        file: to write.
        title: `general.name`.

    Raises:
        UserError: the family has no form in GGUF, or the disk has no room.
    """
    needed = sum(matrices.nbytes for matrices in adapter.tensors.values())
    check_room(file.parent, needed, f"the disk of {file.parent.parent}", "the export")
    writer = GGUFWriter(file, gguf_of(config, adapter.path).architecture)
    table = {name.ours: name for name in names(config)}
    try:
        add_metadata(
            writer,
            {
                "general.type": "adapter",
                "general.name": title,
                "adapter.type": "lora",
                "adapter.lora.alpha": float(adapter.config.alpha),
                "general.file_type": int(LlamaFileType.ALL_F32),
                "general.quantization_version": GGML_QUANT_VERSION,
            },
        )
        for layer in range(config.num_hidden_layers):
            for module in adapter.modules:
                name, (a, b) = table[".".join(module)], adapter.pair(module, layer)
                if name.gguf_layout == "interleaved_heads":
                    b = interleaved(b, config.head_dim)
                target = f"{str(name.gguf).replace('{i}', str(layer))}.weight"
                writer.add_tensor(f"{target}.lora_a", np.ascontiguousarray(a, np.float32))
                writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(b, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
