"""A name that stands in a file leads to a file of its folder, or nowhere."""

import os

import pytest

from crosslmm import storage

LEADING_OUT = [
    "", ".", "..", "/etc/passwd", "//etc/passwd", "../x", "a/../../x", "a/..", "./x", "a/./x", "a/.", "C:/x", "c:x",
    "C:\\x", "/",
]  # fmt: skip
LITERAL = ["file:x", "s3:x", "..\\x", "%2e%2e", "%2fetc", "a..b", "...", "~", "~root/x", "a b", "é", "-", "$HOME"]


@pytest.mark.parametrize("folder", ["/data/train", "s3://bucket/train", "file:///data/train"])
@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_name_that_leads_out_is_refused(folder, name):
    with pytest.raises(storage.BadLocation, match="is not a name inside"):
        storage.join(folder, name)
    with pytest.raises(storage.BadLocation, match="is not a name inside"):
        storage.safe_join(folder, name)


@pytest.mark.parametrize("folder", ["/data/train", "s3://bucket/train"])
@pytest.mark.parametrize("name", [*LITERAL, "a/b", "file:a/b"])
def test_any_other_name_is_text(folder, name):
    assert storage.join(folder, name) == storage.safe_join(folder, name) == f"{folder}/{name}"


def test_a_scheme_in_a_name_is_text():
    assert storage.join("/data", "file:///etc/passwd") == "/data/file:/etc/passwd"
    assert storage.join("/data", "s3://other/x") == "/data/s3:/other/x"
    assert storage.join("s3://bucket/data", "s3://other/x") == "s3://bucket/data/s3://other/x"  # a key
    assert storage.join("s3://bucket/data", "a//b/") == "s3://bucket/data/a//b/"


@pytest.mark.parametrize("name", LITERAL)
def test_what_is_written_under_a_literal_name_is_in_the_folder(tmp_path, name):
    storage.write_bytes(storage.safe_join(str(tmp_path), name), b"x")
    assert storage.names_in(str(tmp_path)) == [name]
    assert storage.read_bytes(storage.safe_join(str(tmp_path), name)) == b"x"


@pytest.fixture
def folder(tmp_path):
    """A folder with links to itself, to its neighbour and to nowhere, reached through a link."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("secret")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("ours")
    for name, target in {
        "out": "../secret/file", "folder": "../secret", "absolute": f"{tmp_path}/secret/file", "here": "file",
        "chain": "out", "loop": "loop", "nowhere": "../nowhere", "up": "..",
    }.items():  # fmt: skip
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "way").symlink_to("data")
    return f"{tmp_path}/way"


@pytest.mark.parametrize("name", ["out", "folder/file", "folder/new", "absolute", "chain", "nowhere", "up/secret/file"])
def test_a_link_that_leads_out_is_refused(folder, name):
    with pytest.raises(storage.LeadsOut, match=r"a link leads out of its folder; replace it by what it links to"):
        storage.safe_join(folder, name)


def test_links_inside_and_into_the_roots_are_followed(folder, tmp_path):
    for name in ("file", "here", "up/data/file"):
        assert storage.safe_join(folder, name) == f"{tmp_path}/data/file"
    assert storage.safe_join(folder, "new/file") == f"{tmp_path}/data/new/file"
    for roots in ([f"{tmp_path}/secret"], [f"file://{tmp_path}/secret"], ["s3://bucket", str(tmp_path)]):
        assert storage.safe_join(folder, "chain", roots) == f"{tmp_path}/secret/file"
    with pytest.raises(storage.LeadsOut):
        storage.safe_join(folder, "out", ["s3://bucket", f"{tmp_path}/sec", "/nowhere"])
    with pytest.raises(OSError, match="symbolic links"):
        storage.read_bytes(storage.safe_join(folder, "loop"))


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(storage.BadLocation, match="is neither a file nor a folder"):
            storage.safe_join(str(tmp_path), name)
    for name in ("zero\0byte", "half \ud800 a pair"):
        with pytest.raises(storage.BadLocation, match="no file can have this name"):
            storage.safe_join(str(tmp_path), name)
    assert storage.safe_join(str(tmp_path), "x" * 300)  # opening it fails
    with pytest.raises(OSError, match="too long"):
        storage.read_bytes(storage.safe_join(str(tmp_path), "x" * 300))


def test_an_address_outside_of_the_roots_is_not_followed(tmp_path):
    for uri in ("/etc/passwd", "s3://other/x", "s3://bucket/data/../x", "s3://bucket/data-2/x"):
        with pytest.raises(storage.BadLocation, match="lies outside of"):
            storage.follow(uri, ["s3://bucket/data", str(tmp_path)])
    assert storage.follow("s3://bucket/data/x", [str(tmp_path), "s3://bucket/data"]) == "s3://bucket/data/x"


@pytest.mark.timeout(20)
def test_listing_a_folder_with_links_to_itself_ends(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/x", "a/b/y", "z"):
        (tmp_path / name).write_text("")
    for name, target in {"0": ".", "1": ".", "a/2": "..", "a/3": "../a", "a/b/4": "../..", "a/b/5": "nowhere"}.items():
        (tmp_path / name).symlink_to(target)
    assert storage.names_in(str(tmp_path)) == ["a/b/5", "a/b/y", "a/x", "z"]


def test_a_listing_follows_links_only_where_it_may(tmp_path):
    for name in ("data/file", "secret/file"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    (tmp_path / "data/link").symlink_to("../secret")
    data = str(tmp_path / "data")
    assert storage.names_in(data) == storage.names_in(data, [f"{tmp_path}/secret"]) == ["file", "link/file"]
    with pytest.raises(storage.LeadsOut, match="data/link': a link leads out"):
        storage.names_in(data, [])


def test_small_files_only(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1, 2]}')
    size = len('{"a": [1, 2]}')
    uri = str(tmp_path / "x.json")
    assert storage.read_json(uri, size) == {"a": [1, 2]}
    with pytest.raises(ValueError, match=f"has more than {size - 1} bytes"):
        storage.read_json(uri, size - 1)
    (tmp_path / "x.json").write_text("")
    assert storage.read_at_most(uri, 0) == b""
    for text in ("", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\xff", "\ud800"):
        (tmp_path / "x.json").write_bytes(text.encode("latin-1" if text == "\xff" else "utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=r"."):
            storage.read_json(uri)
