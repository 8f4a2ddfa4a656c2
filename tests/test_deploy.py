"""The files under ``deploy/``: what can be said of them without a container engine, a cluster or an account."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import apache_beam
import pytest
import yaml
from retrodb.pipelines.runners.portable import WORKER_POOL
from retrodb.pipelines.threads import ONE_THREAD

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
POOL_PORT = int(WORKER_POOL.rpartition(":")[2])


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """Kubernetes objects by kind and name."""
    documents = yaml.safe_load_all((DEPLOY / "flink" / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {(found["kind"], found["metadata"]["name"]): found for found in documents}


def side_car(deployment: dict[str, Any]) -> dict[str, Any]:
    containers = deployment["spec"]["taskManager"]["podTemplate"]["spec"]["containers"]
    return next(one for one in containers if one["name"] == "python-workers")


def test_every_taskmanager_has_a_worker_pool_beside_it(manifests):
    clusters = [found for (kind, _), found in manifests.items() if kind == "FlinkDeployment"]
    assert [found["apiVersion"] for found in clusters] == ["flink.apache.org/v1beta1"] * 2
    for found in clusters:
        assert side_car(found)["ports"] == [{"containerPort": POOL_PORT}]
        assert side_car(found)["readinessProbe"]["tcpSocket"]["port"] == POOL_PORT
        assert all(isinstance(value, str) for value in found["spec"]["flinkConfiguration"].values())


def test_only_the_embedding_cluster_has_gpus(manifests):
    limits = {
        name: side_car(found)["resources"]["limits"]
        for (kind, name), found in manifests.items()
        if kind == "FlinkDeployment"
    }
    assert "nvidia.com/gpu" not in limits["retrodb"]
    assert limits["retrodb-gpu"]["nvidia.com/gpu"] == "1"


def test_each_cluster_has_a_job_server_that_submits_to_it(manifests):
    for cluster, server in (("retrodb", "retrodb-jobserver"), ("retrodb-gpu", "retrodb-gpu-jobserver")):
        deployment, service = manifests["Deployment", server], manifests["Service", server]
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        assert f"--flink-master={cluster}-rest:8081" in container["args"]
        served = {port["port"] for port in service["spec"]["ports"]}
        assert served == {port["containerPort"] for port in container["ports"]} == {8099, 8098}
        assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_flinks_version_is_the_same_everywhere(manifests):
    pom = (DEPLOY / "flink" / "pom.xml").read_text(encoding="utf-8")
    version = re.search(r"beam-runners-flink-([\d.]+)<", pom)[1]
    assert f"FROM flink:{version}-java17" in (DEPLOY / "flink" / "Dockerfile.flink").read_text(encoding="utf-8")
    wanted = f"v{version.replace('.', '_')}"
    versions = {f["spec"]["flinkVersion"] for (kind, _), f in manifests.items() if kind == "FlinkDeployment"}
    assert versions == {wanted}


@pytest.mark.parametrize("path", ["flink/Dockerfile", "dataflow/Dockerfile"])
def test_worker_images_hold_libraries_to_one_thread_and_copy_the_project(path):
    text = (DEPLOY / path).read_text(encoding="utf-8")
    for name, value in ONE_THREAD.items():
        assert f"{name}={value}" in text
    assert "COPY . ." in text
    assert re.search(r"pip install .*\"\.\[\w+\]\"", text)


def test_the_pool_of_the_image_listens_where_runners_look_for_it():
    text = (DEPLOY / "flink" / "Dockerfile").read_text(encoding="utf-8")
    assert f'"retrodb.pipelines.pool", "--port", "{POOL_PORT}"' in text


def test_the_dataflow_worker_has_a_beam_that_the_project_takes():
    text = (DEPLOY / "dataflow" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"FROM apache/beam_python3.11_sdk:([\d.]+)", text)[1] == apache_beam.__version__


def submit(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [str(DEPLOY / "dataflow" / "submit.sh"), *arguments]
    path = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**path, **environment})


def test_the_submit_script_starts_a_build_on_dataflow():
    account = {"PROJECT": "p", "REGION": "r", "BUCKET": "b", "DRY_RUN": "1"}
    done = submit("gs://b/in,put/*.jsonl.gz", "--out", "gs://b/db", **account)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0:2] for line in done.stdout.splitlines()] == [
        ["docker", "build"],
        ["docker", "push"],
        ["gcloud", "run"],
        ["gcloud", "run"],
    ]
    plain = done.stdout.replace("\\", "")
    assert "build|gs://b/in,put/*.jsonl.gz|--out|gs://b/db|--runner|dataflow|--runner-option|project=p" in plain
    assert "sdk_container_image=r-docker.pkg.dev/p/retrodb/worker:latest" in plain


def test_the_submit_script_says_what_is_missing():
    assert "set PROJECT" in submit("x").stderr
    assert submit(PROJECT="p", REGION="r", BUCKET="b").returncode == 2
