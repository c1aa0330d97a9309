"""Write what transformers and PEFT compute with tiny random Qwen2, Qwen3 and Gemma 3 models, in float32.

    python make_family_golden.py --output-dir ../golden/families

writes, for every case of `cases()`, `<case>.json` and `<case>.npz`, and two adapters as PEFT saves them (`peft_qwen3/`,
`peft_gemma3/`).

`<case>.json`:
    versions          of the packages that computed the results
    config            config.json as the installed transformers writes it
    hub_configs       the same model as config.json files found on the hub describe it: {name: config}; the logits with
                      each of them were compared bit for bit with those of `config`
    layer_types       the kind of every layer, as transformers derives it
    weights           arguments of `random_weights`
    tensors           {name: shape} of the checkpoint that `save_pretrained` writes
    prompts           two lists of token ids
    adapter           rank, alpha, target_modules; arguments of `random_weights` and the factor on its values ("scale")
    smallest_margins  of the highest logit over the second: over all positions of `logits`, and over generated tokens

`<case>.npz`:
    input_ids int32 [2, 24], labels int32 [2, 24] (-100: not trained; not yet shifted)
    logits float32 [2, 24, V]           of the bare model
    adapted_logits float32 [2, 24, V]   with the adapter
    loss float32 []                     mean cross-entropy of the next tokens, with the adapter
    grad/<name> float32                 gradients of the loss, under the names of PEFT's adapter_model.safetensors
    generated int32 [2, 12]             greedy continuations of the prompts by the bare model, in one left-padded batch
    packed_ids, packed_positions, packed_segments int32 [1, 24], packed_logits float32 [1, 24, V]
                                        (some cases) two documents in a row; logits of each document on its own

The case `gemma3_gguf` is there for GGUF files, which cannot express all of the case `gemma3`; it has no adapter.
"""

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from random_weights import random_weights
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 96
SEQUENCE = 24
NEW_TOKENS = 12
DOCUMENTS = (10, 14)
PROMPTS = (9, 5)
MARGIN = 1e-3
RANK, ALPHA, ADAPTER_SCALE = 4, 8, 0.5
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA_WEIGHTS = {"norm_mean": 0.0, "embedding_scale": 0.05}


@dataclass
class Case:
    """A model, and what is computed with it."""

    model_class: type
    config: Any
    seed: int
    hub_configs: dict[str, dict]
    weights: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = field(default_factory=lambda: list(MODULES))
    packed: bool = False
    peft_directory: str | None = None


def default_rope(theta: float) -> dict:
    """Build `rope_parameters` without scaling."""
    return {"rope_type": "default", "rope_theta": theta}


def qwen2_case(seed: int, *, layers: int = 2, theta: float = 1e6, hub: Mapping[str, Any], **fields: Any) -> Case:
    """Build a Qwen2 or Qwen2.5 model; `hub` are fields of its hub file that differ from transformers' own."""
    config = Qwen2Config(
        **SIZES,
        num_hidden_layers=layers,
        max_position_embeddings=128,
        rope_parameters=default_rope(theta),
        dtype="float32",
        **fields,
    )
    hub_config = {  # as Qwen/Qwen2.5-0.5B has it
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        **SIZES,
        "initializer_range": 0.02,
        "max_position_embeddings": 128,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-06,
        "rope_theta": theta,
        "sliding_window": 128,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        **hub,
    }
    weights = {"embedding_scale": 0.2} if config.tie_word_embeddings else {}
    return Case(Qwen2ForCausalLM, config, seed, {"hub": hub_config}, weights)


def qwen3_case(seed: int) -> Case:
    """Build a Qwen3 model whose heads together are wider than the residual stream."""
    config = Qwen3Config(
        **SIZES,
        num_hidden_layers=3,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters=default_rope(1e6),
        dtype="float32",
    )
    hub_config = {  # as Qwen/Qwen3-8B has it
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        **SIZES,
        "initializer_range": 0.02,
        "max_position_embeddings": 128,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
    }
    return Case(Qwen3ForCausalLM, config, seed, {"hub": hub_config}, packed=True, peft_directory="peft_qwen3")


def gemma3_text(layers: int, query_pre_attn_scalar: int) -> Gemma3TextConfig:
    """Build the text model of Gemma 3; without `layer_types`, which then come from the pattern of six."""
    return Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=layers,
        head_dim=32,
        query_pre_attn_scalar=query_pre_attn_scalar,
        sliding_window=6,
        max_position_embeddings=128,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": default_rope(1e4),
        },
        dtype="float32",
    )


