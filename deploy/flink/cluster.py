"""A real Flink cluster on this machine, from packages alone: no containers, no root.

    python deploy/flink/cluster.py jars      fetch the jars (Maven Central)
    python deploy/flink/cluster.py up        JobManager, TaskManagers, Beam's job server, a pool of Python workers
    python deploy/flink/cluster.py status    what runs, and the flags that send a build there
    python deploy/flink/cluster.py down      end all of it

What a cluster writes lies in one folder (``--folder``): configuration, logs, pid files. A supervisor starts a process
again when it ends, as Kubernetes would. All ports are of the loopback interface.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = HERE / ".cluster"
LIB = DEFAULT_FOLDER / "lib"
HOST = "127.0.0.1"
START_SECONDS = 120
STOP_SECONDS = 15

OPENED = ("lang", "net", "io", "nio", "lang.reflect", "text", "time", "util", "util.concurrent")
OPENED += ("util.concurrent.atomic", "util.concurrent.locks")
JAVA = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in OPENED]
JAVA += ["--add-opens=java.base/sun.nio.ch=ALL-UNNAMED", "--add-exports=java.base/sun.net.util=ALL-UNNAMED"]
JAVA += ["-Dorg.slf4j.simpleLogger.showDateTime=true", "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS"]

SERVER = "org.apache.beam.runners.flink.FlinkJobServerDriver"
SHIPPED = ("beam-runners-flink", "beam-runners-java-job-service", "flink-java", "flink-clients", "flink-optimizer")
SHIPPED += ("flink-streaming-java",)

CONFIG = """\
jobmanager.rpc.address: {host}
jobmanager.rpc.port: {rpc}
jobmanager.bind-host: {host}
jobmanager.memory.enable-jvm-direct-memory-limit: false
rest.address: {host}
rest.bind-address: {host}
rest.port: {rest}
taskmanager.host: {host}
taskmanager.bind-host: {host}
taskmanager.numberOfTaskSlots: 1
taskmanager.cpu.cores: 1.0
taskmanager.memory.task.heap.size: 256m
taskmanager.memory.task.off-heap.size: 64m
taskmanager.memory.managed.size: 128m
taskmanager.memory.network.min: 64m
taskmanager.memory.network.max: 64m
taskmanager.memory.framework.heap.size: 128m
taskmanager.memory.framework.off-heap.size: 128m
taskmanager.memory.jvm-metaspace.size: 256m
taskmanager.memory.jvm-overhead.min: 192m
taskmanager.memory.jvm-overhead.max: 192m
restart-strategy.type: fixed-delay
restart-strategy.fixed-delay.attempts: 3
restart-strategy.fixed-delay.delay: 1s
classloader.resolve-order: parent-first
heartbeat.interval: 2000
heartbeat.timeout: 8000
io.tmp.dirs: {temporary}
"""


@dataclass(frozen=True)
class Cluster:
    """Where it lies, its ports, and how many TaskManagers it has."""

    folder: str
    task_managers: int = 2
    rest: int = 8081
    rpc: int = 6123
    job: int = 8099
    artifact: int = 8098
    expansion: int = 8097
    pool: int = 50000

    def path(self, name: str) -> Path:
        return Path(self.folder) / name

    def save(self) -> None:
        self.path("cluster.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "Cluster | None":
        path = folder / "cluster.json"
        return Cluster(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    @property
    def options(self) -> list[str]:
        """The flags of ``retrodb build`` for this cluster."""
        given = {
            "job_endpoint": f"localhost:{self.job}",
            "flink_master": f"{HOST}:{self.rest}",
            "environment_config": f"localhost:{self.pool}",
            "parallelism": str(self.task_managers),
        }
        pairs = (f"{key}={value}" for key, value in given.items())
        return ["--runner", "flink", *(word for pair in pairs for word in ("--runner-option", pair))]

    def commands(self) -> dict[str, list[str]]:
        """What runs, by name."""
        classes = ["-cp", str(LIB / "*")]
        java = [shutil.which("java") or "java", *JAVA]
        config = ["--configDir", str(self.path("conf"))]
        manager = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        worker = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
        ports = [f"--job-port={self.job}", f"--artifact-port={self.artifact}", f"--expansion-port={self.expansion}"]
        where = [f"--flink-master={HOST}:{self.rest}", f"--artifacts-dir={self.path('artifacts')}"]
        return {
            "jobmanager": [*java, "-Xmx512m", *classes, manager, *config],
            **{
                f"taskmanager-{n}": [*java, "-Xmx384m", "-XX:MaxMetaspaceSize=256m", *classes, worker, *config]
                for n in range(1, self.task_managers + 1)
            },
            "jobserver": [*java, "-Xmx512m", *self.server_classes(), SERVER, f"--job-host={HOST}", *ports, *where],
            "pool": [sys.executable, "-W", "ignore", "-m", "retrodb.pipelines.pool", "--port", str(self.pool)],
        }

    def server_classes(self) -> list[str]:
        """The job server's jars, most of them where it does not look for what to ship with each job.

        It ships its class path, 160 MB a job, which costs more than a small stage; the cluster has all of it. Classes
        on Java's boot path are not shipped. What asks for its own class loader, and what depends on that, stays.
        """
        jars = sorted(LIB.glob("*.jar"))
        shipped = [jar for jar in jars if jar.name.startswith(SHIPPED)]
        boot = ":".join(str(jar) for jar in jars if jar not in shipped)
        return [f"-Xbootclasspath/a:{boot}", "-cp", ":".join(map(str, shipped))]

    def ports(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name not in ("folder", "task_managers")}

    def pid(self, name: str) -> int | None:
        """The process id of a running part, or None."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int(self.path(f"pids/{name}").read_text())
            if is_ours(pid, self.folder):
                return pid
        return None


