"""Break a tiny run again and again, at random from a seed, and compare what it comes to with a run that was left alone.

    python tests/soak.py --rounds 200 --seed 1

Each round starts the run, or resumes it, in a process of its own and does one thing to it: SIGKILL or SIGTERM after so
many steps, a second run in the same directory, or a limit on the size of files that stands for a full disk. Then, every
other time, a file of the run loses a bit, its end or itself. Whatever happens must end in exit status 0 or 75, in the
signal, or in one sentence; a run that is completed must have the bytes of the other's adapter, and no line of metrics
that the other has not. A run that cannot go on, as its every checkpoint is damaged, says so and is begun anew.
"""

import argparse
import collections
import dataclasses
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "reference")]

from fixtures.finetune_helpers import (  # noqa: E402
    GROUPED_RUN,
    child_environment,
    count_metrics,
    file_digest,
    kill_child,
    make_resumable,
    read_metrics,
    resumable_flags,
    run_child,
    start_child,
    wait_for_child,
    wait_until,
    without_timings,
)

from qlora_jax.files import LOCK_NAME  # noqa: E402
from qlora_jax.training.reporting import read_metrics as intact_metrics  # noqa: E402

INCIDENTS = ("kill", "stop", "race", "full disk", "left alone")
# Only these sentences may keep a run from going on.
HOPELESS = (
    "is damaged or not of a run of this version",
    "holds no checkpoint that is intact",
    "holds checkpoints without a run.json",
    "not written by a run of this program",
)


@dataclasses.dataclass
class Soak:
    """One directory in which runs are broken.

    Attributes:
        place: directory with model and data.
        random: decides everything.
        counts: incidents, damages and ends so far, by name.
    """

    place: Path
    random: random.Random
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        """Run once without being broken."""
        status, _, err = run_child(self._flags("alone"), env=child_environment())
        assert status == 0, err
        self._touched = False  # lines of metrics or answers were damaged

    @property
    def _run(self) -> Path:
        return self.place / "soaked"

    def _flags(self, name: str) -> list[str]:
        return resumable_flags(self.place, name, GROUPED_RUN)

    def round(self) -> None:
        """Start or resume the run, break it in one way, and check what came of it."""
        incident = self.random.choice(INCIDENTS)
        self.counts[incident] += 1
        status, err = getattr(self, "_" + incident.replace(" ", "_"))()
        assert "Traceback" not in err, err
        # SIGTERM has its default effect until Python has come to the program, and after it.
        assert status in (0, 1, 75, -signal.SIGKILL, -signal.SIGTERM), (status, err)
        if status == 0:
            self._compare()
        elif status == 1 and any(sentence in err for sentence in HOPELESS):
            self.counts["begun anew"] += 1
            shutil.rmtree(self._run)
        elif status == 1:
            assert "error: " in err, err
            assert incident == "full disk", err
        if self._run.exists() and self.random.random() < 0.5:
            self._damage()

    def _start(self, **options: object) -> subprocess.Popen[str]:
        return start_child(self._flags("soaked"), env=child_environment(), **options)

    def _later(self, process: subprocess.Popen[str]) -> bool:
        """Wait for some more lines of metrics, or for nothing; False if the run has ended."""
        lines = count_metrics(self._run) + self.random.randrange(-1, 12)
        return wait_until(process, lambda: count_metrics(self._run) > lines)

    def _kill(self) -> tuple[int, str]:
        process = self._start()
        self._later(process)
        if process.poll() is None and kill_child(process):
            return -signal.SIGKILL, ""
        return _ended(process)

    def _stop(self) -> tuple[int, str]:
        process = self._start()
        if self._later(process):
            process.send_signal(signal.SIGTERM)
        return _ended(process)

    def _race(self) -> tuple[int, str]:
        """Start two runs; a lock file that a killed run left behind may let the second come first."""
        first = self._start()
        if not wait_until(first, (self._run / LOCK_NAME).exists):
            return _ended(first)
        second = _ended(self._start())
        outcomes = [_ended(first), second]
        refused = [outcome for outcome in outcomes if "is in use by " in outcome[1]]
        assert len(refused) < 2, outcomes
        return next(outcome for outcome in outcomes if outcome not in refused)

    def _full_disk(self) -> tuple[int, str]:
        limit = self.random.randrange(2_000, 300_000)
        return _ended(self._start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))

    def _left_alone(self) -> tuple[int, str]:
        return _ended(self._start())

    def _damage(self) -> None:
        """Flip a bit of a file, cut it, or delete it."""
        files = sorted(path for path in self._run.rglob("*") if path.is_file() and path.stat().st_size)
        if not files:
            return
        file, kind = self.random.choice(files), self.random.choice(("flip", "flip", "flip", "cut", "delete"))
        self.counts[kind] += 1
        self._touched |= file.name in ("metrics.jsonl", "answers_before.json")
        content = bytearray(file.read_bytes())
        if kind == "delete":
            file.unlink()
        elif kind == "cut":
            file.write_bytes(content[: self.random.randrange(len(content))])
        else:
            bit = self.random.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)

    def _compare(self) -> None:
        """Compare a completed run with the one that was left alone, and begin another."""
        self.counts["completed"] += 1
        golden = self.place / "alone"
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert file_digest(self._run / "adapter" / name) == file_digest(golden / "adapter" / name), name
        want = without_timings(read_metrics(golden))
        if self._touched:
            got = [
                {key: value for key, value in line.items() if key != "crc32"}
                for line in intact_metrics(self._run / "metrics.jsonl")
            ]
            assert all(line in want for line in without_timings(got))
        else:
            assert without_timings(read_metrics(self._run)) == want
        shutil.rmtree(self._run)
        self._touched = False


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    status, _, err = wait_for_child(process)
    return status, err


def soak(rounds: int, seed: int, place: Path, *, report: bool = False) -> collections.Counter[str]:
    """Do that many rounds in an empty directory; AssertionError names the first difference."""
    soaked = Soak(make_resumable(place), random.Random(seed))
    for done in range(1, rounds + 1):
        soaked.round()
        if report and done % 10 == 0:
            print(f"{done} rounds: {dict(soaked.counts)}", flush=True)
    return soaked.counts


def main() -> None:
    """Soak, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        counts = soak(args.rounds, args.seed, Path(place), report=True)
    print(f"{args.rounds} rounds, seed {args.seed}, 0 differences: {dict(counts)}")


if __name__ == "__main__":
    main()
