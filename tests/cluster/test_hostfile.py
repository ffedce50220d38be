"""docs/multi_node.md: two machines without SLURM or ssh, each started manually."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from tests.cluster.machines import Machine, need, switch_off, write_hosts
from tests.cluster.project import HOSTS_PAGE, SETTINGS, project
from tests.cluster.slurm import read, until
from tests.helpers.launch import environment, records
from tests.helpers.pages import commands


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    need("ip", "unshare", "nsenter")
    hosts = write_hosts(tmp_path / "hosts", ["node1", "node2"])
    made: list[Machine] = []
    try:
        made.append(Machine("node1", 1, hosts))
        made.append(Machine("node2", 2, hosts, made[0]))
        yield made
    finally:
        switch_off(made)


@pytest.mark.slow
@pytest.mark.cluster
def test_two_machines_give_the_metrics_of_one_after_stop_and_resume(
    machines: list[Machine], shards: Path, local: Path, tmp_path: Path
) -> None:
    home = project(tmp_path / "project")
    (home / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    [line] = commands(HOSTS_PAGE, "deepspeed")
    script = f"{line} --shards {shards} {shlex.join(map(str, SETTINGS))}"
    directory, logs = home / "runs/mine", [tmp_path / f"{machine.name}.log" for machine in machines]

    def start() -> list[Popen[Any]]:
        settings = {**environment(), "GLOO_SOCKET_IFNAME": "eth0"}
        return [
            machine.start("bash", "-euc", script, log=log, cwd=home, **settings, NODE=number)
            for number, (machine, log) in enumerate(zip(machines, logs, strict=True))
        ]

    def status() -> dict[str, Any]:
        path = directory / "status.json"
        return dict(json.loads(path.read_text())) if path.exists() else {"state": None}

    def stepped() -> bool:
        assert all(launcher.poll() is None for launcher in launchers), "\n".join(map(read, logs))
        return (directory / "metrics.jsonl").exists() and len(records(directory, "train")) > 3

    launchers = start()
    until(stepped, 900, lambda: "\n".join(map(read, logs)))
    assert status()["host"] == "node1"
    machines[0].start("kill", "-USR1", status()["pid"], log=tmp_path / "kill.log").wait(timeout=10)
    assert all(launcher.wait(timeout=600) for launcher in launchers), "both exit codes are not 0"
    assert status()["state"] == "interrupted"
    assert 3 < len(records(directory, "train")) < 30

    launchers = start()
    assert [launcher.wait(timeout=900) for launcher in launchers] == [0, 0], "\n".join(map(read, logs))
    for kind in ("train", "dev"):
        assert records(directory, kind) == records(local, kind)
