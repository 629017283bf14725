"""The cache on disk: whole entries only, whoever writes, and a bounded folder."""

import logging
import os
import threading

import pytest

from engine.diskcache import DiskCache, remembered_sha256

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # sha256 of "hello"


@pytest.mark.parametrize("value", [b"", b"some rows", bytes(range(256)) * 300])
def test_a_value_comes_back_as_it_was_written(tmp_path, value):
    cache = DiskCache(tmp_path / "deep" / "cache", 10**6)
    assert cache.read("dance") is None
    cache.write("dance", value)
    assert cache.read("dance") == value
    assert cache.read("Dance") is None


def test_entries_are_their_owners_alone(tmp_path):
    DiskCache(tmp_path, 10**6).write("dance", b"some rows")
    (entry,) = tmp_path.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:-1] + b"?", lambda d: b""])
def test_a_damaged_entry_is_logged_and_not_returned(tmp_path, caplog, damage):
    cache = DiskCache(tmp_path, 10**6)
    cache.write("dance", b"some rows")
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cache.read("dance") is None
    assert "damaged" in caplog.text


def test_concurrent_writers_and_readers_see_whole_entries_alone(tmp_path, caplog):
    cache = DiskCache(tmp_path, 10**6)
    choices = [bytes([n]) * 20_000 for n in range(4)]
    wrong = []

    def work(value):
        for _ in range(25):
            cache.write("dance", value)
            held = cache.read("dance")
            if held not in choices:
                wrong.append(held)

    threads = [threading.Thread(target=work, args=(value,)) for value in choices]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert caplog.text == ""
    assert len(list(tmp_path.iterdir())) == 1  # no part is left behind


def test_the_entries_longest_unused_are_dropped_beyond_the_limit(tmp_path):
    cache = DiskCache(tmp_path, limit_bytes=13_000)  # three entries of 4000 bytes and a digest
    for age, text in enumerate("abc"):
        before = set(tmp_path.iterdir())
        cache.write(text, text.encode() * 4000)
        (fresh,) = set(tmp_path.iterdir()) - before
        os.utime(fresh, ns=(10**18 + age, 10**18 + age))  # the clock of a disk is coarse
    assert cache.read("a") == b"a" * 4000  # used now: "b" is the oldest
    cache.write("d", b"d" * 4000)
    assert cache.read("b") is None
    kept = [cache.read(text) for text in ("a", "c", "d")]
    assert kept == [b"a" * 4000, b"c" * 4000, b"d" * 4000]


def test_a_value_beyond_the_limit_is_not_kept_and_drops_nothing(tmp_path, caplog):
    cache = DiskCache(tmp_path, limit_bytes=1000)
    cache.write("small", bytes(500))
    cache.write("large", bytes(1000))
    assert cache.read("large") is None
    assert cache.read("small") == bytes(500)
    assert "1000 bytes are too many" in caplog.text
    cache.write("just", bytes(968))
    assert cache.read("just") == bytes(968)


def test_a_folder_that_cannot_be_made_or_read_is_logged_and_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    cache = DiskCache(tmp_path / "file", 1000)
    cache.write("dance", b"some rows")
    assert "could not be kept" in caplog.text
    assert cache.read("dance") is None
    assert "cannot be read" in caplog.text
    path = tmp_path / "weights"
    path.write_bytes(b"hello")
    assert remembered_sha256(path, tmp_path / "file") == HELLO


def test_what_a_killed_worker_left_is_dropped_too(tmp_path):
    left = tmp_path / "half-written.part"
    left.write_bytes(bytes(5000))
    os.utime(left, (0, 0))
    (tmp_path / "another file").write_bytes(bytes(5000))
    DiskCache(tmp_path, limit_bytes=6000).write("dance", bytes(4000))
    assert not left.exists()
    assert (tmp_path / "another file").exists()


def test_a_hash_is_remembered_until_size_or_time_change(tmp_path):
    path, memos = tmp_path / "weights", tmp_path / "cache"
    path.write_bytes(b"hello")
    stat = path.stat()
    assert remembered_sha256(path, memos) == HELLO
    path.write_bytes(b"HELLO")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert remembered_sha256(path, memos) == HELLO  # nobody looked into the file
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert remembered_sha256(path, memos) != HELLO


@pytest.mark.parametrize("damage", [b"", HELLO[:-1].encode(), b"\xff" * 64, b"z" * 64])
def test_a_damaged_memo_is_not_believed(tmp_path, caplog, damage):
    path, memos = tmp_path / "weights", tmp_path / "cache"
    path.write_bytes(b"hello")
    remembered_sha256(path, memos)
    (memo,) = memos.iterdir()
    memo.write_bytes(damage)
    assert remembered_sha256(path, memos) == HELLO
    assert memo.read_text("utf-8") == HELLO
    assert f"{memo} is damaged" in caplog.text
