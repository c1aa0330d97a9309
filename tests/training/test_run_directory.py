"""A run's directory: checkpoints that are whole or absent, whose run it is, what is cleaned up and when."""

import dataclasses
import gc
import json
import logging
import os
import shutil
import subprocess
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import files
from qlora_jax.errors import UserError
from qlora_jax.files import read_checked_json, write_checked_json, write_json
from qlora_jax.training import run_directory
from qlora_jax.training.config import FREE_FLAGS, TrainConfig
from qlora_jax.training.ownership import check_output_dir
from qlora_jax.training.run_directory import RunDirectory
from qlora_jax.training.step import TrainState

IDENTITY = {"data": "abc", "devices": 1}


def config_for(path, **changes):
    return TrainConfig(output_dir=str(path / "run"), **({"save_total_limit": 3} | changes))


def open_run(path, identity=IDENTITY, **changes):
    return RunDirectory.open(config_for(path, **changes), identity)


def state_at(step):
    """A state of odd bits: subnormals, negative zero, the largest float."""
    rng = np.random.default_rng(step)
    values = rng.standard_normal((2, 3, 5)).astype(np.float32)
    values.flat[:4] = [-0.0, 1e-45, np.finfo(np.float32).max, step]
    return TrainState(
        {"a": jnp.asarray(values), "b": jnp.asarray(-values)},
        ({"mu": jnp.asarray(values / 2)}, jnp.asarray(step, jnp.int32)),
        jnp.asarray(step, jnp.int32),
    )


def write_adapter(directory):
    (directory / "adapter_config.json").write_text("{}")


def save(run, step):
    return run.save(step, state_at(step), {"data": {"epoch": 0, "index": step}, "tokens": 10 * step}, write_adapter)


def check(run, step):
    abstract = jax.eval_shape(lambda: state_at(0))
    state, position = run.restore(step, abstract)
    assert position == {"data": {"epoch": 0, "index": step}, "tokens": 10 * step}
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    run = open_run(tmp_path)
    assert run.checkpoints() == []
    path = save(run, 7)
    assert path == tmp_path / "run" / "checkpoint-000007"
    assert sorted(entry.name for entry in path.iterdir()) == [
        "SHA256SUMS", "adapter_config.json", "position.json", "run.json", "state",
    ]  # fmt: skip
    check(open_run(tmp_path), 7)
    # A step that is saved already is left as it is.
    before = path.stat().st_mtime_ns
    assert save(run, 7) == path
    assert path.stat().st_mtime_ns == before


def test_the_newest_are_kept(tmp_path):
    run = open_run(tmp_path, save_total_limit=2)
    for step in (3, 6, 9, 999_999, 1_000_000):
        save(run, step)
    assert run.checkpoints() == [999_999, 1_000_000]
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint-1000000", "checkpoint-999999", "run.json"]
    check(run, 999_999)
    check(run, 1_000_000)
    # A lower limit takes effect at the next save, and none is deleted before the new one is whole.
    run = open_run(tmp_path, save_total_limit=1)
    assert run.checkpoints() == [999_999, 1_000_000]
    save(run, 1_000_001)
    assert run.checkpoints() == [1_000_001]


