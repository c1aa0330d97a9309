"""Data sets of the hub: which are asked for, and what is said when they cannot be had. No network."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from qlora_jax.data import hub, load_rows, split_names
from qlora_jax.errors import UserError
from qlora_jax.training import datasets
from qlora_jax.training.config import TrainConfig

SPLITS = {"train": [{"instruction": "a", "output": "b"}], "test": [{"instruction": "c", "output": "d"}] * 2}


class FakeLibrary:
    """Stands for the module `datasets`."""

    def __init__(self):
        self.config = SimpleNamespace(HF_HUB_OFFLINE=False)
        self.asked, self.probed, self.cached = [], [], True

    def load_dataset(self, name, *, split):
        self.asked.append((name, split, self.config.HF_HUB_OFFLINE))
        if self.config.HF_HUB_OFFLINE and not self.cached:
            raise ConnectionError("Couldn't reach it\nat all")
        if split not in SPLITS:
            raise ValueError(f'Unknown split "{split}".\nShould be one of {list(SPLITS)}.')
        return SPLITS[split]

    def get_dataset_split_names(self, name):
        self.asked.append((name, "names", self.config.HF_HUB_OFFLINE))
        if self.config.HF_HUB_OFFLINE and not self.cached:
            raise ConnectionError("Couldn't reach it")
        return list(SPLITS)


@pytest.fixture
def library(monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: fake.probed.append(name))
    hub.ask_anew()
    yield fake
    hub.ask_anew()


def answering(monkeypatch, error):
    def dataset_info(self, name, timeout):
        assert timeout < 5
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)


def http(kind, status):
    return kind("said so", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_short_names_are_mapped(library):
    assert load_rows("alpaca").positions == ["tatsu-lab/alpaca train row 1"]
    rows = load_rows("alpaca-clean", split="test")
    assert (len(rows), rows.source) == (2, "yahma/alpaca-cleaned (test)")
    assert split_names("someone/some.set") == ("train", "test")
    assert library.asked == [
        ("tatsu-lab/alpaca", "train", False),
        ("yahma/alpaca-cleaned", "test", False),
        ("someone/some.set", "names", False),
    ]


def test_the_hub_is_probed_once_for_each_data_set(library, monkeypatch):
    assert split_names("a/b") == ("train", "test")
    load_rows("a/b")
    load_rows("a/b", split="test")
    load_rows("c/d")
    assert library.probed == ["a/b", "c/d"]
    answering(monkeypatch, ConnectionResetError())
    load_rows("a/b")
    assert library.asked[-1] == ("a/b", "train", False)
    hub.ask_anew()
    load_rows("a/b")
    assert library.asked[-1] == ("a/b", "train", True)


def test_a_run_asks_the_hub_anew(monkeypatch):
    probed = []
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: probed.append(name))
    monkeypatch.setattr(datasets, "_load_rows", lambda config: hub._unreachable("a/b", "") or 1 / 0)
    for runs in (1, 2):
        with pytest.raises(ZeroDivisionError):
            datasets.load_datasets(TrainConfig(), SimpleNamespace(name_or_path="", pad_token_id=0))
        assert len(probed) == runs


def test_out_of_reach_the_splits_are_those_of_the_cache(library, monkeypatch):
    answering(monkeypatch, ConnectionResetError())
    assert split_names("a/b") == ("train", "test")
    assert library.asked == [("a/b", "names", True)]
    library.cached = False
    with pytest.raises(UserError, match=r"^`dataset=a/b`: no such file here, and the .* nor is the data set in its"):
        split_names("a/b")


def test_a_split_that_is_not_there_is_told_with_those_that_are(library):
    with pytest.raises(
        UserError,
        match=r"^`eval_dataset=a/b`: no such file here, and the hub's data set of that name \(split 'dev'\) cannot be "
        r"loaded \(ValueError: Unknown split \"dev\"\. Should be one of \['train', 'test'\]\.\); check the name and",
    ):
        load_rows("a/b", split="dev", field="eval_dataset")


def test_what_is_no_id_is_not_asked_for(library):
    with pytest.raises(UserError, match="neither a file"):
        load_rows("what is this?")
    assert library.asked == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionResetError("no route"), "ConnectionResetError"),
        (http(HfHubHTTPError, 503), "HTTP status 503"),
        (OfflineModeIsEnabled("offline"), "OfflineModeIsEnabled"),
    ],
)
def test_out_of_reach_the_cache_is_read_and_else_the_connection_blamed(library, monkeypatch, error, reason):
    answering(monkeypatch, error)
    assert len(load_rows("oasst1")) == 1
    assert library.asked == [("timdettmers/openassistant-guanaco", "train", True)]
    assert not library.config.HF_HUB_OFFLINE
    library.cached = False
    with pytest.raises(UserError) as told:
        load_rows("oasst1")
    assert str(told.value) == (
        "`dataset=oasst1` (timdettmers/openassistant-guanaco): no such file here, and the Hugging Face hub cannot be "
        f"reached ({reason}), nor is the data set in its cache; check the network, or pass a local file."
    )
    assert not library.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http(GatedRepoError, 403), r"^`dataset=a/b` is gated on the Hugging Face hub; accept its terms there and log"),
        (http(RepositoryNotFoundError, 404), r"^`dataset=a/b` is neither a local file nor a data set on the Hugging"),
    ],
)
def test_a_refusal_of_the_hub_is_told_as_such(library, monkeypatch, error, message):
    answering(monkeypatch, error)
    with pytest.raises(UserError, match=message):
        load_rows("a/b")
    assert library.asked == []


def test_without_a_network_it_takes_seconds(tmp_path):
    """With the real libraries, and an address at which nothing listens in the hub's place."""
    program = """
import time
import datasets, huggingface_hub
from qlora_jax.data import load_rows
from qlora_jax.errors import UserError
begin = time.monotonic()
try:
    load_rows("oasst1")
except UserError as error:
    print(time.monotonic() - begin, error)
"""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    seconds, _, message = done.stdout.partition(" ")
    assert "the Hugging Face hub cannot be reached (ConnectError)" in message, done
    assert float(seconds) < 10
