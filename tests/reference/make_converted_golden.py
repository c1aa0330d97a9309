"""Writes tests/golden/converted_tiny: a converted directory, to see that later versions still read it.

    python tests/reference/make_converted_golden.py

The one checked in was written at format version 1, before models other than LLaMA's could be converted.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fixtures.checkpoint_helpers import random_tensors, write_hf  # noqa: E402
from fixtures.tiny_configs import TINY_CONVERTED  # noqa: E402

from qlora_jax.checkpoints.conversion import convert  # noqa: E402
from qlora_jax.files import file_sizes  # noqa: E402
from qlora_jax.quantization import QuantizationConfig  # noqa: E402

TARGET = ROOT / "tests" / "golden" / "converted_tiny"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        source = write_hf(Path(scratch), TINY_CONVERTED, random_tensors(TINY_CONVERTED))
        shutil.rmtree(TARGET, ignore_errors=True)
        convert(source, TARGET, QuantizationConfig("nf4", 32, double_quant=True), "bfloat16")
    # Neither file may name the machine it was written on.
    (TARGET / "part-00000" / "commit_success.txt").write_text("Checkpoint commit was successful\n")
    manifest = TARGET / "qlora_jax.json"
    content = json.loads(manifest.read_text())
    content["source"] = "tests/reference/make_converted_golden.py"
    content["parts"][0]["files"] = file_sizes(TARGET / "part-00000")
    manifest.write_text(json.dumps(content, indent=1) + "\n")
