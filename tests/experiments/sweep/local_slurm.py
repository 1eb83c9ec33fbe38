"""A real Slurm on this machine for the tests: Debian's slurm-wlm and munge, with two nodes, in a temporary folder."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "setpriv")
NODES = ("n1", "n2")

# cred_expire: what a requeued job waits for, 120 s by default and 5 s at least. Jobs in the partition high requeue
# those in low.
CONFIGURATION = """
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=4
MessageTimeout=3
TCPTimeout=1
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 CoresPerSocket=2 RealMemory=8000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 CoresPerSocket=2 RealMemory=8000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=480 State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=n1,n2 MaxTime=480 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why Slurm cannot be started here, None if it can."""
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)} not found); on Debian as root: make slurm"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


class LocalSlurm:
    """Brings Slurm up in a `with` block and leaves nothing of it behind; `environment` is for Slurm's commands."""

    def __enter__(self) -> "LocalSlurm":
        self.root = Path(tempfile.mkdtemp(prefix="foldopt-slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.root.chmod(0o755)  # munged runs as munge
        for name in ("state", "spool", "munge"):
            (self.root / name).mkdir()
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for path in (key, key.parent):
            shutil.chown(path, "munge", "munge")
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(root=self.root, ports=_free_ports(3)))
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self._daemon(
            *(
                "munged",
                "munged",
                "--foreground",
                *(f"--{key}={self.root}/munge/{file}" for key, file in files.items()),
            ),
            identity=("--reuid=munge", "--regid=munge", "--clear-groups"),
        )
        self.wait(lambda: (self.root / "munge" / "socket").exists(), 10, "munged")
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.states() == dict.fromkeys(NODES, "idle"), 30, "the nodes")

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._left():
            process.kill()
        shutil.rmtree(self.root)

    def _left(self) -> list[psutil.Process]:
        """Return the jobs that the daemons have left, and their slurmstepd, which keep no environment."""
        steps = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(self.root)]
        return steps + self._inheriting("SLURM_CONF", self.environment["SLURM_CONF"])

    def _inheriting(self, name: str, value: str) -> list[psutil.Process]:
        """Return the processes of this Slurm in whose environment `name` is `value`."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"], name: value}
        environments = ((process, process.info["environ"] or {}) for process in psutil.process_iter(["environ"]))
        return [process for process, environ in environments if wanted.items() <= environ.items()]

    def _daemon(self, name: str, *command: str, identity: tuple[str, ...] = ()) -> None:
        with (self.root / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=TERM", *identity, *command],
                cwd=self.root,
                env=self.environment,
                stdout=output,
                stderr=output,
            )

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """Kill the daemon of a node and freeze its jobs, which hold their files open; start_node brings it back."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        for process in self._inheriting("SLURMD_NODENAME", node):
            process.suspend()

    def call(self, *command: str) -> str:
        """Return what a command prints; an AssertionError with all that it said where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """Return the state of each node; an asterisk says that it does not answer."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"], env=self.environment, capture_output=True, text=True
        )
        return dict(line.split() for line in done.stdout.splitlines())

    def wait(self, condition, seconds: float, what: str) -> None:
        """Wait until `condition()`; an AssertionError with the controller's log after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.root / "slurmctld.log"
                tail = log.read_text().splitlines()[-30:] if log.exists() else []
                queue = subprocess.run(["squeue"], env=self.environment, capture_output=True, text=True).stdout
                raise AssertionError("\n".join([f"no {what} within {seconds} s", queue, *tail]))
            time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
