"""Compare what Ollama's own code makes of an exported Modelfile with the chat template of training.

python check_modelfile.py --render ./render-modelfile --modelfile out/Modelfile --model BASE [--dataset_format NAME]

`render_modelfile.go` says how render-modelfile is built. The renderer of tests/serving/test_templates.py is compared
too. The exit status is 1 if a conversation differs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fixtures import go_template

from qlora_jax.checkpoints.hub import resolve_model
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.data import CHAT, FORMATS

TURNS = [("user", "u 1"), ("assistant", "a {{ 2 }}\n"), ("user", "hello\nthere")]
CHATS = [
    [{"role": role, "content": text} for role, text in chat] for chat in (TURNS[:1], TURNS, [("system", "s"), *TURNS])
]


def main() -> int:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", type=Path, required=True)
    parser.add_argument("--modelfile", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset_format", choices=FORMATS, default=CHAT)
    args = parser.parse_args()
    of_format = FORMATS[args.dataset_format]
    chats = CHATS if of_format.chat else CHATS[: 1 + of_format.turns]
    tokenizer = load_tokenizer(resolve_model(args.model))
    done = subprocess.run(
        [args.render.resolve(), args.modelfile], input=json.dumps(chats), stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    for command in found["commands"]:
        print(command)
    commands = {command["Name"]: command["Args"] for command in found["commands"]}
    system = commands.get("system")
    different = 0
    for chat, rendered in zip(chats, found["rendered"], strict=True):
        expected = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, chat_template=of_format.template
        )
        # Ollama puts the beginning of a text there itself, where it is not that of every turn.
        same = rendered in (expected, expected.removeprefix(tokenizer.bos_token or ""))
        before = [] if system is None or chat[0]["role"] == "system" else [{"role": "system", "content": system}]
        same = same and rendered == go_template.render(commands["template"], [*before, *chat])
        different += not same
        print("same text" if same else f"DIFFERENT\n  Ollama:   {rendered!r}\n  training: {expected!r}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
