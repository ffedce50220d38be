"""Machines of their own on one machine: a namespace each for host name, network, processes, mounts and shared memory.

A machine lives as long as its first process, which reads a pipe of ours and ends with it. So nothing outlives the
tests, however they end, and a machine that is killed takes with it all that ran there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

LAN = "10.77.0"
# GPUs of the machine below would be seen by their device files. The shell reaps what is left without a parent.
FIRST_PROCESS = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit
for device in /dev/nvidia[0-9]*; do [ ! -e "$device" ] || mount --bind /dev/null "$device"; done
ip link set lo up
echo ready
cat
exit
"""


class Machine:
    """One of them, on a private network; the first one made holds the bridge to which the others are joined.

    Args:
        number: 1 and up, the end of its address
        hosts: the file that all of them read as ``/etc/hosts``
        bridge: the first one, for all but itself
    """

    def __init__(self, name: str, number: int, hosts: Path, bridge: Machine | None = None) -> None:
        self.name, self.address = name, address(number)
        spaces = ["--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc"]
        line = ["unshare", *spaces, "--", "sh", "-c", FIRST_PROCESS, "sh", name, str(hosts)]
        self._started: list[subprocess.Popen[Any]] = []
        self._first = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._first.stdout
        assert self._first.stdout.readline() == "ready\n", f"{name} did not start"
        if bridge is None:
            self._network("ip link add eth0 type bridge")
        else:
            pid = self._first.pid  # of unshare itself, which is in all of the namespaces but that of processes
            bridge._network(f"ip link add {name} type veth peer name eth0 netns {pid}")
            bridge._network(f"ip link set {name} master eth0 up")
        self._network(f"ip addr add {self.address}/24 dev eth0")
        self._network("ip link set eth0 up")

    def command(self, *words: object, cwd: Path = Path("/"), env: Mapping[str, object] | None = None) -> list[str]:
        """The command line that runs ``words`` there."""
        here = f"/proc/{self._first.pid}/ns"
        spaces = [f"--{name}={here}/{file}" for name, file in (("net", "net"), ("uts", "uts"), ("ipc", "ipc"))]
        spaces += [f"--mount={here}/mnt", f"--pid={here}/pid_for_children"]
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        return ["nsenter", *spaces, "--", "env", f"--chdir={cwd}", *settings, *map(str, words)]

    def start(self, *words: object, log: Path, cwd: Path = Path("/"), **env: object) -> subprocess.Popen[Any]:
        """Run ``words`` there beside the tests, until it ends or the machine does."""
        with open(log, "ab") as out:
            line = self.command(*words, cwd=cwd, env=env)
            process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        self._started.append(process)
        return process

    def kill(self) -> None:
        """Switch it off: the kernel kills all processes there."""
        assert self._first.stdin
        self._first.stdin.close()

    def wait(self) -> None:
        """Until a machine that was killed is gone; on a busy one below it the dead take their time."""
        for process in (self._first, *self._started):
            process.wait(timeout=120)

    def _network(self, line: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self._first.pid}/ns/net", *line.split()], check=True)


def switch_off(machines: Iterable[Machine]) -> None:
    """Kill all of them, then wait for all."""
    machines = list(machines)
    for machine in machines:
        machine.kill()
    for machine in machines:
        machine.wait()


def address(number: int) -> str:
    return f"{LAN}.{number}"


def write_hosts(path: Path, names: list[str]) -> Path:
    """The ``/etc/hosts`` of machines with these names, numbered from 1."""
    lines = [f"{address(number)} {name}\n" for number, name in enumerate(names, 1)]
    path.write_text("127.0.0.1 localhost\n" + "".join(lines))
    return path


def need(*programs: str) -> None:
    """Skip where there is no root or a program is missing; under CI fail, since there all tests run."""
    lacking = [name for name in programs if shutil.which(name) is None]
    if os.geteuid() == 0 and not lacking:
        return
    why = f"needs root and {', '.join(programs)}; not here: {', '.join(lacking) or 'root'}"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)
