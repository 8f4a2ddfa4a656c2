"""The files under ``deploy/``: what can be said of them without a container engine, a cluster or an account.

Each is read by the tool that is made for it, where it can run here: hadolint, shellcheck, the schemas of Kubernetes and
of the Flink operator, Maven, Beam.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import apache_beam
import pytest
import yaml
from retrodb.pipelines.runners.portable import WORKER_POOL
from retrodb.pipelines.threads import ONE_THREAD

OPERATOR_VERSION = "1.10.0"
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


def test_kubernetes_own_schemas_take_the_job_servers(manifests):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install 'retrodb[dev]'")
    core = [found for (kind, _), found in manifests.items() if kind != "FlinkDeployment"]
    assert {found["kind"] for found in core} == {"Deployment", "Service"}
    for found in core:
        validate.validate(found, "1.32", strict=True)


@pytest.fixture(scope="module")
def operator_schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI schema of a FlinkDeployment, from the jar in which the operator's makers publish it."""
    if shutil.which("mvn") is None:
        pytest.skip("the Flink operator's schema comes from Maven Central, and there is no mvn on the PATH")
    folder = DEPLOY / "flink" / ".cluster" / "operator"
    jar = folder / f"flink-kubernetes-operator-api-{OPERATOR_VERSION}.jar"
    if not jar.exists():
        artifact = f"org.apache.flink:flink-kubernetes-operator-api:{OPERATOR_VERSION}"
        fetch = ["mvn", "-B", "-q", "dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"]
        done = subprocess.run(fetch, capture_output=True, text=True, check=False, cwd=tmp_path_factory.mktemp("mvn"))
        if done.returncode != 0:
            pytest.skip(f"Maven could not fetch the Flink operator's schema: {done.stdout[-300:]}")
    with zipfile.ZipFile(jar) as archive:
        text = archive.read("META-INF/fabric8/flinkdeployments.flink.apache.org-v1.yml")
    (version,) = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    assert version["name"] == "v1beta1"
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """A schema that refuses unknown fields, which Kubernetes drops without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(value) for name, value in schema.items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    return {**inner, "additionalProperties": False} if "properties" in schema and not keeps else inner


@pytest.mark.slow
def test_the_operators_own_schema_takes_the_clusters(manifests, operator_schema):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install 'retrodb[dev]'")
    operator_schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}  # every object has these
    validator = jsonschema.Draft7Validator(operator_schema)
    clusters = [found for (kind, _), found in manifests.items() if kind == "FlinkDeployment"]
    for found in clusters:
        assert [error.message for error in validator.iter_errors(found)] == []
    wrong = json.loads(json.dumps(clusters[0]))
    wrong["spec"]["taskManager"]["podTemplate"]["spec"]["containers"][1]["image_name"] = "x"
    wrong["spec"]["flinkVersion"] = "v0_1"
    assert len(list(validator.iter_errors(wrong))) == 2, "the schema does tell"


@pytest.mark.slow
def test_maven_takes_the_pom():
    if shutil.which("mvn") is None:
        pytest.skip("there is no mvn on the PATH")
    command = ["mvn", "-B", "-q", "-f", str(DEPLOY / "flink" / "pom.xml"), "validate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def tool(name: str) -> str:
    """A checker that came with the development extra."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'retrodb[dev]'")
    return found


