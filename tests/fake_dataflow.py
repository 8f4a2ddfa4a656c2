"""A stand-in for Dataflow on loopback ports: ``python fake_dataflow.py FOLDER COMMAND...`` runs COMMAND against it.

It serves the part of Dataflow's REST interface that Beam's client uses, a token endpoint and an emulated gs://, writes
each Job message that it is sent to FOLDER/jobs as JSON and its pipeline proto beside it, and runs the pipeline in this
process, with the environments' containers replaced by this Python. COMMAND finds all of it by its environment:
``FAKE_DATAFLOW`` is the endpoint. ``network: none`` is printed where no address but loopback can be reached.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import object_store_server
from object_stores import BUCKET, LOOPBACK, endpoint

ELSEWHERE = ("192.0.2.1", 443)
"""An address of the block that is kept for documentation (RFC 5737)."""


class Service:
    """The jobs there are, by id."""

    def __init__(self, folder: Path, store: str) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self.messages: dict[str, str] = {}
        self._folder = folder
        self._store = store
        self._lock = threading.Lock()
        (folder / "jobs").mkdir(parents=True, exist_ok=True)

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            job_id = f"job-{len(self.jobs):02d}"
            job |= {"id": job_id, "currentState": "JOB_STATE_RUNNING"}
            self.jobs[job_id] = job
        (self._folder / "jobs" / f"{job_id}.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
        threading.Thread(target=self._run, args=[job_id], daemon=True).start()
        return job

    def update(self, job_id: str, change: dict[str, Any]) -> dict[str, Any]:
        self.jobs[job_id]["currentState"] = change["requestedState"]
        return self.jobs[job_id]

    def read(self, url: str) -> bytes:
        bucket, _, name = url.removeprefix("gs://").partition("/")
        address = f"{self._store}/download/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.read()

    def _run(self, job_id: str) -> None:
        job = self.jobs[job_id]
        try:
            url = job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
            proto = self.read(url)
            (self._folder / "jobs" / f"{job_id}.pb").write_bytes(proto)
            self.metrics[job_id] = run(proto)
            state = "JOB_STATE_DONE"
        except Exception:
            self.messages[job_id] = traceback.format_exc()
            state = "JOB_STATE_FAILED"
        with self._lock:
            if job["currentState"] == "JOB_STATE_RUNNING":
                job["currentState"] = state


def run(serialized: bytes) -> list[dict[str, Any]]:
    """Run a pipeline proto here, and return its counters as Dataflow tells them."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    pipeline = beam_runner_api_pb2.Pipeline.FromString(serialized)
    for environment in pipeline.components.environments.values():
        environment.urn, environment.payload = "beam:env:embedded_python:v1", b""
        environment.ClearField("resource_hints")
        environment.ClearField("dependencies")
    result = FnApiRunner().run_via_runner_api(pipeline, PipelineOptions([]))
    result.wait_until_finish()
    return [
        {
            "name": {
                "origin": "user",
                "name": one.key.metric.name,
                "context": {"namespace": one.key.metric.namespace, "step": one.key.step, **tentative},
            },
            "scalar": one.committed,
        }
        for one in result.metrics().query()["counters"]
        for tentative in ({}, {"tentative": "true"})
    ]


class Answers(BaseHTTPRequestHandler):
    """Dataflow's v1b3 REST interface, as far as it is asked."""

    service: Service
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/token"):
            self._answer({"access_token": "t", "expires_in": 3600, "token_type": "Bearer"})
        else:
            self._answer(self.service.create(json.loads(body)))

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self._answer(self.service.update(self._job(), body))

    def do_GET(self) -> None:
        job = self._job()
        if "/messages" in self.path:
            text = self.service.messages.get(job)
            message = {"id": "1", "messageText": text, "messageImportance": "JOB_MESSAGE_ERROR"}
            self._answer({"jobMessages": [message] if text else []})
        elif "/metrics" in self.path:
            self._answer({"metrics": self.service.metrics.get(job, [])})
        else:
            self._answer(self.service.jobs[job])

    def _job(self) -> str:
        found = re.search(r"/jobs/(job-\d+)", self.path)
        assert found is not None, self.path
        return found[1]

    def _answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def key_file(folder: Path, port: int) -> Path:
    """A service account's key, whose tokens come from here."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": "p",
        "private_key_id": "k",
        "private_key": private.decode(),
        "client_email": "driver@p.iam.gserviceaccount.com",
        "token_uri": f"http://{LOOPBACK}:{port}/token",
    }
    path = folder / "key.json"
    path.write_text(json.dumps(account), encoding="utf-8")
    return path


def reaches_the_network() -> bool:
    """Whether a packet could leave the machine."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(ELSEWHERE)  # a datagram socket: looks for a route, sends nothing
        return True
    return False


def main(folder: Path, command: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "requests.log").open("a", buffering=1, encoding="utf-8") as log:
        store_port = object_store_server.serve_gs(log, BUCKET)
        server = ThreadingHTTPServer((LOOPBACK, 0), Answers)
        port = int(server.server_address[1])
        environment = {
            **endpoint("gs", store_port),
            "FAKE_DATAFLOW": f"http://localhost:{port}",
            "GOOGLE_APPLICATION_CREDENTIALS": str(key_file(folder, port)),
            "NO_GCE_CHECK": "true",
            "RETRODB_CACHE": str(folder / "cache"),
        }
        os.environ.update(environment)  # for what this process runs
        Answers.service = Service(folder, environment["STORAGE_EMULATOR_HOST"])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print("network: " + ("reachable" if reaches_the_network() else "none"), flush=True)
        with tempfile.TemporaryDirectory() as place:
            return subprocess.run(command, check=False, cwd=place).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