def gemma3_case(seed: int, layers: int, query_pre_attn_scalar: int) -> Case:
    """Build a Gemma 3 model without a vision tower."""
    config = gemma3_text(layers, query_pre_attn_scalar)
    hub_config = {  # as google/gemma-3-1b-it has it; tie_word_embeddings, true by default, is absent
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 95],
        "final_logit_softcapping": None,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        **SIZES,
        "initializer_range": 0.02,
        "max_position_embeddings": 128,
        "model_type": "gemma3_text",
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "query_pre_attn_scalar": query_pre_attn_scalar,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window": 6,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
    }
    # As google/gemma-3-270m-it has it: the pattern with an underscore, and the layers one by one.
    later = {key: value for key, value in hub_config.items() if key != "sliding_window_pattern"}
    later["_sliding_window_pattern"] = 6
    later["layer_types"] = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    later["transformers_version"] = "4.55.0.dev0"
    later["use_bidirectional_attention"] = False
    return Case(Gemma3ForCausalLM, config, seed, {"hub": hub_config, "hub_layer_types": later}, dict(GEMMA_WEIGHTS))


def gemma3_conditional_case(seed: int) -> Case:
    """Build a Gemma 3 model with a vision tower, which text does not pass."""
    text = gemma3_text(7, 24)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_use_head": False,
    }
    tokens = {"image_token_index": 93, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text.to_dict(), vision_config=dict(vision), **tokens, dtype="float32")
    hub_config = {  # as google/gemma-3-4b-it has it: text_config leaves out whatever has its default value
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 95],
        "initializer_range": 0.02,
        "model_type": "gemma3",
        "text_config": {
            **SIZES,
            "head_dim": 32,
            "max_position_embeddings": 128,
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 24,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 6,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": vision,
        **tokens,
    }
    return Case(
        Gemma3ForConditionalGeneration,
        config,
        seed,
        {"hub": hub_config},
        dict(GEMMA_WEIGHTS),
        # The vision tower has a q_proj, a k_proj and a v_proj too.
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    )


