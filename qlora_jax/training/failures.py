"""Ends of a run that are not its user's mistake: numbers that are not finite, and memory that does not suffice."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from qlora_jax.errors import UserError
from qlora_jax.formatting import format_bytes
from qlora_jax.training.run_directory import RunDirectory


class NonFiniteLoss(UserError):
    """Training met a loss or gradient that is not a number or infinite."""


class OutOfMemory(UserError):
    """A training step needed more memory than the device had left."""


class StepOutOfMemory(Exception):
    """The device refused memory to a training step.

    Attributes:
        step: number of the step.
        shape: of its batch, [A, B, S].
        program_bytes: device bytes of its gradient program; None if it was not compiled.
    """

    def __init__(self, step: int, shape: tuple[int, int, int], program_bytes: int | None):
        super().__init__(step, shape, program_bytes)
        self.step, self.shape, self.program_bytes = step, shape, program_bytes


def non_finite(found: str, step: int, example_ids: Sequence[str], directory: RunDirectory) -> NonFiniteLoss:
    """Make the error for a loss that is not finite, e.g. "loss nan"."""
    return NonFiniteLoss(
        f"{found} at step {step} (rows: {', '.join(example_ids)}); {_last_checkpoint(directory)}. "
        "Lower `learning_rate`, or look at those rows."
    )


@contextlib.contextmanager
def advised_out_of_memory(
    directory: RunDirectory, advise: Callable[[tuple[int, int, int]], Sequence[str]]
) -> Iterator[None]:
    """Turn StepOutOfMemory into OutOfMemory, with the lines that `advise` has for the shape [A, B, S] of the batch."""
    try:
        yield
    except StepOutOfMemory as failure:
        micro_batches, rows, length = failure.shape
        program = failure.program_bytes
        needs = "" if program is None else f" (its program alone takes {format_bytes(program)})"
        advice = "".join(f"\n  {line}" for line in advise(failure.shape))
        raise OutOfMemory(
            f"step {failure.step} ran out of device memory on {micro_batches} x {rows} rows of {length} tokens{needs}; "
            f"{_last_checkpoint(directory)}. What would need less:{advice}"
        ) from failure


def _last_checkpoint(directory: RunDirectory) -> str:
    intact = directory.newest_intact()
    return "no checkpoint had been saved" if intact is None else f"the last good checkpoint is {intact}"
