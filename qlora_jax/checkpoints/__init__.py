"""Reading and writing models: base weights from Hugging Face or GGUF, converted bases, adapters in PEFT's format."""