def cases() -> dict[str, Case]:
    """Name -> case."""
    gemma3 = gemma3_case(2185, 8, 24)
    gemma3.packed, gemma3.peft_directory = True, "peft_gemma3"
    gguf = gemma3_case(2197, 7, 32)  # llama.cpp divides scores by sqrt(head_dim)
    gguf.target_modules = None
    return {
        "qwen2_tied": qwen2_case(2191, tie_word_embeddings=True, hub={"tie_word_embeddings": True}),
        "qwen2_untied": qwen2_case(
            2112,
            theta=10000.0,
            rms_norm_eps=1e-5,
            hub={"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        ),
        "qwen2_sliding": qwen2_case(
            2153,
            layers=4,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=2,
            hub={
                "tie_word_embeddings": False,
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 2,
            },
        ),
        "qwen3": qwen3_case(2104),
        "gemma3": gemma3,
        "gemma3_conditional": gemma3_conditional_case(2216),
        "gemma3_gguf": gguf,
    }


def read_config(content: Mapping[str, Any]) -> Any:
    """Read a config.json as transformers reads a user's."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(content))
        return AutoConfig.from_pretrained(directory)


def build(case: Case, config: Any, directory: Path) -> tuple[Any, dict[str, list[int]]]:
    """Save a checkpoint with transformers, put random values in it and load it; also returns {name: shape}."""
    case.model_class(config).save_pretrained(directory)
    file = directory / "model.safetensors"
    shapes = {name: list(value.shape) for name, value in sorted(load_file(file).items())}
    save_file(random_weights(shapes.items(), case.seed, **case.weights), file, {"format": "pt"})
    model, info = case.model_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval(), shapes


def forward(model: Any, ids: np.ndarray) -> np.ndarray:
    """Compute float32 logits [B, S, V]."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids).long(), use_cache=False).logits.numpy()


def margin(logits: np.ndarray) -> float:
    """Return the smallest difference between the highest and the second logit."""
    top = np.sort(logits, axis=-1)
    return float((top[..., -1] - top[..., -2]).min())


def generate(model: Any, prompts: list[list[int]]) -> tuple[np.ndarray, float]:
    """Continue the prompts greedily, together; returns int32 [B, N] and the smallest margin.

    Raises:
        AssertionError: a continuation differs from the one found without padding and without a cache.
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
    generated = out[:, length:].numpy().astype(np.int32)
    assert generated.shape == (len(prompts), NEW_TOKENS)
    smallest = np.inf
    for prompt, continuation in zip(prompts, generated, strict=True):
        whole = np.array([prompt + continuation.tolist()], np.int32)
        logits = forward(model, whole)[:, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(logits.argmax(-1)[0], continuation)
        smallest = min(smallest, margin(logits))
    return generated, smallest


def adapt(model: Any, case: Case, arrays: dict[str, np.ndarray], output_dir: Path) -> dict[str, Any]:
    """Add a LoRA adapter with PEFT, compute logits, loss and gradients, and save it if the case says so."""
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=case.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora).eval()
    adapted.peft_config["default"].base_model_name_or_path = "tiny-random"
    trainable = {
        name.replace(".default.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    seed = case.seed + 100
    values = random_weights([(name, tuple(parameter.shape)) for name, parameter in trainable.items()], seed)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(torch.from_numpy(np.float32(ADAPTER_SCALE) * values[name]))
    out = adapted(
        input_ids=torch.from_numpy(arrays["input_ids"]).long(),
        labels=torch.from_numpy(arrays["labels"]).long(),
        use_cache=False,
    )
    out.loss.backward()
    arrays["adapted_logits"] = out.logits.detach().numpy()
    arrays["loss"] = out.loss.detach().numpy()
    check_loss(arrays)
    for name, parameter in trainable.items():
        arrays[f"grad/{name}"] = parameter.grad.numpy()
        assert np.abs(arrays[f"grad/{name}"]).max() > 1e-5, name
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)  # also writes a model card, which is not needed
        assert load_file(Path(directory, "adapter_model.safetensors")).keys() == trainable.keys()
        if case.peft_directory is not None:
            target = output_dir / case.peft_directory
            target.mkdir(exist_ok=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(Path(directory, name), target / name)
    return {
        "rank": RANK,
        "alpha": ALPHA,
        "target_modules": case.target_modules,
        "seed": seed,
        "scale": ADAPTER_SCALE,
        "directory": case.peft_directory,
    }


def check_loss(arrays: Mapping[str, np.ndarray]) -> None:
    """Compute the loss again from the logits, in float64."""
    logits = arrays["adapted_logits"][:, :-1].astype(np.float64)
    labels = arrays["labels"][:, 1:]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(arrays["loss"], -taken[labels != -100].mean(), rtol=1e-5)


def compute(name: str, case: Case, output_dir: Path) -> None:
    """Write the files of a case."""
    rng = np.random.default_rng(case.seed)
    arrays: dict[str, np.ndarray] = {"input_ids": rng.integers(0, VOCAB - 8, (2, SEQUENCE), dtype=np.int32)}
    described: dict[str, Any] = {
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "numpy")},
        "weights": {"seed": case.seed, **case.weights},
    }
    with tempfile.TemporaryDirectory() as directory:
        model, described["tensors"] = build(case, case.config, Path(directory))
        described["config"] = json.loads(Path(directory, "config.json").read_text())
    text_config = model.config.get_text_config()
    described["layer_types"] = text_config.layer_types
    arrays["logits"] = forward(model, arrays["input_ids"])
    described["hub_configs"] = case.hub_configs
    for hub_name, content in case.hub_configs.items():
        with tempfile.TemporaryDirectory() as directory:
            other, shapes = build(case, read_config(content), Path(directory))
        assert shapes == described["tensors"], hub_name
        np.testing.assert_array_equal(forward(other, arrays["input_ids"]), arrays["logits"])

    prompts = [rng.integers(3, VOCAB - 8, length).tolist() for length in PROMPTS]
    described["prompts"] = prompts
    arrays["generated"], generated_margin = generate(model, prompts)
    described["smallest_margins"] = {"logits": margin(arrays["logits"]), "generated": generated_margin}
    assert min(described["smallest_margins"].values()) > MARGIN, (name, described["smallest_margins"])
    distinct = [len(set(row)) for row in arrays["generated"].tolist()]
    assert min(distinct) >= NEW_TOKENS // 2, distinct

    if case.packed:
        documents = [rng.integers(0, VOCAB - 8, length, dtype=np.int32) for length in DOCUMENTS]
        arrays["packed_ids"] = np.concatenate(documents)[None]
        arrays["packed_positions"] = np.concatenate([np.arange(n, dtype=np.int32) for n in DOCUMENTS])[None]
        arrays["packed_segments"] = np.repeat(np.arange(1, 3, dtype=np.int32), DOCUMENTS)[None]
        arrays["packed_logits"] = np.concatenate([forward(model, document[None]) for document in documents], axis=1)

    labels = arrays["input_ids"].copy()
    labels[rng.random(labels.shape) < 0.3] = -100
    labels[0, :6] = -100  # as a prompt is
    labels[1, -5:] = -100  # as padding is
    arrays["labels"] = labels
    if case.target_modules is not None:
        described["adapter"] = adapt(model, case, arrays, output_dir)

    assert all(np.isfinite(array).all() for array in arrays.values())
    np.savez_compressed(output_dir / f"{name}.npz", **arrays)
    (output_dir / f"{name}.json").write_text(json.dumps(described, indent=1) + "\n")
    print(
        f"{name:20} logits rms {arrays['logits'].std():.3f}, margins {described['smallest_margins']}, "
        f"distinct {distinct}, loss {float(arrays.get('loss', np.nan)):.4f}",
        *(
            f", adapter moves logits by rms {(arrays['adapted_logits'] - arrays['logits']).std():.3f}"
            for _ in range("loss" in arrays)
        ),
    )


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--case", choices=cases(), help="this one only")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, case in cases().items():
        if args.case in (None, name):
            compute(name, case, args.output_dir)


if __name__ == "__main__":
    main()
