"""The Dataflow Flex template: one small job whose only worker is the driver of a build.

    python -m retrodb.pipelines.launch --inputs 'gs://b/corpus/*.gz' --out gs://b/db --project p --region r ...

A template launches one job from one graph, and gives its launcher an hour or two; a build is a dozen jobs, each planned
from what the one before it wrote. So the job that is launched has one element on one worker, which runs
``retrodb build --runner dataflow`` to its end. Should that worker be lost, Dataflow gives the element to another one,
which resumes.
"""

import argparse
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from retrodb.errors import WorkerError

_FORWARDED: Final = (
    "project",
    "region",
    "temp_location",
    "sdk_container_image",
    "service_account_email",
    "network",
    "subnetwork",
    "labels",
    "dataflow_kms_key",
    "dataflow_endpoint",
)
"""What the launcher says of the job that is launched holds for those of the stages, too."""

_OF_THE_DRIVER: Final = (
    "--worker_machine_type=n2-standard-2",
    "--num_workers=1",
    "--max_num_workers=1",
    "--autoscaling_algorithm=NONE",
    "--number_of_worker_harness_threads=1",
    "--disk_size_gb=50",
    "--sdk_location=container",
    "--experiments=use_runner_v2",
    "--experiments=no_use_multiple_sdk_containers",
)
_WAIT: Final = "5m"
"""A driver that was lost holds its lock for three minutes (docs/object-storage.md)."""


class RunDriver(beam.DoFn):
    """Runs ``retrodb`` as a process of its own, and passes on what it says."""

    def process(self, arguments: Sequence[str]) -> Iterator[int]:
        code, last = _run(arguments)
        if code != 0:
            raise WorkerError(f"retrodb build ended with exit code {code}: {last}")
        yield code


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code, and the last line that was said."""
    last = ""
    command = [sys.executable, "-m", "retrodb", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last = line.strip()
                logging.getLogger(__name__).info(last)
    return process.returncode, last


def driver_arguments(inputs: str, out: str, flags: str, options: PipelineOptions) -> list[str]:
    """What ``retrodb`` is run with: the template's parameters, and its own job's options for the stages' jobs."""
    given = options.get_all_options(drop_default=True)
    pairs = []
    for key in _FORWARDED:
        values = given.get(key) or []
        pairs += [f"{key}={value}" for value in ([values] if isinstance(values, str) else values)]
    if given.get("use_public_ips") is False:
        pairs.append("use_public_ips=false")
    named = [word for pair in pairs for word in ("--runner-option", pair)]
    given_flags = ["--wait", _WAIT, *shlex.split(flags)]  # of a flag that is given twice the latter holds
    return ["build", *shlex.split(inputs), "--out", out, *given_flags, "--runner", "dataflow", *named]


def main(words: Sequence[str] | None = None) -> None:
    """Launch the driver's job; or write it to ``template_location``, where the template's launcher asks for that."""
    parser = argparse.ArgumentParser(prog="launch", allow_abbrev=False)
    parser.add_argument("--inputs", required=True, help="INPUT... of retrodb build, apart by blanks")
    parser.add_argument("--out", required=True, help="the database, as gs://BUCKET/DB")
    parser.add_argument("--flags", default="", help="more of retrodb build's flags, as a shell would read them")
    given, rest = parser.parse_known_args(words)
    arguments = driver_arguments(given.inputs, given.out, given.flags, PipelineOptions(rest))
    pipeline = beam.Pipeline(options=PipelineOptions([*rest, *_OF_THE_DRIVER]))
    _ = pipeline | beam.Create([arguments]) | "drive" >> beam.ParDo(RunDriver())
    pipeline.run()


if __name__ == "__main__":
    main()
