from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from llamamoe.data.files import find_files
from llamamoe.data.text import read_documents
from llamamoe.errors import LlamaMoeError, RefusedError, UsageError


def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("inside")
    (tmp_path / "secret.txt").write_text("outside")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("outside too")
    return folder


@pytest.mark.parametrize("target", ["../secret.txt", "../elsewhere"])
@pytest.mark.parametrize("pattern", ["corpus", "corpus/*.txt"])
def test_a_link_out_of_a_folder_is_named_and_refused(tmp_path, target, pattern):
    (corpus(tmp_path) / "link.txt").symlink_to(target)
    if "elsewhere" in target and "*" in pattern:  # a glob takes the files and leaves folders alone
        assert [path.name for path, _ in find_files([tmp_path / pattern])] == ["a.txt"]
        return
    with pytest.raises(RefusedError, match=r"link\.txt' is a link out of the folder") as caught:
        find_files([tmp_path / pattern])
    assert caught.value.hint


def test_globs_do_not_reach_through_linked_folders(tmp_path):
    (corpus(tmp_path) / "more").symlink_to("../elsewhere")
    with pytest.raises(RefusedError, match=r"b\.txt' is a link out of the folder '.*corpus'"):
        find_files([tmp_path / "corpus" / "*" / "*.txt"])


def test_links_inside_a_folder_and_links_that_are_named_are_read(tmp_path):
    folder = corpus(tmp_path)
    (folder / "again.txt").symlink_to("a.txt")
    assert len(find_files([folder])) == 1  # the same file
    (folder / "named.txt").symlink_to("../secret.txt")
    assert [d.text for d in read_documents([folder / "named.txt"])] == ["outside"]
    (folder / "named.txt").unlink()
    (tmp_path / "link").symlink_to("corpus")
    assert [d.text for d in read_documents([tmp_path / "link"])] == ["inside"]


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path):
    folder = tmp_path / "datasets--a" / "snapshots" / "0" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "datasets--a" / "blobs").mkdir()
    (tmp_path / "datasets--a" / "blobs" / "f00").write_text("cached")
    (folder / "a.txt").symlink_to("../../../blobs/f00")
    assert [d.text for d in read_documents([folder])] == ["cached"]


@pytest.mark.parametrize("place", ["corpus/x.jsonl", "corpus", "corpus/*.jsonl"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, place):
    os.mkfifo(corpus(tmp_path) / "x.jsonl")
    with pytest.raises(UsageError, match=r"x\.jsonl' is a pipe, not a regular file"):
        find_files([tmp_path / place])


def test_sockets_devices_and_links_to_them_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(corpus(tmp_path))  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x.txt")
        with pytest.raises(UsageError, match=r"x\.txt' is a socket"):
            find_files(["x.txt"])
    Path("zero.txt").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"zero\.txt' is a device"):
        find_files(["zero.txt"])


def test_a_link_to_nothing_in_a_folder_is_named(tmp_path):
    (corpus(tmp_path) / "gone.txt").symlink_to("nothing")
    with pytest.raises(UsageError, match=r"gone\.txt' cannot be read: No such file"):
        find_files([tmp_path / "corpus"])


def test_what_becomes_a_pipe_after_it_was_found_is_not_waited_for(tmp_path):
    folder = corpus(tmp_path)
    documents = read_documents([folder])
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    with pytest.raises(LlamaMoeError, match="is a pipe"):
        next(documents)
