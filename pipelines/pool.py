"""A pool of Python workers for runners that take their workers from one (Beam's EXTERNAL environment).

    python -m retrodb.pipelines.pool --port 50000

It runs beside each worker of the runner: a side-car in Kubernetes. Beam has such a pool as well; this one starts its
workers from a process that has imported what they need (a job's start is what small stages cost), under this Python and
not the one that happens to be first on the PATH, and with one thread in every native library.
"""

import argparse
import logging
import os
import threading
from concurrent import futures
from typing import Any, Final

from retrodb.pipelines.forking import NEEDED_BY_ALL, ForkServer
from retrodb.pipelines.threads import ONE_THREAD

_ATTEMPTS: Final = 3


def serve(port: int, address: str = "localhost") -> None:
    """Start workers for whoever asks at ``address``, until the process is ended."""
    import grpc  # noqa: PLC0415 - after the limits are set
    from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc  # noqa: PLC0415

    workers = ForkServer((*NEEDED_BY_ALL, "retrodb.encoding.encoder"))
    workers.begin()

    class Pool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
        """Beam's external worker pool, service of the Fn API."""

        def StartWorker(self, request: Any, _: Any) -> Any:  # noqa: N802 - the service's name
            given = (workers, request.control_endpoint.url, request.worker_id)
            threading.Thread(target=_keep, args=given, name=f"worker {request.worker_id}", daemon=True).start()
            return beam_fn_api_pb2.StartWorkerResponse()

        def StopWorker(self, request: Any, _: Any) -> Any:  # noqa: N802 - the service's name
            """A worker ends when its control channel does. To end it by its id would be wrong: ids are those of one
            TaskManager, and two of them may share a pool (Beam's own pool then ends the other one's worker)."""
            return beam_fn_api_pb2.StopWorkerResponse()

    server = grpc.server(futures.ThreadPoolExecutor(16))
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(Pool(), server)
    if server.add_insecure_port(f"{address}:{port}") == 0:
        raise SystemExit(f"retrodb pool: port {port} of {address} is taken; give another --port.")
    server.start()
    logging.getLogger(__name__).info("workers start at %s:%d", address, port)
    threading.Event().wait()


def _keep(workers: ForkServer, control: str, worker_id: str) -> None:
    """Start a worker, and another one where it is killed: the runner waits minutes for one that never connected. Where
    it had connected, the runner starts the job over with other workers, and this one finds nobody to serve."""
    for _ in range(_ATTEMPTS):
        code = workers.start(control, worker_id).wait()
        if code >= 0:
            return
        logging.getLogger(__name__).warning("worker %s was ended by signal %d", worker_id, -code)


def main() -> None:
    """Read the command line, and serve."""
    parser = argparse.ArgumentParser(
        prog="python -m retrodb.pipelines.pool", description="Python workers for a runner."
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--address", default="localhost", help="0.0.0.0 where the runner's worker is another container")
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    serve(arguments.port, arguments.address)


if __name__ == "__main__":
    main()