@pytest.mark.parametrize("path", ["flink/Dockerfile", "flink/Dockerfile.flink", "dataflow/Dockerfile"])
def test_hadolint_has_nothing_to_say_of_the_container_files(path):
    done = subprocess.run([tool("hadolint"), str(DEPLOY / path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", ["dataflow/submit.sh", "dataflow/accounts.sh"])
def test_shellcheck_has_nothing_to_say_of_the_scripts(path):
    done = subprocess.run([tool("shellcheck"), str(DEPLOY / path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


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


ACCOUNT = {"PROJECT": "p", "REGION": "r", "BUCKET": "b", "DRY_RUN": "1"}


def script(name: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [str(DEPLOY / "dataflow" / name), *arguments]
    path = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**path, **environment})


def submit(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return script("submit.sh", *arguments, **environment)


def commands(done: "subprocess.CompletedProcess[str]") -> list[list[str]]:
    """What a script would have run."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_submit_script_starts_a_build_on_dataflow():
    build, push, deploy, execute = commands(submit("gs://b/in,put/*.jsonl.gz", "--out", "gs://b/db", **ACCOUNT))
    assert (build[:2], push[:2]) == (["docker", "build"], ["docker", "push"])
    assert (deploy[:4], execute[:4]) == (["gcloud", "run", "jobs", "deploy"], ["gcloud", "run", "jobs", "execute"])
    given = deploy[deploy.index("--args") + 1].removeprefix("^|^").split("|")
    assert given[:6] == ["build", "gs://b/in,put/*.jsonl.gz", "--out", "gs://b/db", "--runner", "dataflow"]
    assert set(given[7::2]) == {
        "project=p",
        "region=r",
        "temp_location=gs://b/dataflow",
        "sdk_container_image=r-docker.pkg.dev/p/retrodb/worker:latest",
        "service_account_email=retrodb-worker@p.iam.gserviceaccount.com",
        "use_public_ips=false",
    }


def test_the_submit_script_launches_the_flex_template_with_parameters_that_it_has():
    """And what the template's launcher makes of them is what `retrodb build` is given."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from retrodb.pipelines.launch import driver_arguments

    words = ["gs://b/in,put/*.jsonl.gz", "gs://b/a b.txt", "--out", "gs://b/db", "--neighbours", "10"]
    *_, template, launch = commands(submit(*words, LAUNCH="flex", **ACCOUNT))
    assert template[:4] == [*launch[:3], "build"] == ["gcloud", "dataflow", "flex-template", "build"]
    assert (ROOT / template[template.index("--metadata-file") + 1]).is_file()
    given = dict(pair.split("=", 1) for pair in launch[-1].removeprefix("^|^").split("|"))
    metadata = json.loads((DEPLOY / "dataflow" / "metadata.json").read_text(encoding="utf-8"))
    required = {one["name"] for one in metadata["parameters"] if not one.get("isOptional")}
    assert required <= set(given) <= {one["name"] for one in metadata["parameters"]}
    for one in metadata["parameters"]:
        assert all(re.fullmatch(pattern, given[one["name"]].strip()) for pattern in one.get("regexes", []))
    options = PipelineOptions(["--project=p", f"--sdk_container_image={given['sdk_container_image']}"])
    assert driver_arguments(given["inputs"], given["out"], given["flags"], options) == [
        "build",
        "gs://b/in,put/*.jsonl.gz",
        "gs://b/a b.txt",
        "--out",
        "gs://b/db",
        "--wait",
        "5m",
        "--neighbours",
        "10",
        "--runner-option",
        "service_account_email=retrodb-worker@p.iam.gserviceaccount.com",
        "--runner-option",
        "use_public_ips=false",
        "--runner",
        "dataflow",
        "--runner-option",
        "project=p",
        "--runner-option",
        "sdk_container_image=r-docker.pkg.dev/p/retrodb/worker:latest",
    ]


def test_the_image_launches_the_template_and_works():
    text = (DEPLOY / "dataflow" / "Dockerfile").read_text(encoding="utf-8")
    launcher = re.search(r"FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/retrodb/(\S+)", text)[1]
    assert "retrodb.pipelines.launch import main" in (ROOT / launcher).read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["/opt/apache/beam/boot"]' in text
    assert "/opt/google/dataflow/python_template_launcher" in text


def test_the_submit_script_says_what_is_missing():
    assert "set PROJECT" in submit("x").stderr
    for words in ([], ["gs://b/x"], ["--out", "gs://b/db"]):
        assert submit(*words, PROJECT="p", REGION="r", BUCKET="b").returncode == 2
    assert "LAUNCH is run" in submit("x", LAUNCH="rocket", PROJECT="p", REGION="r", BUCKET="b").stderr


def test_no_account_has_a_right_that_it_does_not_need():
    granted = commands(script("accounts.sh", **ACCOUNT))
    roles = {(line[line.index("--member") + 1].split(":")[1].split("@")[0], line[line.index("--role") + 1])
             for line in granted if "--role" in line}  # fmt: skip
    shared = {"roles/dataflow.worker", "roles/storage.objectUser", "roles/artifactregistry.reader"}
    of_driver = {*shared, "roles/dataflow.developer", "roles/iam.serviceAccountUser"}
    assert roles == {("retrodb-worker", role) for role in shared} | {("retrodb-driver", role) for role in of_driver}
    on_the_project = {line[line.index("--role") + 1] for line in granted if "projects" in line[:2]}
    assert on_the_project == {"roles/dataflow.worker", "roles/dataflow.developer"}, "buckets are named, one by one"
