"""Jobs on a Flink cluster, through Beam's Flink job server: one that runs already, or one started from its jar."""

import http.client
import json
import logging
import shutil
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability import job_server
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer, FlinkRunner
from apache_beam.runners.portability.portable_runner import PortableRunner
from retrodb.pipelines.runners.base import Job
from retrodb.pipelines.runners.options import RunnerOptions
from retrodb.pipelines.runners.portable import FollowedJob, JobServerRunner

from retrodb.errors import InputError

_ANSWER_SECONDS: Final = 10.0
_CANCEL_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.25
_ENDED: Final = ("FINISHED", "FAILED", "CANCELED")


class FlinkClusterRunner(JobServerRunner):
    """``flink_master`` is the cluster's REST address; ``job_endpoint`` names a running job server, and
    ``flink_job_server_jar`` starts one.

    Jobs are known to the cluster by their names: a job server that is asked to cancel one forgets it, but leaves it
    running on a cluster that it only submits to.
    """

    name = "flink"

    def __init__(self, options: RunnerOptions, parallelism: int | None = None) -> None:
        super().__init__(options)
        self._parallelism = parallelism

    # -- before a build ------------------------------------------------------------------------------------------------

    def check_options(self) -> None:
        for stage in (None, *self.options.stages()):
            self._master(stage)
        if self._starts_a_server():
            self._check_jar()
            self.check_values()
        else:
            super().check_options()

    def check(self, locations: Sequence[str]) -> None:
        self.check_options()
        for master in sorted({self._master(stage) for stage in (None, *self.options.stages())}):
            if "flink-version" not in _ask(master, "overview"):
                raise InputError(f"what answers at {master} (flink_master) is no Flink cluster; correct the address.")
        if self._starts_a_server():
            self.options.refuse_unknown(self.name)  # the server, which may know more, is started by the first job
        else:
            super().check(locations)

    def _master(self, stage: str | None) -> str:
        master = self.options.one("flink_master", stage)
        if master is None:
            raise InputError(
                "--runner flink needs the cluster's REST address: give --runner-option flink_master=HOST:PORT "
                "(make flink-up starts a cluster on this machine, and says what to give)."
            )
        return master

    def _starts_a_server(self) -> bool:
        return self.options.one("job_endpoint") is None and self.options.one("flink_job_server_jar") is not None

    def _check_jar(self) -> None:
        jar = Path(self.options.one("flink_job_server_jar") or "")
        if not jar.is_file():
            raise InputError(
                f"flink_job_server_jar: there is no file {jar}. make flink-jars makes one: "
                "deploy/flink/.cluster/job-server.jar."
            )
        if shutil.which("java") is None:
            raise InputError("flink_job_server_jar: no java is on the PATH. Install a JRE of version 11 or 17.")

    def endpoint(self, stage: str | None) -> str:
        if self.options.one("job_endpoint", stage) is None:
            raise InputError(
                "--runner flink needs a job server: give --runner-option job_endpoint=HOST:PORT of a running one "
                "(make flink-up starts one), or flink_job_server_jar=FILE and flink_master=HOST:PORT to start one."
            )
        return super().endpoint(stage)

    def describe(self, stage: str) -> dict[str, str]:
        given = self.options.of(stage)
        told = ("job_endpoint", "flink_master", "flink_job_server_jar")
        where: dict[str, str] = {key: given[key][-1] for key in told if key in given}
        parallelism = self.options_of(stage).get("parallelism", ["the cluster's default"])[-1]
        return {**where, "workers": self.workers(stage), "parallelism": parallelism}

    # -- a job ---------------------------------------------------------------------------------------------------------

    def new_beam_runner(self) -> PortableRunner:
        return _KeepsItsServer() if self._starts_a_server() else super().new_beam_runner()

    def options_of(self, stage: str) -> dict[str, list[str]]:
        options = super().options_of(stage)
        if self._parallelism is not None:
            options.setdefault("parallelism", [str(self._parallelism)])
        if not self._starts_a_server():
            options.pop("flink_master", None)  # the job server knows its cluster
        return options

    def submit(self, pipeline: beam.Pipeline, job: Job) -> FollowedJob:
        job.submitted(self._master(job.stage), job.name)
        return super().submit(pipeline, job)

    def submitted(self, job: Job, job_id: str) -> None:
        """It is known by its name since before it was submitted."""

    def cancel(self, job: Job, followed: FollowedJob | None) -> bool:
        super().cancel(job, followed)
        try:
            return cancel_on_cluster(self._master(job.stage), job.name) and followed is not None
        except InputError as error:  # the interruption is what the user has to hear of
            logging.getLogger(__name__).debug("cancelling %s: %s", job.name, error)
            return False

    def runners_id(self, job: Job, submitted: str) -> str:
        """Flink's own id."""
        try:
            return next((str(one["jid"]) for one in _jobs(self._master(job.stage), job.name)), submitted)
        except InputError:  # the job is done: its id on the cluster's page is all that is lost
            return submitted

    def close(self) -> None:
        if isinstance(self._beam, _KeepsItsServer):
            self._beam.stop()


class _KeepsItsServer(FlinkRunner):
    """Beam's Flink runner, with one job server for all jobs of a build instead of one a job."""

    def __init__(self) -> None:
        super().__init__()
        self._server: job_server.JobServer | None = None

    def default_job_server(self, options: PipelineOptions) -> job_server.JobServer:
        if self._server is None:
            self._server = job_server.StopOnExitJobServer(FlinkJarJobServer(options))
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


def cancel_on_cluster(master: str, name: str) -> bool:
    """Cancel the jobs of a name on a Flink cluster, and wait for their end; whether none runs any more.

    Raises:
        InputError: the cluster does not answer.
    """
    end = time.monotonic() + _CANCEL_SECONDS
    asked: set[str] = set()
    while running := [job for job in _jobs(master, name) if job["state"] not in _ENDED]:
        if time.monotonic() > end:
            return False
        for job in running:
            if job["jid"] not in asked:
                asked.add(job["jid"])
                _ask(master, f"jobs/{job['jid']}?mode=cancel", "PATCH")
        time.sleep(_POLL_SECONDS)
    return True


def _jobs(master: str, name: str) -> list[dict[str, Any]]:
    return [job for job in _ask(master, "jobs/overview")["jobs"] if job["name"] == name]


def _ask(master: str, what: str, method: str = "GET") -> Any:
    """What the REST interface of a Flink cluster says.

    Raises:
        InputError: it does not answer.
    """
    url = master if master.startswith(("http://", "https://")) else f"http://{master}"
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/{what}", method=method)
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            return json.load(answer)
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last one of what speaks no HTTP
        reason = getattr(error, "reason", error)
        raise InputError(f"no Flink cluster answers at {master} (flink_master): {reason}.") from error
