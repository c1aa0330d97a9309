"""Runs in processes of their own that are killed or stopped at random moments and started again: the same bits."""

import re
import resource
import signal
import time
from pathlib import Path

import pytest
from fixtures.finetune_helpers import (
    GROUPED_RUN,
    PACKED_RUN,
    assert_same_run,
    child_environment,
    count_metrics,
    doomed_environment,
    kill_child,
    last_error,
    make_resumable,
    read_metrics,
    resumable_flags,
    run_child,
    start_child,
    wait_for_child,
    wait_until,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_resumable(tmp_path_factory.mktemp("kill"))


def uninterrupted(place, name, values):
    status, _, err = run_child(resumable_flags(place, name, values), env=child_environment(PYTHONWARNINGS="error"))
    assert status == 0, err
    assert "Warning" not in err
    return place / name


@pytest.fixture(scope="module")
def grouped(place):
    return uninterrupted(place, "grouped", GROUPED_RUN)


@pytest.fixture(scope="module")
def packed(place):
    return uninterrupted(place, "packed", PACKED_RUN)


@pytest.fixture
def doomed():
    """Environment of children that are killed; what they compile is in the cache since the run left alone."""
    return doomed_environment(PYTHONWARNINGS="error")


def being_saved(directory: Path, since: float):
    """A checkpoint, not the first, has been begun since a time and is not complete."""
    if not list(directory.glob("checkpoint-*")):
        return False
    for path in directory.glob(".checkpoint-*.tmp"):
        try:
            if path.stat().st_mtime > since:
                return True
        except FileNotFoundError:
            continue
    return False


def kill_at_random(process, directory, kind, rng):
    """Send SIGKILL some lines of metrics further on, or while a checkpoint is written; return whether it still ran."""
    began, lines = time.time(), count_metrics(directory)
    if kind == "lines":
        target = lines + rng.randint(1, 6)
        reached = wait_until(process, lambda: count_metrics(directory) >= target)
        delay = rng.uniform(0, 0.1)
    else:
        # The run first removes what the one before left.
        reached = wait_until(process, lambda: being_saved(directory, began))
        delay = rng.uniform(0, 0.05)
    time.sleep(delay)
    killed = kill_child(process)
    print(f"{kind}: reached {reached}, {delay:.3f} s later killed {killed}, {count_metrics(directory)} lines")
    return killed


@pytest.mark.parametrize(
    ("golden", "values", "kinds"),
    [
        ("grouped", GROUPED_RUN, ("lines", "save", "lines", "save")),
        ("packed", PACKED_RUN, ("lines", "save")),
    ],
)
def test_killed_and_resumed_is_bit_identical(place, doomed, request, rng, golden, values, kinds):
    golden = request.getfixturevalue(golden)
    name = f"{golden.name}-killed"
    killed = 0
    for kind in kinds:
        killed += kill_at_random(start_child(resumable_flags(place, name, values), env=doomed), place / name, kind, rng)
    status, out, err = run_child(resumable_flags(place, name, values), env=doomed)
    assert status == 0, err
    assert killed == len(kinds)
    assert re.search(r"resuming .* after step \d+ of 24", out)
    assert_same_run(place / name, golden)
    steps = [line["step"] for line in read_metrics(place / name) if "loss" in line]
    assert steps == list(range(1, 25))


def test_stopped_by_a_signal_and_resumed_is_bit_identical(place, doomed, grouped, rng, handlers):
    # A shell that starts tests in the background has them ignore Ctrl-C, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = place / "stopped"
    stops = []
    for number in (signal.SIGTERM, signal.SIGINT):
        target = count_metrics(output) + rng.randint(1, 4)
        process = start_child(resumable_flags(place, output.name, GROUPED_RUN), env=doomed)
        assert wait_until(process, lambda target=target: count_metrics(output) >= target)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(number)
        status, out, err = wait_for_child(process)
        assert status == 75, err
        assert f"{number.name}: saving after this step" in out
        assert "Traceback" not in err
        stop = re.search(r"^interrupted after step (\d+); run the same command again to resume$", err, re.MULTILINE)
        assert stop, err
        stops.append(int(stop[1]))
        print(f"{number.name}: stopped after step {stops[-1]}")
        assert (output / f"checkpoint-{stops[-1]:06d}" / "adapter_config.json").exists()
        assert max(line["step"] for line in read_metrics(output)) == stops[-1]
        assert not (output / "adapter").exists()
    assert 0 < stops[0] < stops[1] < 24
    status, out, err = run_child(resumable_flags(place, output.name, GROUPED_RUN), env=doomed)
    assert status == 0, err
    assert f"resuming {output} after step {stops[1]} of 24" in out
    # The checkpoints of the stops are beside the regular ones; the newest three are the same.
    assert_same_run(output, grouped)


def test_disk_full_keeps_earlier_checkpoints_and_can_be_resumed(place, doomed, grouped):
    output = place / "full"
    process = start_child(resumable_flags(place, output.name, GROUPED_RUN), env=doomed)
    assert wait_until(process, lambda: (output / "checkpoint-000003").exists())
    # No file may grow beyond this from now on; an adapter has 32 kB.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16000, 16000))
    status, _, err = wait_for_child(process)
    assert status == 1, err
    message = last_error(err)
    assert "could not be saved: " in message
    assert "earlier checkpoints are intact" in message
    saved = sorted(output.glob("checkpoint-*"))
    assert saved
    assert f"checkpoint-{3 * len(saved) + 3:06d} could not be saved" in message
    status, out, err = run_child(resumable_flags(place, output.name, GROUPED_RUN), env=doomed)
    assert status == 0, err
    assert f"after step {3 * len(saved)} of 24" in out
    assert_same_run(output, grouped)
