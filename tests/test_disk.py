from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from kalle.bars import progress_bar
from kalle.disk import DiskError, disk_errors, output_folder, unwritable, whole_file, write_whole


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        *[(number, "make room on the disk") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)],
        *[(number, "change its permissions") for number in (errno.EACCES, errno.EPERM, errno.EROFS)],
        *[(number, "choose another path") for number in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)],
    ],
)
def test_the_remedy_fits_the_cause(number: int, remedy: str) -> None:
    with pytest.raises(DiskError) as caught, disk_errors(Path("out")):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith(f"cannot write 'out': {os.strerror(number)}, expected ")
    assert remedy in message
    assert ("room" in message) == (remedy == "make room on the disk")


def test_a_library_s_word_counts_as_a_full_disk() -> None:
    assert "cannot write 'x': I/O error, expected room for it" in str(unwritable(Path("x"), "I/O error"))


def test_errors_about_other_files_or_of_another_kind_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "audio" / "a.wav")), OSError(errno.EIO, "input/output error")):
        with pytest.raises(OSError, match=error.strerror) as caught, disk_errors(tmp_path / "out"):
            raise error
        assert caught.value is error
    for name in (tmp_path, tmp_path / "out" / "train" / "x"):
        with pytest.raises(DiskError), disk_errors(tmp_path / "out"):
            raise FileNotFoundError(errno.ENOENT, "gone", str(name))


def test_an_output_folder_is_there_before_the_work_and_goes_with_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"

    def fail(leaving: list[str]) -> None:
        with output_folder(out):
            assert list(out.iterdir()) == []
            for name in leaving:
                (out / name).touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail([])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError):
        fail(["kept"])
    assert [path.name for path in out.iterdir()] == ["kept"]
    with output_folder(out):
        pass
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_an_impossible_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file", tmp_path / "file" / "x", *([Path("/proc/x")] if Path("/proc/self").is_dir() else [])]
    for out in places:
        with pytest.raises(DiskError, match="choose another path"), output_folder(out):
            pytest.fail("went on to work")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "x", "Käthe\n")
    assert (tmp_path / "new" / "x").read_bytes() == "Käthe\n".encode()

    def fail(error: BaseException) -> None:
        with whole_file(tmp_path / "new" / "x") as temporary:
            temporary.write_bytes(b"half")
            raise error

    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), DiskError)):
        with pytest.raises(raised):
            fail(error)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]
    assert (tmp_path / "new" / "x").read_bytes() == "Käthe\n".encode()


def test_bars_are_for_terminals(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar() as bar:
        assert list(bar.track([1, 2], description="count")) == [1, 2]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(show=False) as bar:
        list(bar.track([1]))
    assert capfd.readouterr() == ("", "")
    with progress_bar() as bar:
        list(bar.track([1, 2], description="count"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "count" in err