def test_other_entries_are_no_checkpoints(tmp_path):
    run = open_run(tmp_path)
    save(run, 2)
    for name in ("checkpoint-000004.bak", "checkpoint-", "checkpoint-x", "my-checkpoint-000005"):
        (run.path / name).mkdir()
    assert run.checkpoints() == [2]


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize("at", range(12))
def test_killed_in_a_save_leaves_old_or_new_but_nothing_half(tmp_path, monkeypatch, at):
    run = open_run(tmp_path, save_total_limit=2)
    for step in (1, 2):
        save(run, step)
    count = 0

    def kill():
        nonlocal count
        count += 1
        if count > at:
            raise Killed

    def hooked(real):
        def call(*args, **kwargs):
            kill()
            result = real(*args, **kwargs)
            kill()
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.os, "replace", hooked(os.replace))
        patch.setattr(run_directory.os, "rename", hooked(os.rename))
        patch.setattr(run_directory.shutil, "rmtree", hooked(shutil.rmtree))
        patch.setattr(run_directory.ocp, "save", hooked(run_directory.ocp.save))
        with pytest.raises(Killed):
            save(run, 3)
            raise AssertionError("fewer operations than thought; lower the range")
    left = run.checkpoints()
    assert left in ([1, 2], [1, 2, 3], [2, 3])
    for step in left:
        check(run, step)
    run = open_run(tmp_path, save_total_limit=2)
    assert not list(run.path.glob(".checkpoint-*"))
    assert run.checkpoints() == left
    save(run, 4)
    assert run.checkpoints() == [left[-1], 4]
    check(run, 4)
    assert not list(run.path.glob(".*"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: writing [os_error_code='28']\nand more"), "the disk is full"),
        (ValueError("OUT_OF_RANGE: File too large\nand more"), "OUT_OF_RANGE: File too large"),
        (UserError("Cannot write the adapter to x: it is broken."), "Cannot write the adapter to x: it is broken"),
    ],
    ids=["errno", "tensorstore", "other", "adapter"],
)
@pytest.mark.parametrize("where", ["state", "adapter", "position", "rename"])
def test_a_save_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, error, reason, where):
    run = open_run(tmp_path)
    save(run, 1)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        if where == "state":
            patch.setattr(run_directory.ocp, "save", fail)
        elif where == "position":
            patch.setattr(run_directory.files, "write_json", fail)
        elif where == "rename":
            patch.setattr(run_directory.os, "rename", fail)
        with pytest.raises(UserError) as failure:
            run.save(2, state_at(2), {}, fail if where == "adapter" else write_adapter)
    message = str(failure.value)
    assert message.startswith(f"{run.path / 'checkpoint-000002'} could not be saved: {reason}")
    assert "earlier checkpoints are intact" in message
    assert "\n" not in message
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint-000001", "run.json"]
    check(run, 1)
    save(run, 2)
    check(run, 2)


