"""Disks to break: one that fills up (a small tmpfs), one that returns EIO (a preloaded library)."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess

CLONE_NEWNS = 0x20000


def own_mounts() -> str | None:
    """What is mounted from now on is this process's and its children's, and goes with them; -> why that cannot be."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return "mounting a small disk needs root"
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWNS) != 0:
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return f"mount: {done.stderr.strip()}" if done.returncode else None


def small(folder: pathlib.Path, mib: int) -> None:
    """Make `folder` a disk of so many MiB; own_mounts first."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)


def unmount(folder: pathlib.Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: pathlib.Path) -> None:
    """Write until the disk is full."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


class FailingDisk:
    """EIO for files under a folder while `fail` says so; `why_not` instead when there is no compiler."""

    def __init__(self, home: pathlib.Path, under: pathlib.Path):
        self.flag, self.library, self.why_not = home / "failing", home / "failing_disk.so", None
        self.environment = {}
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            self.why_not = "no C compiler"
            return
        source = pathlib.Path(__file__).with_name("failing_disk.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(self.library), str(source), "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(self.library), "FAILING_DISK_FLAG": str(self.flag),
                            "FAILING_DISK_UNDER": str(under.resolve()) + "/"}

    def fail(self, call: str) -> None:
        """From now on; call: write or fsync."""
        self.flag.with_suffix(f".{call}").touch()

    def heal(self) -> None:
        for call in ("write", "fsync"):
            self.flag.with_suffix(f".{call}").unlink(missing_ok=True)
