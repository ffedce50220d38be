"""Simulated machines: namespaces for host name, network, processes, mounts and shared memory.

A machine exists as long as its first process, which reads a pipe of the tests and ends with it. So no process outlives
the tests, and killing a machine kills all of its processes.
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
# Device files of the host's GPUs are hidden. The shell reaps orphaned processes.
FIRST_PROCESS = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit
for device in /dev/nvidia[0-9]*; do [ ! -e "$device" ] || mount --bind /dev/null "$device"; done
ip link set lo up
echo ready
cat
exit
"""


class Machine:
    """A simulated machine on a private network; the first one holds the bridge that connects the others.

    Args:
        number: last part of its address, from 1
        hosts: the ``/etc/hosts`` of all machines
        bridge: the first machine; None for itself
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
            pid = self._first.pid  # of unshare, which is in all namespaces but the one of processes
            bridge._network(f"ip link add {name} type veth peer name eth0 netns {pid}")
            bridge._network(f"ip link set {name} master eth0 up")
        self._network(f"ip addr add {self.address}/24 dev eth0")
        self._network("ip link set eth0 up")

    def command(self, *words: object, cwd: Path = Path("/"), env: Mapping[str, object] | None = None) -> list[str]:
        """Return the command line that runs ``words`` on this machine."""
        here = f"/proc/{self._first.pid}/ns"
        spaces = [f"--{name}={here}/{file}" for name, file in (("net", "net"), ("uts", "uts"), ("ipc", "ipc"))]
        spaces += [f"--mount={here}/mnt", f"--pid={here}/pid_for_children"]
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        return ["nsenter", *spaces, "--", "env", f"--chdir={cwd}", *settings, *map(str, words)]

    def start(self, *words: object, log: Path, cwd: Path = Path("/"), **env: object) -> subprocess.Popen[Any]:
        """Start ``words`` on this machine in the background."""
        with open(log, "ab") as out:
            line = self.command(*words, cwd=cwd, env=env)
            process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        self._started.append(process)
        return process

    def kill(self) -> None:
        """Power off: the kernel kills all processes."""
        assert self._first.stdin
        self._first.stdin.close()

    def wait(self) -> None:
        """Wait until a killed machine is gone, which takes a while on a busy host."""
        for process in (self._first, *self._started):
            process.wait(timeout=120)

    def _network(self, line: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self._first.pid}/ns/net", *line.split()], check=True)


def switch_off(machines: Iterable[Machine]) -> None:
    """Kill all machines, then wait for all."""
    machines = list(machines)
    for machine in machines:
        machine.kill()
    for machine in machines:
        machine.wait()


def address(number: int) -> str:
    return f"{LAN}.{number}"


def write_hosts(path: Path, names: list[str]) -> Path:
    """Write the ``/etc/hosts`` of machines with these names, numbered from 1."""
    lines = [f"{address(number)} {name}\n" for number, name in enumerate(names, 1)]
    path.write_text("127.0.0.1 localhost\n" + "".join(lines))
    return path


def need(*programs: str) -> None:
    """Skip the test without root or if a program is missing; in CI, which must run all tests, fail."""
    missing = [name for name in programs if shutil.which(name) is None]
    if os.geteuid() == 0 and not missing:
        return
    reason = f"needs root and {', '.join(programs)}; missing: {', '.join(missing) or 'root'}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
