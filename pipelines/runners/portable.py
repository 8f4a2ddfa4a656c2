"""Jobs on any runner that serves Beam's job API: Prism, Spark, Flink, or Beam's own job service."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PortableOptions
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.runners.runner import PipelineState
from apache_beam.transforms.environments import Environment
from retrodb.pipelines.runners.base import (
    Job,
    JobRecord,
    Tick,
    WorkerDiedError,
    counters_of,
    last_line,
    quieten,
    raised_by_a_worker,
)
from retrodb.pipelines.runners.options import RunnerOptions, pipeline_options
from retrodb.pipelines.threads import ONE_THREAD, environment

from retrodb.errors import InputError, RetrodbError, WorkerError
from retrodb.planning import Cost, Effort

WORKER_POOL: Final = "localhost:50000"
"""Where a worker of the runner finds Python: a pool beside it (``python -m retrodb.pipelines.pool``)."""

_POOL: Final = "EXTERNAL"
_NOBODY: Final = ("UNAVAILABLE", "Connection refused", "failed to connect")
"""In the words of gRPC, in Python and in Java."""

_ANSWER_SECONDS: Final = 15.0
_LOST_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.25
_CANCEL_SECONDS: Final = 20.0
_LAST_WORDS_SECONDS: Final = 2.0


class JobServerRunner:
    """Submits jobs to the job server at ``job_endpoint``, and follows them there."""

    name = "portable"
    is_local = False

    def __init__(self, options: RunnerOptions) -> None:
        self.options = options
        self._beam: Any = None

    # -- before a build ------------------------------------------------------------------------------------------------

    def check_options(self) -> None:
        for stage in (None, *self.options.stages()):
            self.endpoint(stage)
        self.check_values()

    def check_values(self) -> None:
        """Refuse values that Beam cannot read, and kinds of workers that it does not have.

        Raises:
            InputError: there is one.
        """
        self.options.check_values()
        for stage in (None, *self.options.stages()):
            given = pipeline_options(self.options_of(stage or ""), "retrodb")
            try:
                Environment.from_options(given.view_as(PortableOptions))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"--runner-option environment_type, environment_config: {error}. Kinds of workers are EXTERNAL (a "
                    "pool at HOST:PORT, the default), DOCKER (an image), PROCESS and LOOPBACK."
                ) from error

    def check(self, locations: Sequence[str]) -> None:
        self.check_options()
        for endpoint in {self.endpoint(stage) for stage in (None, *self.options.stages())}:
            with grpc.insecure_channel(endpoint) as channel:
                self.options.refuse_unknown(self.name, described_options(channel, endpoint))

    def endpoint(self, stage: str | None) -> str:
        """HOST:PORT of the job server.

        Raises:
            InputError: none is given.
        """
        endpoint = self.options.one("job_endpoint", stage)
        if endpoint is None:
            raise InputError(
                f"--runner {self.name} needs to know where to submit jobs: give --runner-option job_endpoint=HOST:PORT."
            )
        return endpoint

    def hints(self, stage: str) -> dict[str, str]:
        return {}

    def describe(self, stage: str) -> dict[str, str]:
        return {"job_endpoint": self.endpoint(stage), "workers": self.workers(stage)}

    def workers(self, stage: str) -> str:
        """Where a stage's workers come from, for people."""
        options = self.options_of(stage)
        return self.pool(stage) or " ".join([*options["environment_type"], *options.get("environment_config", [])])

    def cost(self, effort: Callable[[], Effort]) -> Cost | None:
        return None

    # -- a job ---------------------------------------------------------------------------------------------------------

    def beam_runner(self) -> PortableRunner:
        """Beam's side of it; made once, since it may have started a job server."""
        if self._beam is None:
            self._beam = self.new_beam_runner()
        return self._beam

    def new_beam_runner(self) -> PortableRunner:
        """Submits to ``job_endpoint``."""
        return PortableRunner()

    def options_of(self, stage: str) -> dict[str, list[str]]:
        """What a job of a stage is given; a worker pool beside each worker where no environment is named."""
        options = self.options.of(stage)
        if options.setdefault("environment_type", [_POOL])[-1] == _POOL:
            options.setdefault("environment_config", [WORKER_POOL])
        return options

    def pool(self, stage: str) -> str | None:
        """Where a job's workers come from, if it is a pool."""
        options = self.options_of(stage)
        return options["environment_config"][-1] if options["environment_type"][-1] == _POOL else None

    def run(self, job: Job, tick: Tick) -> JobRecord:
        quieten()
        started = time.monotonic()
        followed = None
        try:
            with environment(ONE_THREAD):  # for workers in this process, where LOOPBACK asks for them
                pipeline = beam.Pipeline(
                    runner=self.beam_runner(), options=pipeline_options(self.options_of(job.stage), job.name)
                )
                job.build(pipeline)
                followed = self.submit(pipeline, job)
                state = followed.to_its_end(tick)
        except BaseException:
            if self.cancel(job, followed):
                job.ended()
            raise
        job.ended()
        if state != PipelineState.DONE:
            raise followed.error(state)
        job_id = self.runners_id(job, followed.id)
        return JobRecord(job.stage, self.name, job_id, state, time.monotonic() - started, followed.counters())

    def submit(self, pipeline: beam.Pipeline, job: Job) -> "FollowedJob":
        """Hand a job to the job server.

        Raises:
            WorkerError: it does not take it.
        """
        try:
            followed = FollowedJob(pipeline.run(), job, self.pool(job.stage))
        except (grpc.RpcError, grpc.FutureTimeoutError, RuntimeError) as error:
            raise WorkerError(f"{job.stage}: the job server did not take the job: {last_line(str(error))}") from error
        self.submitted(job, followed.id)
        return followed

    def submitted(self, job: Job, job_id: str) -> None:
        """From now on the job may outlive the driver."""
        job.submitted(self.options.one("job_endpoint", job.stage), job_id)

    def cancel(self, job: Job, followed: "FollowedJob | None") -> bool:
        """End a job; whether it has ended."""
        return followed is None or followed.cancel()

    def runners_id(self, job: Job, submitted: str) -> str:
        """The id that the runner itself shows."""
        return submitted

    def expect(self) -> None:
        """The workers are not ours."""

    def close(self) -> None:
        """The job server is not ours."""


