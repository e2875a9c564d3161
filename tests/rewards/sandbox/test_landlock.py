"""The weaker backend: where Landlock does not keep the user's files, it is refused, or the filter does it."""

import os
import socket
import stat

import pytest

from rewards.sandbox import bootstrap, kernel
from rewards.sandbox.judge import Sandbox
from rewards.sandbox.limits import SandboxError
from rewards.sandbox.seccomp import METADATA

PROGRAM = """
import ctypes, os
fd = os.open({path!r}, os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)
print(libc.fchmod(fd, 0o777), libc.fchown(fd, {uid}, {uid}), libc.fsetxattr(fd, b"user.x", b"1", 1, 0), libc.fremovexattr(fd, b"user.kept"))
"""


class Reached(Exception):
    pass


@pytest.mark.parametrize(("version", "uid", "refused"), [(2, 1000, True), (1, 1000, True), (3, 1000, False), (2, 0, False)])
def test_landlock_that_cannot_keep_files_from_being_emptied_needs_a_user_of_its_own(monkeypatch, version, uid, refused):
    def reached(*_, **__):
        raise Reached

    monkeypatch.setattr(kernel, "landlock_version", lambda: version)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(bootstrap, "_build_as_root", lambda paths: False)
    monkeypatch.setattr(bootstrap, "_become", lambda uid: None)
    monkeypatch.setattr(bootstrap.tempfile, "mkdtemp", reached)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(SandboxError if refused else Reached) as error:
        bootstrap._prepare(theirs, "landlock", [])
    if refused:
        assert f"Landlock {version} does not keep programs from emptying files" in str(error.value) and "\n" not in str(error.value)


def test_a_program_under_landlock_changes_nothing_about_a_file_that_it_may_read(tmp_path):
    tmp_path.chmod(0o755)
    path = tmp_path / "kept"
    path.write_text("kept")
    with Sandbox("landlock", [str(tmp_path)]) as sandbox:
        uid = sandbox.facts["uid"]
        if not os.geteuid():
            os.chown(path, uid, -1)
        path.chmod(0o444)
        os.setxattr(path, "user.kept", b"1")
        before = path.stat()
        ending = sandbox.script(PROGRAM.format(path=str(path), uid=uid))
    after = path.stat()
    assert ending.stdout == b"0 0 0 0\n", ending
    assert stat.S_IMODE(after.st_mode) == 0o444 and (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert os.listxattr(path) == ["user.kept"]


def test_the_filter_knows_the_calls_by_descriptor():
    wanted = {"fchmod": (91, 52), "fchown": (93, 55), "fsetxattr": (190, 7), "fremovexattr": (199, 16), "fchmodat2": (452, 452)}
    assert wanted.items() <= METADATA.items()