def is_ours(pid: int, folder: str) -> bool:
    """Whether a process runs that was started for this folder: process ids are used again."""
    try:
        return f"RETRODB_FLINK={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


# -- commands ---------------------------------------------------------------------------------------------------------


def fetch_jars() -> None:
    """The jars of the cluster and the job server, fetched once for all clusters: of two that start, one waits.

    Raises:
        SystemExit: there is no Maven, or it fails.
    """
    complete = LIB.with_name("lib.complete")
    if complete.exists():
        return
    if shutil.which("mvn") is None:
        raise SystemExit("flink: no mvn on the PATH. Install Maven 3, which fetches the jars.")
    LIB.parent.mkdir(parents=True, exist_ok=True)
    with LIB.with_name("lib.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            _fetch_jars()
            complete.touch()


def _fetch_jars() -> None:
    print(f"fetching the jars of Flink and Beam's job server to {LIB} (160 MB)", flush=True)
    command = ["mvn", "-B", "-q", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies"]
    done = subprocess.run([*command, f"-DoutputDirectory={LIB}"], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"flink: Maven could not fetch the jars: {(done.stdout + done.stderr).strip()[-1500:]}")
    write_server_jar()


def write_server_jar() -> None:
    """``job-server.jar`` beside the jars: the job server as one file, for ``flink_job_server_jar``."""
    names = " ".join(f"lib/{jar.name}" for jar in sorted(LIB.glob("*.jar")))
    lines = ["Manifest-Version: 1.0", f"Main-Class: {SERVER}", f"Class-Path: {names}"]
    folded = ("\n ".join([line[:70], *(line[at : at + 69] for at in range(70, len(line), 69))]) for line in lines)
    with zipfile.ZipFile(LIB.with_name("job-server.jar"), "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", "\n".join(folded) + "\n")


def up(cluster: Cluster) -> None:
    """Start everything, and wait until it answers.

    Raises:
        SystemExit: a port is taken, or something does not come up.
    """
    if shutil.which("java") is None:
        raise SystemExit("flink: no java on the PATH. Install a JRE of version 11 or 17.")
    running = Cluster.load(Path(cluster.folder))
    if running is not None and running.pid("supervisor") is not None:
        raise SystemExit(f"flink: a cluster runs already in {cluster.folder}; end it with `down` first.")
    for name, port in cluster.ports().items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise SystemExit(f"flink: port {port} is taken; give another --{name}-port.") from error
    for name in ("conf", "logs", "pids", "temporary", "artifacts"):
        cluster.path(name).mkdir(parents=True, exist_ok=True)
    fetch_jars()
    config = CONFIG.format(host=HOST, rest=cluster.rest, rpc=cluster.rpc, temporary=cluster.path("temporary"))
    cluster.path("conf/config.yaml").write_text(config, encoding="utf-8")
    cluster.save()
    start(cluster, "supervisor", [sys.executable, __file__, "--folder", cluster.folder, "supervise"])
    try:
        wait_until_up(cluster)
    except BaseException:
        down(cluster)
        raise


def wait_until_up(cluster: Cluster) -> None:
    """Until everything answers.

    Raises:
        SystemExit: something does not.
    """
    end = time.monotonic() + START_SECONDS
    while (missing := not_up(cluster)) is not None:
        if time.monotonic() > end or cluster.pid("supervisor") is None:
            raise SystemExit(f"flink: {missing} did not come up; see {cluster.path('logs')}.")
        time.sleep(0.2)


def not_up(cluster: Cluster) -> str | None:
    """What does not answer yet, or None."""
    try:
        found = ask(cluster, "overview")["taskmanagers"]
    except OSError:
        return "the JobManager"
    if found != cluster.task_managers:
        return f"a TaskManager ({found} of {cluster.task_managers} are there)"
    for name, port in (("the job server", cluster.job), ("the pool of Python workers", cluster.pool)):
        try:
            socket.create_connection(("localhost", port), timeout=2).close()
        except OSError:
            return name
    return None


def ask(cluster: Cluster, what: str) -> Any:
    """What the cluster's REST interface says."""
    with urllib.request.urlopen(f"http://{HOST}:{cluster.rest}/{what}", timeout=5) as answer:
        return json.load(answer)


def down(cluster: Cluster) -> None:
    """End everything that runs."""
    names = ["supervisor", *cluster.commands()]
    pids = {name: pid for name in names if (pid := cluster.pid(name)) is not None}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)  # each is the leader of its group: the pool's workers go with it
        end = time.monotonic() + STOP_SECONDS
        while time.monotonic() < end and any(is_ours(pid, cluster.folder) for pid in pids.values()):
            time.sleep(0.1)
    shutil.rmtree(cluster.path("pids"), ignore_errors=True)
    shutil.rmtree(cluster.path("temporary"), ignore_errors=True)
    shutil.rmtree(cluster.path("artifacts"), ignore_errors=True)
    cluster.path("cluster.json").unlink(missing_ok=True)


def status(cluster: Cluster | None) -> int:
    """Print what runs; 0 when all of it does."""
    if cluster is None or cluster.pid("supervisor") is None:
        print("no cluster runs here")
        return 1
    for name in cluster.commands():
        print(f"{name:14} {cluster.pid(name) or 'is being started again'}")
    missing = not_up(cluster)
    print(f"waiting for {missing}" if missing else f"all up; http://{HOST}:{cluster.rest}")
    print("retrodb build ... " + " ".join(cluster.options))
    return 0 if missing is None else 1


# -- the supervisor ---------------------------------------------------------------------------------------------------


def start(cluster: Cluster, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
    """A part of the cluster as the leader of its own process group; its log and its pid file."""
    with cluster.path(f"logs/{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "RETRODB_FLINK": cluster.folder},
        )
    cluster.path(f"pids/{name}").write_text(str(process.pid))
    return process


def supervise(cluster: Cluster) -> None:
    """Start every part, and start again what ends, until this process is told to end."""
    commands = cluster.commands()
    running: dict[str, subprocess.Popen[bytes]] = {}
    with ended_by_signal():
        running = {name: start(cluster, name, command) for name, command in commands.items()}
        while True:
            for name, process in running.items():
                if process.poll() is not None:
                    print(f"{time.strftime('%H:%M:%S')} {name} ended ({process.returncode}): started again", flush=True)
                    running[name] = start(cluster, name, commands[name])
            time.sleep(0.5)
    for process in running.values():  # `down` ends them as well
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


@contextlib.contextmanager
def ended_by_signal() -> Iterator[None]:
    """SIGTERM ends the block."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(SystemExit):
        yield


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="cluster.py", description="A Flink cluster on this machine.")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("jars", "status", "down", "supervise"):
        commands.add_parser(name)
    starting = commands.add_parser("up")
    starting.add_argument("--task-managers", type=int, default=2)
    for name, port in Cluster("").ports().items():
        starting.add_argument(f"--{name}-port", type=int, default=port, dest=name)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    running = Cluster.load(folder)
    if arguments.command == "jars":
        fetch_jars()
    elif arguments.command == "up":
        names = ("task_managers", *Cluster("").ports())
        cluster = Cluster(str(folder), **{name: getattr(arguments, name) for name in names})
        up(cluster)
        return status(cluster)
    elif arguments.command == "supervise" and running is not None:
        supervise(running)
    elif arguments.command == "down":
        if running is not None:
            down(running)
    else:
        return status(running)
    return 0


if __name__ == "__main__":
    sys.exit(main())
