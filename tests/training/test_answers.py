"""Files of prompts."""

import pytest

from qlora_jax.errors import UserError
from qlora_jax.training.answers import read_prompts
from qlora_jax.training.config import TrainConfig


def test_prompts_are_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_bytes("\ufeffhello\r\na\fb\u2028c\n\n  \nlast".encode())
    assert read_prompts(TrainConfig(prompts="~/prompts.txt")) == ("hello", "a\fb\u2028c", "last")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nosuchuser/x", "missing.txt"])
def test_a_file_that_cannot_be_read_is_one_sentence(name):
    with pytest.raises(UserError, match=r"cannot be (used|read): "):
        read_prompts(TrainConfig(prompts=name))
