"""Listing: what files, folders, globs and URLs stand for."""

import os
from pathlib import Path

import fsspec
import pytest

from retrodb.corpus.listing import expand_inputs, format_of
from retrodb.errors import InputError

EVERYTHING = ["a.jsonl.gz", "b.jsonl", "deep/c.parquet", "deep/er/d.TXT.zst"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in (
        "b.jsonl",
        "a.jsonl.gz",
        "deep/c.parquet",
        "deep/er/d.TXT.zst",
        "README",
        ".e.jsonl",
        ".hidden/f.jsonl",
    ):
        (root / name).write_bytes(b"x")
    return root


def names(root: Path, *inputs: str | Path) -> list[str]:
    return [os.path.relpath(file.url, root) for file in expand_inputs([str(given) for given in inputs]).files]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("x" + end, "jsonl") for end in (".jsonl", ".ndjson", ".json", ".JSONL.GZ", ".json.zstd")),
        *(("x" + end, "parquet") for end in (".parquet", ".pq", ".parquet.zst")),
        *(("x" + end, "text") for end in (".txt", ".text", ".md", ".txt.gz")),
        *(("x" + end, None) for end in ("", ".gz", ".csv", ".jsonl.bz2", ".gz.jsonl.tar")),
    ],
)
def test_the_extension_tells_the_format(name: str, kind: str | None) -> None:
    assert format_of(name) == kind


def test_a_folder_gives_all_readable_files_below_it_and_counts_the_others(folder: Path) -> None:
    assert names(folder, folder) == EVERYTHING
    assert expand_inputs([str(folder)]).skipped == 3  # README, .e.jsonl, .hidden


def test_a_file_reached_in_several_ways_is_listed_once_in_any_order(folder: Path) -> None:
    ways: list[str | Path] = [
        folder / "b.jsonl",
        f"{folder}/*",
        folder,
        f"file://{folder}/b.jsonl",
        f"{folder}/deep/../b.jsonl",
    ]
    assert names(folder, *ways) == EVERYTHING
    assert expand_inputs([str(way) for way in ways]) == expand_inputs([str(way) for way in reversed(ways)])


def test_globs_reach_into_folders(folder: Path) -> None:
    assert names(folder, f"{folder}/**/*.parquet") == ["deep/c.parquet"]
    assert names(folder, f"{folder}/d*") == ["deep/c.parquet", "deep/er/d.TXT.zst"]


def test_a_name_with_glob_characters_is_taken_literally_where_it_exists(folder: Path) -> None:
    (folder / "odd[1].jsonl").write_bytes(b"x")
    (folder / "a::b.jsonl").write_bytes(b"x")
    assert names(folder, folder / "odd[1].jsonl") == ["odd[1].jsonl"]
    assert names(folder, folder / "a::b.jsonl") == ["a::b.jsonl"]


def test_the_home_folder_and_relative_paths_are_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    expected = str(folder / "b.jsonl")
    assert [file.url for file in expand_inputs(["~/b.jsonl"]).files] == [expected]
    assert [file.url for file in expand_inputs(["b.jsonl"]).files] == [expected]


def test_links_are_followed_but_never_in_a_circle(folder: Path) -> None:
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "dangling.jsonl").symlink_to(folder / "nowhere")
    assert names(folder, folder) == EVERYTHING


def test_the_stamp_changes_when_the_file_does_and_only_then(folder: Path) -> None:
    (first,) = expand_inputs([str(folder / "b.jsonl")]).files
    assert expand_inputs([str(folder / "b.jsonl")]).files == (first,)
    (folder / "b.jsonl").write_bytes(b"y")
    os.utime(folder / "b.jsonl", ns=(1, 1))
    assert expand_inputs([str(folder / "b.jsonl")]).files[0].stamp != first.stamp


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("missing.jsonl", "no file, folder or match"),
        ("*.nothing", "no file, folder or match"),
        ("README", r"unknown extension.*\.jsonl"),
        ("R*", "1 hidden or of unknown kind"),
        ("empty", "holds no file"),
        ("", "empty string"),
        ("nosuchprotocol://x", "nosuchprotocol"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str, says: str
) -> None:
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=says):
        expand_inputs(["b.jsonl", given])


def test_no_input_and_only_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no input"):
        expand_inputs([])
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match="zero bytes"):
        expand_inputs([str(tmp_path)])


def test_a_pipe_is_refused_and_a_name_that_is_not_text_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="regular file"):
        expand_inputs([str(tmp_path / "pipe.jsonl")])
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl")).write_bytes(b"x")
    with pytest.raises(InputError, match="not valid UTF-8"):
        expand_inputs([str(tmp_path)])


def test_other_filesystems_list_alike() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl", "sub/b.txt", "sub/.hidden/c.txt", "sub/README"):
        memory.pipe(f"/listing/{name}", b"x")
    try:
        found = expand_inputs(["memory://listing", "memory://listing/a.jsonl", "memory://listing/**/*.txt"])
        assert [file.url for file in found.files] == ["memory:///listing/a.jsonl", "memory:///listing/sub/b.txt"]
        assert found.skipped == 2
        assert all(file.size == 1 and file.stamp for file in found.files)
        with pytest.raises(InputError, match="no file, folder or match"):
            expand_inputs(["memory://listing/none.jsonl"])
    finally:
        memory.rm("/listing", recursive=True)