def test_a_file_size_limit_is_a_failed_save(tmp_path):
    """The operating system's own refusal, through orbax's threads."""
    import resource

    run = open_run(tmp_path)
    save(run, 1)
    big = dataclasses.replace(state_at(2), lora=jnp.asarray(np.random.default_rng(0).random(200_000, np.float32)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not be saved: .*earlier checkpoints are intact"):
            run.save(2, big, {}, write_adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.checkpoints() == [1]
    check(run, 1)


@pytest.mark.parametrize(
    ("changes", "identity", "said"),
    [
        ({"learning_rate": 1e-3}, {}, "`learning_rate` was 0.0002, now 0.001"),
        ({"seed": 1, "lora_r": 8}, {}, "`lora_r` was 64, now 8; `seed` was 0, now 1"),
        ({"max_steps": 5}, {}, "`max_steps` was 10000, now 5"),
        ({"quant_type": "fp4"}, {}, "`quant_type` was 'nf4', now 'fp4'"),
        ({}, {"data": "xyz"}, "data was 'abc', now 'xyz'"),
        ({}, {"devices": 2}, "devices was 1, now 2"),
    ],
)
def test_another_run_is_refused(tmp_path, changes, identity, said):
    run = open_run(tmp_path)
    save(run, 1)
    record = (run.path / "run.json").read_bytes()
    with pytest.raises(UserError) as error:
        open_run(tmp_path, IDENTITY | identity, **changes)
    assert f"holds the checkpoints of another run ({said})" in str(error.value)
    assert "`overwrite_output_dir` to delete it" in str(error.value)
    assert (run.path / "run.json").read_bytes() == record
    check(open_run(tmp_path), 1)
    # Without checkpoints there is nothing to protect.
    shutil.rmtree(run.path / "checkpoint-000001")
    assert open_run(tmp_path, IDENTITY | identity, **changes).checkpoints() == []


def test_flags_that_may_change(tmp_path):
    save(open_run(tmp_path), 1)
    changes = {
        "save_steps": 3, "save_strategy": "no", "save_total_limit": 1, "logging_steps": 1, "eval_steps": 7,
        "report_to": "none", "run_name": "x", "prompts": "p", "max_new_tokens": 3, "do_sample": True,
    }  # fmt: skip
    assert open_run(tmp_path, **changes).checkpoints() == [1]


def test_bits_that_were_4_by_default_may_be_left_to_the_checkpoint(tmp_path):
    save(open_run(tmp_path, bits=4), 1)
    assert open_run(tmp_path, bits="auto").checkpoints() == [1]
    with pytest.raises(UserError, match="`bits` was 'auto', now 8"):
        open_run(tmp_path, bits=8)


def test_a_constant_schedule_may_be_made_longer(tmp_path):
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 2}
    save(open_run(tmp_path, **fixed), 1)
    assert open_run(tmp_path, max_steps=20_000, **fixed).checkpoints() == [1]
    with pytest.raises(UserError, match="`lr_scheduler_type` was 'constant', now 'linear'"):
        open_run(tmp_path, max_steps=20_000, lr_scheduler_type="linear", warmup_steps=2)


def test_every_flag_that_may_change_exists():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= FREE_FLAGS


def test_overwrite(tmp_path):
    run = open_run(tmp_path)
    save(run, 1)
    (run.path / "metrics.jsonl").write_text("{}\n")
    (run.path / "adapter").mkdir()
    (run.path / "notes.txt").write_text("mine")
    assert open_run(tmp_path, overwrite_output_dir=True, seed=5).checkpoints() == []
    assert sorted(path.name for path in run.path.iterdir()) == ["notes.txt", "run.json"]


def test_overwrite_spares_a_directory_that_is_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    open_run(tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "run" / "thesis.tex").exists()


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def foreign(path, *names):
    """Another program's files and directories."""
    path.mkdir(exist_ok=True)
    for name in names:
        file = path / name if "." in name else path / name / "state.bin"
        file.parent.mkdir(exist_ok=True)
        file.write_text("theirs")


HUGGING_FACE = ("checkpoint-500", "adapter", "wandb", "trainer_state.json")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (HUGGING_FACE, "holds checkpoint-500, adapter, not written by a run of this program"),
        (("checkpoint-000500",), "holds checkpoint-000500, not written"),
        (("adapter",), "holds adapter, not written"),
        (("metrics.jsonl",), "holds metrics.jsonl, not written"),
        (("tensorboard",), "holds tensorboard, not written"),
        (("run.json",), r"run\.json is damaged or not of a run of this version of qlora-jax"),
    ],
)
def test_what_other_programs_wrote_is_neither_deleted_nor_overwritten(tmp_path, names, said, overwrite):
    run = tmp_path / "run"
    foreign(run, *names)
    before = contents(run)
    with pytest.raises(UserError, match=said):
        open_run(tmp_path, overwrite_output_dir=overwrite)
    with pytest.raises(UserError, match=said):
        check_output_dir(config_for(tmp_path, overwrite_output_dir=overwrite))
    assert contents(run) == before


def test_names_that_a_run_does_not_write_are_no_obstacle(tmp_path):
    foreign(tmp_path / "run", "wandb", "adapter")
    run = open_run(tmp_path, do_train=False)
    assert contents(run.path).keys() == {"wandb/state.bin", "adapter/state.bin", "run.json"}


