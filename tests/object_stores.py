"""Emulated object stores for tests: processes on loopback ports, and the requests that they saw, by kind."""

import collections
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fsspec

BUCKET = "corpora"
LOOPBACK = "127.0.0.1"


@dataclass
class ObjectStore:
    """A running store: ``url("db")`` in its bucket, and what a process needs in its environment to reach it."""

    protocol: str
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def url(self, path: str) -> str:
        return f"{self.protocol}://{BUCKET}/{path}"

    def lines(self) -> list[str]:
        """Every request so far: ``METHOD path?query``."""
        return self.log.read_text(encoding="utf-8").splitlines()

    @contextmanager
    def failing(self, how: str) -> Iterator[None]:
        """Meanwhile it fails: ``down``, ``denied METHOD...``, ``slow SECONDS``, or ``unconditional``."""
        fault = self.log.with_name(f"{self.log.name}.fault")
        fault.write_text(how, encoding="utf-8")
        try:
            yield
        finally:
            fault.unlink()

    @contextmanager
    def counting(self) -> Iterator["collections.Counter[str]"]:
        """Counts the requests meanwhile: GET and PUT of objects, HEAD (what is known of one), LIST, COPY, DELETE."""
        before = len(self.lines())
        counts: collections.Counter[str] = collections.Counter()
        yield counts
        time.sleep(0.1)  # a request is logged when it is answered
        counts.update(map(self._kind, self.lines()[before:]))

    def _kind(self, line: str) -> str:
        method, _, path = line.partition(" ")
        if self.protocol == "s3":
            return "LIST" if "list-type" in path else "DELETE" if path.endswith("?delete") else method
        if method == "GET":
            return "GET" if path.startswith("/download/") else "LIST" if "/o?" in path else "HEAD"
        return "COPY" if "/rewriteTo/" in path else "PUT" if path.startswith("/upload/") else method


@contextmanager
def running(protocol: str, log: Path) -> Iterator[ObjectStore]:
    """A store that ends with the context, or with this process."""
    log.touch()
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    server = Path(__file__).with_name("object_store_server.py")
    with subprocess.Popen(
        [sys.executable, str(server), protocol, str(log), BUCKET],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **keys},
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        port = int(process.stdout.readline())
        # Filesystems are kept by what they were asked with, which the endpoint in the environment is no part of: they
        # would go on asking a store that this process ran before.
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
        try:
            yield ObjectStore(protocol, port, log, {**keys, **endpoint(protocol, port)})
        finally:
            process.stdin.close()
            process.wait(timeout=30)


def endpoint(protocol: str, port: int) -> dict[str, str]:
    """The environment in which the usual libraries find a store on a loopback port."""
    url = f"http://{LOOPBACK}:{port}"
    if protocol == "s3":
        return {"AWS_ENDPOINT_URL": url}
    # Else gcsfs asks over gRPC what kind of bucket it is, for a minute.
    return {"STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
