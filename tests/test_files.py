from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kalle.files import (
    LOCKS_FOLDER,
    MARKER,
    DiskError,
    atomic_file,
    atomic_folder,
    check_writable,
    disk_errors,
    folder_lock,
    output_folder,
    read_jsonl,
    remove_abandoned,
    unwritable,
    write_atomic,
    write_jsonl,
)
from kalle.progress import progress_bar


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
        with pytest.raises(DiskError, match="choose another path"):
            check_writable(out / "x")
    check_writable(tmp_path / "new" / "folder" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_no_file_can_have_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    long = "x" * 300
    for place in ("folder", long, f"new/{long}", f"{long}/x", f"new/{long}/x", "circle/x", "nowhere/x", "nowhere/new/x", "a\0b", "a\0b/x"):
        with pytest.raises(DiskError, match=r"choose another path"):
            check_writable(tmp_path / place)
    with pytest.raises(DiskError, match=r"choose another path"), output_folder(tmp_path / "circle" / "x"):
        pytest.fail("went on to work")
    for place in ("circle", "nowhere"):  # a link is replaced, as any file
        check_writable(tmp_path / place)
        write_atomic(tmp_path / place, "x")
    forbidden = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", lambda *_, **__: (_ for _ in ()).throw(forbidden))
        with pytest.raises(DiskError, match=r"change its permissions"):
            check_writable(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "folder", "nowhere"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new" / "x", "Käthe\n")
    assert (tmp_path / "new" / "x").read_bytes() == "Käthe\n".encode()

    def fail(error: BaseException) -> None:
        with atomic_file(tmp_path / "new" / "x") as temporary:
            temporary.write_bytes(b"half")
            raise error

    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), DiskError)):
        with pytest.raises(raised):
            fail(error)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]
    assert (tmp_path / "new" / "x").read_bytes() == "Käthe\n".encode()


def test_half_of_a_surrogate_pair_is_written_as_json_escapes_it(tmp_path: Path) -> None:
    rows = [{"id": "a", "problem": "got 'x\ud800y', expected a word"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_bytes().isascii()


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic_file(path) as first:
        with atomic_file(path) as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
            assert remove_abandoned(tmp_path) == [], "both are being written"
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_name_that_fills_its_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_atomic(path, "x")
    assert path.read_text() == "x"
    with pytest.raises(DiskError, match=r"File name too long.*choose another path"):
        write_atomic(tmp_path / ("é" * 128), "x")


def test_no_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "x").symlink_to(mine)
    write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "0123456789abcdef")
    (tmp_path / "y.0123456789abcdef.partial").symlink_to(mine)
    with pytest.raises(DiskError, match="File exists"):
        write_atomic(tmp_path / "y", "new")
    assert mine.read_text() == "mine"


def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(DiskError, match="choose another path"):
            write_atomic(tmp_path / name, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from kalle.files import atomic_file, atomic_folder\n"
        "root = Path(sys.argv[1])\n"
        "with atomic_file(root / 'x'), atomic_folder(root / 'f') as folder: (folder / 'y').touch(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (tmp_path / "x.partial").touch()
    assert len(list(tmp_path.iterdir())) == 3
    assert remove_abandoned(tmp_path) == [], "too recent"
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    assert len(remove_abandoned(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"

    def fill(content: str, error: BaseException | None = None) -> None:
        with atomic_folder(out) as folder:
            (folder / "x").write_text(content)
            assert (folder / MARKER).is_file()
            if error is not None:
                raise error

    with pytest.raises(DiskError):
        fill("half", OSError(errno.ENOSPC, "full"))
    assert list(tmp_path.iterdir()) == []
    fill("one")
    fill("two")
    with pytest.raises(KeyboardInterrupt):
        fill("three", KeyboardInterrupt())
    assert [path.read_text() for path in out.parent.rglob("*") if path.is_file()] == ["two"]


def test_a_lock_has_one_holder_and_goes_with_it(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "a", wait=False) as first:
        assert first is None
        with folder_lock(tmp_path, "a", wait=False) as second:
            assert str(second).count(":") == 1
        with folder_lock(tmp_path, "b", wait=False) as other:
            assert other is None
    assert not (tmp_path / LOCKS_FOLDER).exists()
    with folder_lock(tmp_path, "a", wait=True) as again:
        assert again is None


def test_the_lock_of_a_process_that_dies_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kalle.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1]), 'a', wait=True): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with folder_lock(tmp_path, "a", wait=False) as holder:
            assert str(holder).endswith(f":{process.pid}")
        process.kill()
        process.wait()
        with folder_lock(tmp_path, "a", wait=False) as holder:
            assert holder is None
    assert not (tmp_path / LOCKS_FOLDER).exists()


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder_lock(tmp_path, "a", wait=False) as holder:
        assert holder is None
    assert "no locks on the file system of" in caplog.text
    write_atomic(tmp_path / "x", "x")
    assert (tmp_path / "x").read_text() == "x"


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