def test_overwrite_deletes_only_what_the_record_proves(tmp_path):
    run = open_run(tmp_path, report_to="none")
    save(run, 1)
    # Made by other programs in the directory of the run, after it began.
    foreign(run.path, "wandb", "tensorboard", "trainer_state.json")
    theirs = {name: value for name, value in contents(run.path).items() if value == b"theirs"}
    for changes in ({"report_to": "none"}, {"report_to": "none", "seed": 7}):
        again = open_run(tmp_path, overwrite_output_dir=True, **changes)
        assert again.checkpoints() == []
        assert {name: value for name, value in contents(run.path).items() if name != "run.json"} == theirs
    for report_to in ("wandb", "tensorboard", "all"):
        with pytest.raises(UserError, match=r"holds .*not written by a run of this program"):
            open_run(tmp_path, overwrite_output_dir=True, report_to=report_to)
    # A checkpoint of another program, numbered in the same way, is neither counted nor deleted nor overwritten.
    foreign(run.path, "checkpoint-900")
    assert run.checkpoints() == []
    with pytest.raises(UserError, match="holds checkpoint-900, not written"):
        open_run(tmp_path, overwrite_output_dir=True, report_to="none")
    assert contents(run.path / "checkpoint-900") == {"state.bin": b"theirs"}


def test_a_run_remembers_what_it_wrote_under_other_settings(tmp_path):
    save(open_run(tmp_path, report_to="all"), 1)
    run = open_run(tmp_path, report_to="none")  # resumed
    for name in ("wandb", "tensorboard"):
        (run.path / name).mkdir()
    open_run(tmp_path, report_to="all")
    open_run(tmp_path, report_to="none", overwrite_output_dir=True)
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_a_record_without_the_list_of_what_was_written(tmp_path):
    """As earlier versions wrote it: the settings say which directories were the run's."""
    run = open_run(tmp_path, report_to="wandb")
    save(run, 1)
    record = read_checked_json(run.path / "run.json")
    for key in ("wrote", "facts"):
        del record[key]
    write_checked_json(run.path / "run.json", record)
    (run.path / "wandb").mkdir()
    assert open_run(tmp_path, report_to="wandb").checkpoints() == [1]
    open_run(tmp_path, report_to="wandb", overwrite_output_dir=True)
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_checkpoints_without_a_record(tmp_path):
    run = open_run(tmp_path)
    save(run, 1)
    (run.path / "run.json").unlink()
    assert open_run(tmp_path).checkpoints() == [1]  # the checkpoint has a copy
    (run.path / "run.json").unlink()
    (run.path / "checkpoint-000001" / "run.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds checkpoints without a run\.json"):
            open_run(tmp_path, overwrite_output_dir=overwrite)
    assert run.checkpoints() == [1]


def test_facts_are_those_of_the_beginning(tmp_path):
    def facts(value, **changes):
        return RunDirectory.open(config_for(tmp_path, **changes), IDENTITY, {"kernels": value}).facts

    assert facts("fused") == {"kernels": "fused"}
    assert facts("xla") == {"kernels": "xla"}  # nothing had been done: the run begins anew
    save(open_run(tmp_path), 1)
    save(RunDirectory.open(config_for(tmp_path), IDENTITY, {"kernels": "unfused"}), 2)
    assert facts("xla") == {"kernels": "unfused"}
    assert read_checked_json(tmp_path / "run" / "run.json")["facts"] == {"kernels": "unfused"}
    assert facts("xla", overwrite_output_dir=True) == {"kernels": "xla"}


