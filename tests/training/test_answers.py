"""Files of prompts, and texts of answers."""

import types

import pytest
from fixtures.finetune_helpers import make_tokenizer

from qlora_jax.errors import UserError
from qlora_jax.training.answers import Questionnaire, read_prompts
from qlora_jax.training.config import TrainConfig


def test_prompts_are_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_bytes("\ufeffhello\r\na\fb\u2028c\n\n  \nlast".encode())
    assert read_prompts(TrainConfig(prompts="~/prompts.txt")) == ("hello", "a\fb\u2028c", "last")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nosuchuser/x", "missing.txt"])
def test_a_file_that_cannot_be_read_is_one_sentence(name):
    with pytest.raises(UserError, match=r"cannot be (used|read): "):
        read_prompts(TrainConfig(prompts=name))


@pytest.mark.parametrize(("dataset_format", "text"), [("oasst1", "Ho."), ("messages", "Ho.### Human: And?")])
def test_an_answer_ends_where_the_next_turn_would_begin(dataset_format, text):
    asked = types.SimpleNamespace(tokenizer=make_tokenizer(), dataset_format=dataset_format)
    tokens = asked.tokenizer(" Ho.### Human: And?", add_special_tokens=False).input_ids
    assert Questionnaire._text(asked, tokens) == text