class FollowedJob:
    """A submitted job: its state and messages, asked for rather than waited for, since streams of messages stay open
    for long after a job's end."""

    def __init__(self, result: Any, job: Job, pool: str | None) -> None:
        # Beam shows neither a portable job's id nor its messages before the end in any public way.
        self.id: str = result._job_id
        self._result = result
        self._job = job
        self._pool = pool
        self._errors: list[str] = []
        self._reader = threading.Thread(
            target=self._read, args=(result._message_stream,), name="retrodb-messages", daemon=True
        )
        self._reader.start()

    def _read(self, messages: Iterator[Any]) -> None:
        try:
            for message in messages:
                response = message.message_response
                if response.importance == beam_job_api_pb2.JobMessage.JOB_MESSAGE_ERROR:
                    self._errors.append(response.message_text)
        except grpc.RpcError as error:
            logging.getLogger(__name__).debug("no more messages of %s: %s", self.id, error)

    def to_its_end(self, tick: Tick) -> str:
        """The state it ends in.

        Raises:
            WorkerError: the job server does not answer any more.
        """
        while not PipelineState.is_terminal(state := self._state()):
            tick()
            time.sleep(_POLL_SECONDS)
        self._result._cleanup()  # stops the workers in this process, if there are any
        return state

    def _state(self) -> str:
        silent_since = time.monotonic()
        while True:
            try:
                return str(self._result.state)
            except grpc.RpcError as error:
                if time.monotonic() - silent_since > _LOST_SECONDS:
                    raise WorkerError(
                        f"{self._job.stage}: the job server has not answered for {_LOST_SECONDS:.0f} s while job "
                        f"{self.id} was running: {last_line(str(error))} What was finished is kept: run it again."
                    ) from error
                time.sleep(1.0)

    def cancel(self) -> bool:
        """Ask the runner to end the job, and wait for it a while: what it had not committed does not exist."""
        end = time.monotonic() + _CANCEL_SECONDS
        try:
            self._result.cancel()
            while not PipelineState.is_terminal(self._result.state):
                if time.monotonic() > end:
                    return False
                time.sleep(_POLL_SECONDS)
        except Exception as error:  # the interruption is what the user has to hear of
            logging.getLogger(__name__).debug("cancelling %s: %s", self.id, error)
            return False
        return True

    def error(self, state: str) -> RetrodbError:
        """Why it did not end well: what a worker raised, or what the runner says."""
        self._reader.join(_LAST_WORDS_SECONDS)
        if (found := raised_by_a_worker(self._errors)) is not None:
            return found
        if state == PipelineState.CANCELLED:
            return WorkerError(f"{self._job.stage}: job {self.id} was cancelled on the runner; run it again.")
        last = self._errors[-1] if self._errors else ""
        if self._pool is not None and any(word in last for word in _NOBODY):
            return WorkerError(
                f"{self._job.stage}: job {self.id} found no workers: does a pool listen at {self._pool} "
                "(environment_config), as the runner's own workers see it? Start one with "
                "python -m retrodb.pipelines.pool --port PORT, or correct the address."
            )
        message = f"{self._job.stage}: job {self.id} ended in state {state}: {last_line(last)}"
        return WorkerError(message) if "Traceback (most recent call last)" in last else WorkerDiedError(message)

    def counters(self) -> dict[str, int]:
        """Beam's counters, as the runner has them."""
        return counters_of(self._result)


def described_options(channel: grpc.Channel, endpoint: str) -> list[str]:
    """The names of the options that a job server knows.

    Raises:
        InputError: none answers.
    """
    try:
        grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
        stub = beam_job_api_pb2_grpc.JobServiceStub(channel)
        told = stub.DescribePipelineOptions(beam_job_api_pb2.DescribePipelineOptionsRequest(), timeout=_ANSWER_SECONDS)
    except grpc.FutureTimeoutError as error:
        raise InputError(
            f"no job server answers at {endpoint} (job_endpoint): start one, or correct the address."
        ) from error
    except grpc.RpcError as error:
        raise InputError(
            f"what answers at {endpoint} (job_endpoint) is no Beam job server: {error.code().name}."
        ) from error
    return [option.name for option in told.options]