def test_nothing_is_left_changed_in_the_process(tmp_path, monkeypatch):
    """Warning filters and log levels, after saves and loads that succeed and that fail."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.INFO)

    def process_wide():
        return list(warnings.filters), [logger.level for logger in loggers]

    before = process_wide()
    run = open_run(tmp_path)
    save(run, 1)
    check(run, 1)
    assert process_wide() == before
    with pytest.raises(UserError), monkeypatch.context() as patch:
        patch.setattr(run_directory.ocp, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        save(run, 2)
    assert process_wide() == before
    remove_state(run.checkpoint_path(1))
    (run.checkpoint_path(1) / "state").mkdir()
    files.write_checksums(run.checkpoint_path(1))
    with pytest.raises(UserError, match="cannot be restored"):
        run.restore(1, jax.eval_shape(lambda: state_at(0)))
    assert process_wide() == before
    assert [logger.level for logger in loggers] == [logging.INFO, logging.INFO]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"flags": {}}'])
def test_a_damaged_record(tmp_path, caplog, content):
    """A checkpoint's copy takes its place; without one nothing says whose the directory is."""
    run = open_run(tmp_path)
    save(run, 1)
    record = (run.path / "run.json").read_bytes()
    (run.path / "run.json").write_bytes(content)
    assert open_run(tmp_path).checkpoints() == [1]
    assert caplog.text.count("run.json cannot be used (") == 1 and "its copy" in caplog.text
    assert (run.path / "run.json").read_bytes() == record
    (run.path / "run.json").write_bytes(content)
    (run.path / "checkpoint-000001" / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json is damaged or not of a run of this version"):
        open_run(tmp_path)
    assert run.checkpoints() == [1]


def test_a_record_without_a_digest(tmp_path):
    run = open_run(tmp_path)
    write_json(run.path / "run.json", {"flags": {}, "identity": {}})
    with pytest.raises(UserError, match=r"run\.json .*an earlier version of qlora-jax.*go on with the version"):
        open_run(tmp_path)


def test_sha256sum_reads_the_digests(tmp_path):
    path = save(open_run(tmp_path), 1)
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 4


def test_the_newest_intact_checkpoint_is_resumed_and_the_others_are_kept_aside(tmp_path, caplog):
    run = open_run(tmp_path)
    abstract = jax.eval_shape(lambda: state_at(0))
    for step in (1, 2, 3):
        save(run, step)
    truncate(run.checkpoint_path(3))
    assert run.newest_intact() == run.checkpoint_path(2)
    with pytest.raises(UserError, match=r"checkpoint-000003 is damaged: its file state/.* `strict_resume=False`"):
        run.restore_newest(abstract, strict=True)
    assert run.checkpoints() == [1, 2, 3]
    remove_position(run.checkpoint_path(2))
    step, state, position = run.restore_newest(abstract)
    assert (step, position["tokens"], run.checkpoints()) == (1, 10, [1])
    assert bytes(np.asarray(state.lora["a"])) == bytes(np.asarray(state_at(1).lora["a"]))
    assert "checkpoint-000003 is damaged: its file state/" in caplog.text
    assert "its file position.json is missing" in caplog.text
    assert "It is kept as checkpoint-000002.damaged" in caplog.text
    truncate(run.checkpoint_path(1))
    for _ in range(2):  # nothing is begun anew, nor renamed, unasked
        with pytest.raises(UserError, match="no checkpoint that is intact"):
            run.restore_newest(abstract)
        assert run.checkpoints() == [1]
    assert run.newest_intact() is None
    # They are the run's own.
    open_run(tmp_path, overwrite_output_dir=True)
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_damaged_checkpoints(tmp_path):
    run = open_run(tmp_path)
    abstract = jax.eval_shape(lambda: state_at(0))
    for step, damage in enumerate((truncate, remove_state, remove_position, break_position), 1):
        path = save(run, step)
        damage(path)
        with pytest.raises(UserError) as error:
            run.restore(step, abstract)
        assert str(path) in str(error.value)
        shutil.rmtree(path)
    save(run, 9)
    wrong = dataclasses.replace(abstract, lora={"a": jax.ShapeDtypeStruct((2, 3, 6), jnp.float32)})
    with pytest.raises(UserError, match="checkpoint-000009 cannot be restored"):
        run.restore(9, wrong)
    gc.collect()  # orbax leaves coroutines behind that must not warn, here or in another test


def truncate(path):
    for file in (path / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")


def remove_state(path):
    shutil.rmtree(path / "state")


def remove_position(path):
    (path / "position.json").unlink()


def break_position(path):
    (path / "position.json").write_text('{"data"')


def test_json_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"x": [1, None, "é"]})
    assert json.loads(file.read_text()) == {"x": [1, None, "é"]}
    with monkeypatch.context() as patch:
        patch.setattr(run_directory.os, "replace", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": [1, None, "é"]}
