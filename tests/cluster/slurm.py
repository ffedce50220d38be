"""A real SLURM cluster for tests: a controller and nodes on simulated machines, with simulated GPUs."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.cluster.machines import Machine, address, switch_off, write_hosts
from tests.helpers.launch import REPOSITORY, environment

T = TypeVar("T")
GPUS = 2
# Short intervals, so that a requeued job restarts after seconds instead of two minutes; long timeouts for busy hosts.
SETTINGS = """
ClusterName=tests
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/completed
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=3600
ReturnToService=2
MessageTimeout=60
MailProg=/bin/true
GresTypes=gpu
NodeName={nodes} NodeAddr={addresses} CPUs=8 Gres=gpu:{gpus}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2
"""


class Slurm:
    """A cluster with nodes ``node1``, ``node2`` ...

    Args:
        directory: for its files; munge's socket needs a short path with access for all
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.config = directory, directory / "slurm.conf"
        self.names: list[str] = []
        self.machines: dict[str, Machine] = {}

    def start(self, nodes: int) -> None:
        """Start the controller and the nodes; call :meth:`stop` even if this fails."""
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self._hosts = write_hosts(self.directory / "hosts", ["head", *self.names])
        self._write_settings()
        self.machines["head"] = Machine("head", 1, self._hosts)
        self._munge()
        self.machines["head"].start("slurmctld", "-D", log=self.directory / "slurmctld.log", **self._environment())
        for name in self.names:
            self.start_node(name)

    def start_node(self, name: str) -> None:
        """Start or restart a node and wait until it accepts jobs."""
        machine = Machine(name, self.names.index(name) + 2, self._hosts, self.machines["head"])
        self.machines[name] = machine
        machine.start("slurmd", "-D", "-N", name, log=self.directory / f"{name}.log", **self._environment())
        until(lambda: self.run("sinfo", "-h", "-n", name, "-o", "%T").split()[:1] == ["idle"], 120, self.logs)

    def kill_node(self, name: str) -> None:
        """Power off a node and mark it as down, which the controller would notice only later."""
        switch_off([self.machines.pop(name)])
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def stop(self) -> None:
        """Power off all machines."""
        switch_off(self.machines.values())

    def run(self, *words: object, cwd: Path = REPOSITORY, **env: object) -> str:
        """Run a SLURM command on the controller and return its output."""
        settings = {**self._environment(), **env}
        line = self.machines["head"].command(*words, cwd=cwd, env=settings)
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object, cwd: Path = REPOSITORY, **env: object) -> str:
        """Submit a job with ``sbatch words`` and return its id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **env).strip()

    def show(self, job: str) -> list[dict[str, str]]:
        """Return the fields of ``scontrol show job``, one dictionary for each element of an array."""
        rows = self.run("scontrol", "show", "job", "-o", job).splitlines()
        return [dict(pair.partition("=")[::2] for pair in row.split() if "=" in pair) for row in rows]

    def wait(self, job: str, states: str = "COMPLETED", timeout: float = 900, log: Path | None = None) -> None:
        """Wait until all elements of a job are in one of these states; another final state is an error."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}

        def reached() -> bool:
            found = {row["JobState"] for row in self.show(job)}
            assert not (found - set(states.split())) & ended, f"{found}\n{read(log)}\n{self.logs()}"
            return found <= set(states.split())

        until(reached, timeout, lambda: f"{self.show(job)}\n{read(log)}\n{self.logs()}")

    def logs(self) -> str:
        """Return the ends of all daemons' logs."""
        return "\n".join(f"--- {path.name}\n{read(path)}" for path in sorted(self.directory.glob("*.log")))

    def _environment(self) -> dict[str, object]:
        return {"SLURM_CONF": self.config}

    def _munge(self) -> None:
        key, socket = self.directory / "munge.key", self.directory / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{what}-file={self.directory}/munge.{what}" for what in ("key", "pid", "seed")]
        log = self.directory / "munged.log"
        self.machines["head"].start("munged", "--foreground", "--force", *files, f"--socket={socket}", log=log)
        until(socket.exists, 120, self.logs)

    def _write_settings(self) -> None:
        span = f"[1-{len(self.names)}]"
        addresses = f"{address(0)[:-1]}[2-{len(self.names) + 1}]"
        values = {"head": address(1), "nodes": f"node{span}", "addresses": addresses, "gpus": GPUS}
        self.config.write_text(SETTINGS.format(directory=self.directory, **values))
        (self.directory / "state").mkdir()
        for number in range(GPUS):
            os.mknod(self.directory / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # like /dev/null
        gpus = f"Name=gpu File={self.directory}/gpu[0-{GPUS - 1}]\n"
        (self.directory / "gres.conf").write_text(gpus)


def until(condition: Callable[[], T], timeout: float, explain: Callable[[], str] = str) -> T:
    """Poll until ``condition`` is true and return its value."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {explain()}")
        time.sleep(0.1)


def read(path: Path | None) -> str:
    """Return the end of a log; empty if it does not exist."""
    return path.read_text(errors="replace")[-4000:] if path and path.exists() else ""
