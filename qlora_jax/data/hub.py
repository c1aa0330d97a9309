"""Data sets of the Hugging Face hub: found, or told to be out of reach, in seconds."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from qlora_jax.errors import UserError

TIMEOUT_SECONDS = 4.0
"""Longest wait for the hub's first answer; the library of data sets itself tries six times."""


def load_from_hub(hub_id: str, split: str, told: str) -> Any:
    """Load a split of a data set from the hub, or where that cannot be reached from the cache of the library.

    Args:
        hub_id: "owner/name", or a name.
        split: as the library takes it, such as "train" or "train[:10%]".
        told: field and value of the configuration, for errors.

    Raises:
        UserError: there is no such data set or split, or it is out of reach and not cached.
    """
    # Imported here: it takes seconds, and local data does not need it.
    import datasets

    with _reading(datasets, hub_id, told, f" (split '{split}')"):
        return datasets.load_dataset(hub_id, split=split)


def split_names_on_hub(hub_id: str, told: str) -> tuple[str, ...]:
    """List the splits of a data set of the hub without loading them; arguments and errors as of `load_from_hub`."""
    import datasets

    with _reading(datasets, hub_id, told):
        return tuple(datasets.get_dataset_split_names(hub_id))


def ask_anew() -> None:
    """Forget which data sets the hub has answered about, so that it is asked again."""
    _silence.cache_clear()


@contextlib.contextmanager
def _reading(datasets: Any, hub_id: str, told: str, part: str = "") -> Iterator[None]:
    """Call the library of data sets in the block, which reads its cache if the hub is out of reach; tell its errors."""
    unreachable = _unreachable(hub_id, told)
    try:
        with _offline(datasets) if unreachable else contextlib.nullcontext():
            yield
    # The library lets errors of a dozen kinds through (HTTP, OS, Arrow, its own); all mean that there is no data set.
    except Exception as error:
        if unreachable:
            raise UserError(
                f"{told}: no such file here, and the Hugging Face hub cannot be reached ({unreachable}), "
                "nor is the data set in its cache; check the network, or pass a local file."
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{told}: no such file here, and the hub's data set of that name{part} cannot be loaded "
            f"({type(error).__name__}: {reason}); check the name and the split, or pass a local file."
        ) from error


def _unreachable(hub_id: str, told: str) -> str | None:
    """Return why the hub does not answer, in a few words; None if it does.

    Raises:
        UserError: it answers that there is no such data set, or not for everybody.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return _silence(hub_id)
    except GatedRepoError:
        raise UserError(
            f"{told} is gated on the Hugging Face hub; accept its terms there and log in (hf auth login or HF_TOKEN)."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{told} is neither a local file nor a data set on the Hugging Face hub; check the spelling, "
            "and log in (hf auth login or HF_TOKEN) if it is private."
        ) from None


@functools.lru_cache
def _silence(hub_id: str) -> str | None:
    """Ask the hub about a data set; return why there is no answer, None if there is one.

    A run asks once for each, however many splits it reads: without a network every answer takes `TIMEOUT_SECONDS`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(hub_id, timeout=TIMEOUT_SECONDS)
    except (GatedRepoError, RepositoryNotFoundError):
        raise
    except HfHubHTTPError as error:
        return f"HTTP status {error.response.status_code}"
    except Exception as error:  # the hub's client changed its HTTP library twice, and each has exceptions of its own
        return type(error).__name__
    return None


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Keep the library of data sets from the network while the block runs."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
