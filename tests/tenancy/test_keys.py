"""The file of keys, and the commands that make it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from kvplane.events.errors import BadCredentials
from kvplane.projections.tenants import Limits
from kvplane.services.cli import main
from kvplane.services.process import private
from kvplane.services.tenancy import keys
from kvplane.services.tenancy.keys import changing, read_keys
from tests.support.commands import started
from tests.support.keys import make_key

if TYPE_CHECKING:
    from pathlib import Path


def test_a_secret_opens_its_own_key_and_lies_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "keys.json"
    secrets = {name: make_key(file, name) for name in ("a", "b", "c" * 128)}
    held = read_keys(file)
    for name, secret in secrets.items():
        found = held.find(secret.encode())
        assert found is not None
        assert found.name == name
        assert len(secret) >= 43
        assert secret not in file.read_text()
        digest = hashlib.sha256(secret.encode()).hexdigest()
        # The hash is no key, nor is what begins like one.
        for wrong in (digest, secret[:-1], secret + " ", secret.lower(), "", "kvp-"):
            assert held.find(wrong.encode()) is None
    assert len(set(secrets.values())) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_key_that_is_replaced_or_removed_opens_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first = make_key(file, "a", concurrent=3)
    with changing(file) as held, pytest.raises(BadCredentials, match="--replace"):
        held.add("a", Limits(), [])
    second = make_key(file, "a", ("m",), requests_per_minute=7)
    found = read_keys(file).find(second.encode())
    assert found is not None
    assert (found.limits, found.models, read_keys(file).find(first.encode())) == (Limits(7), ["m"], None)
    with changing(file) as held:
        held.remove("a")
        held.save()
        with pytest.raises(BadCredentials, match="kvplane key list"):
            held.remove("a")
    assert read_keys(file).find(second.encode()) is None


@pytest.mark.parametrize("name", ["", "x" * 129, "line\nend", "\x00"])
def test_a_name_is_one_that_the_log_takes(tmp_path: Path, name: str) -> None:
    with pytest.raises(Exception, match="key"):
        make_key(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"keys": 1}', b'{"keys": [{}]}', b'{"keys": [], "more": 1}', b"\xff", b"[" * 100_000,
     b'{"keys": [{"name": "a", "sha256": "00"}]}'],
)  # fmt: skip
def test_what_is_no_file_of_keys_is_refused_with_a_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(BadCredentials, match="is no file of keys"):
        read_keys(file)


def test_a_name_twice_and_too_long_a_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    make_key(file, "a")
    held = json.loads(file.read_text())
    file.write_text(json.dumps({"keys": held["keys"] * 2}))
    with pytest.raises(BadCredentials, match="twice"):
        read_keys(file)
    monkeypatch.setattr(keys, "FILE_BYTES", 10)
    with pytest.raises(BadCredentials, match="more than 10 bytes"):
        read_keys(file)
    with pytest.raises(BadCredentials, match="make one"):
        read_keys(tmp_path / "none")


def test_commands_at_once_lose_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    make_key(file, "first")
    processes = [
        subprocess.Popen(
            started("key", "add", f"k{at}", "--keys", str(file)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for at in range(3)
    ]
    for at in range(10):
        make_key(file, f"own{at}")
    secrets = [process.communicate()[0].strip() for process in processes]
    held = read_keys(file)
    assert len(held.all) == 14
    assert [held.find(secret).name for secret in secrets] == ["k0", "k1", "k2"]  # type: ignore[union-attr]
    # Nobody waits for ever for another.
    monkeypatch.setattr(private, "LOCK_SECONDS", 0.0)
    descriptor = os.open(tmp_path / ".keys.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(BadCredentials, match="another command"):
        make_key(file, "x")
    os.close(descriptor)


def test_the_commands_say_the_secret_once_and_never_the_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "keys")

    def said(*words: str) -> tuple[str, str]:
        main(["key", *words, "--keys", file])
        shown = capsys.readouterr()
        return shown.out, shown.err

    out, err = said("add", "a", "--models", "x", "--tokens-per-minute", "9000")
    secret = out.strip()
    assert read_keys(tmp_path / "keys").find(secret.encode()) is not None
    assert secret not in err
    listed = said("list")[0] + said("list", "--json")[0]
    assert "9,000" in listed
    assert secret not in listed
    assert hashlib.sha256(secret.encode()).hexdigest() not in listed
    again = said("add", "a", "--replace")[0].strip()
    assert again != secret
    said("remove", "a")
    assert json.loads(said("list", "--json")[0]) == {"keys": []}
    for words in (("add", "b", "--concurrent", "-1"), ("remove", "b"), ("add", "b" * 200)):
        with pytest.raises(SystemExit) as ended:
            said(*words)
        assert ended.value.code == 1
