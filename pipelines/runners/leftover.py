"""Jobs that outlive their driver: recorded while they run, and ended before another driver writes the same shards.

A cluster goes on with a job whose driver was killed. A later build with other settings would find its shards
overwritten by it; so the job is recorded in ``.build/job.json``, and the next build ends it first.
"""

import time
from typing import Final

import grpc
from retrodb.pipelines.progress import Progress

from retrodb.errors import InputError
from retrodb.manifest import WORK_FOLDER
from retrodb.storage import Storage

JOB_RECORD: Final = f"{WORK_FOLDER}/job.json"
_ANSWER_SECONDS: Final = 15.0
_END_SECONDS: Final = 60.0


def record_job(storage: Storage, runner: str, endpoint: str | None, job_id: str) -> None:
    """A job runs from now on; ``endpoint`` is who can end it: the job server, the cluster (Flink), or None."""
    storage.commit_json(JOB_RECORD, {"runner": runner, "endpoint": endpoint, "id": job_id})


def forget_job(storage: Storage) -> None:
    """It is over."""
    if storage.size(JOB_RECORD) is not None:
        storage.delete(JOB_RECORD)


def end_leftover_job(storage: Storage, progress: Progress) -> None:
    """End the job that a killed driver left, if there is one. Call with the build lock held.

    Raises:
        InputError: it cannot be ended from here.
    """
    record = storage.read_json(JOB_RECORD)
    if record is None:
        return
    what = f"{record['runner']} job {record['id']}"
    advice = f"End it there, delete {storage.describe(JOB_RECORD)}, and run this again."
    if record["endpoint"] is None:
        raise InputError(f"an earlier build left {what}, which may still be writing to this database. {advice}")
    try:
        ended = _end(record["runner"], record["endpoint"], record["id"])
    except (grpc.RpcError, grpc.FutureTimeoutError, InputError) as error:
        raise InputError(
            f"an earlier build left {what}, which may still be writing to this database, and what "
            f"could end it, at {record['endpoint']}, does not answer. {advice}"
        ) from error
    if not ended:
        raise InputError(f"an earlier build left {what}, which does not end. {advice}")
    progress.note(f"{what} of an earlier build was ended")
    forget_job(storage)


def _end(runner: str, endpoint: str, job_id: str) -> bool:
    """Cancel a job and wait for its end; who knows no such job has none that writes."""
    # Only who has such a job pays for the runners' modules.
    from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc  # noqa: PLC0415
    from apache_beam.runners.portability.portable_runner import TERMINAL_STATES  # noqa: PLC0415
    from retrodb.pipelines.runners.flink import cancel_on_cluster  # noqa: PLC0415

    if runner == "flink":
        return cancel_on_cluster(endpoint, job_id)
    with grpc.insecure_channel(endpoint) as channel:
        grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
        stub = beam_job_api_pb2_grpc.JobServiceStub(channel)
        known = stub.GetJobs(beam_job_api_pb2.GetJobsRequest(), timeout=_ANSWER_SECONDS).job_info
        if job_id not in {job.job_id for job in known}:
            return True
        wanted = beam_job_api_pb2.GetJobStateRequest(job_id=job_id)
        end = time.monotonic() + _END_SECONDS
        if stub.GetState(wanted, timeout=_ANSWER_SECONDS).state not in TERMINAL_STATES:
            stub.Cancel(beam_job_api_pb2.CancelJobRequest(job_id=job_id), timeout=_ANSWER_SECONDS)
        while time.monotonic() < end:
            if stub.GetState(wanted, timeout=_ANSWER_SECONDS).state in TERMINAL_STATES:
                return True
            time.sleep(0.25)
    return False
