"""The cluster itself: what the other tests take for granted."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster import Cluster, until


def processes_of(folder: Path) -> list[str]:
    """Return the command of every process, zombies aside, that works in or for `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if str(folder) in command + environment and "pytest" not in command:
            found.append(command)
    return found


def test_each_node_has_its_name_its_processes_and_its_gpus(idle):
    said = "echo $(hostname) $CUDA_VISIBLE_DEVICES"
    hosts = idle("srun", "-N2", "-p", "gpu", "--gres=gpu:2", "sh", "-c", said)
    assert sorted(hosts.splitlines()) == ["gn1 0,1", "gn2 0,1"]
    processes = idle("srun", "-w", "cn1", "-p", "cpu", "ps", "-e", "-o", "comm=")
    assert processes.split()[0] == "sh"
    assert "slurmctld" not in processes


def test_a_dead_node_comes_back_with_another_start(idle):
    idle.script("crash", "cn2")
    until(lambda: "cn2" not in said_by(idle, "cn2").splitlines(), "the node is dead")
    idle.script("start")
    assert said_by(idle, "cn2").splitlines()[-1] == "cn2"


def said_by(cluster: Cluster, node: str) -> str:
    """Return what a job on the node says, or why it could not run, once it had its turn."""
    call = ["srun", "--immediate=60", "-p", "cpu", "-w", node, "hostname"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(call, env=cluster.environment, text=True, **pipes).stdout


def test_stop_leaves_nothing(slurm, tmp_path):
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.script("start")
        cluster("sbatch", "-o", "/dev/null", "-p", "cpu", "--wrap", "trap '' TERM; sleep 1000")
        cluster("sbatch", "-o", "/dev/null", "-p", "gpu", "--gres=gpu:1", "--wrap", "srun sleep 1000")
        until(lambda: list(cluster.jobs().values()) == ["RUNNING"] * 2, "two jobs run")
        assert processes_of(cluster.folder)
    finally:
        cluster.script("stop")
    until(lambda: not processes_of(cluster.folder), "all processes have ended", 20)
    assert str(cluster.folder) not in Path("/proc/mounts").read_text()
    cluster.script("stop")  # once more is no mistake
