"""An object store on a loopback port, as a process of its own: ``python object_store_server.py s3|gs LOG BUCKET``.

moto's S3 or gcp-storage-emulator, with every request written to LOG (``METHOD path?query``) once it is answered. Prints
its port, and ends when its standard input does: with the tests, however those end.

A file LOG.fault makes it fail for as long as it is there: ``down`` hangs up on whoever asks, ``denied METHOD...``
answers these methods with 403, ``slow SECONDS`` takes its time with each answer, ``unconditional`` overlooks the
conditions of writes.
"""

import logging
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from http.server import HTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, urlsplit

LOOPBACK = "127.0.0.1"


def fault_of(log: IO[str]) -> list[str]:
    """How the store fails at this moment."""
    try:
        return Path(f"{log.name}.fault").read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def is_down(log: IO[str]) -> bool:
    """Whether to hang up; takes its time first, if it is to."""
    fault = fault_of(log)
    if fault[:1] == ["slow"]:
        time.sleep(float(fault[1]))
    return fault == ["down"]


S3_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


def serve_s3(log: IO[str], bucket: str) -> int:
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    app = DomainDispatcherApplication(create_backend_app)

    def counting(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not environ["PATH_INFO"].startswith("/moto-api"):
            query = environ.get("QUERY_STRING", "")
            log.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' if query else ''}{query}\n")
        if fault_of(log) == ["unconditional"]:
            environ.pop("HTTP_IF_MATCH", None)
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if environ["REQUEST_METHOD"] in fault_of(log)[1:]:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(
                "403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(S3_DENIED)))]
            )
            return [S3_DENIED]
        return app(environ, start_response)

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def run_wsgi(self) -> None:
            if is_down(log):
                self.close_connection = True
            else:
                super().run_wsgi()

        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    server = make_server(LOOPBACK, 0, counting, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    boto3.client("s3", endpoint_url=f"http://{LOOPBACK}:{server.port}", region_name="us-east-1").create_bucket(
        Bucket=bucket
    )
    return server.port


def serve_gs(log: IO[str], bucket: str) -> int:
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    class RefusedError(Exception):
        pass

    class Conditional(Storage):
        """The emulator's own takes no notice of ``ifGenerationMatch``."""

        wanted: str | None = None

        def create_file(self, bucket_name: str, file_name: str, *args: Any, **kwargs: Any) -> None:
            there = self.objects.get(bucket_name, {}).get(file_name, {}).get("generation", "0")
            if self.wanted not in (None, there):
                raise RefusedError
            super().create_file(bucket_name, file_name, *args, **kwargs)

    logging.disable(logging.CRITICAL)
    storage = Conditional(use_memory_fs=True)
    buckets.create_bucket(bucket, storage)
    one_at_a_time = threading.Lock()  # the emulator's own storage is made for one thread

    class Counting(RequestHandler):
        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            log.write(f"{self.command} {self.path}\n")

        def handle_one_request(self) -> None:
            with one_at_a_time:
                super().handle_one_request()

        def do_POST(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            overlooked = fault_of(log) == ["unconditional"]
            storage.wanted = None if overlooked else query.get("ifGenerationMatch", [None])[0]
            try:
                super().do_POST()
            except RefusedError:
                self.send_error(412, "Precondition Failed")

        def parse_request(self) -> bool:
            """Whether to go on with a request: not with one that is to fail."""
            if not super().parse_request():
                return False
            if is_down(log):
                self.close_connection = True
                return False
            if self.command in fault_of(log)[1:]:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_error(403, "Forbidden")
                self.close_connection = True
                return False
            return True

    class Threaded(socketserver.ThreadingMixIn, HTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up, as gcsfs does when one of two questions is answered, is no news."""

    server = Threaded((LOOPBACK, 0), partial(Counting, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def main(protocol: str, log_path: str, bucket: str) -> None:
    with open(log_path, "a", buffering=1, encoding="utf-8") as log:
        port = {"s3": serve_s3, "gs": serve_gs}[protocol](log, bucket)
        print(port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
