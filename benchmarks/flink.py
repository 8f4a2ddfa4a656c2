"""The embed stage on one TaskManager and on two: python benchmarks/flink.py INPUT... (a cluster runs: make flink-up).

Prints seconds of the embed job and chunks a second for each, their ratio, and the machine's load meanwhile: with other
work on it, the ratio says nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CLUSTER = Path(__file__).parents[1] / "deploy" / "flink" / "cluster.py"


def retrodb(*arguments: object) -> dict:
    command = [sys.executable, "-m", "retrodb", "build", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--shard-bytes", default="256KiB")
    arguments = parser.parse_args()
    status = subprocess.run([sys.executable, str(CLUSTER), "status"], stdout=subprocess.PIPE, text=True, check=True)
    flags = status.stdout.split("retrodb build ... ")[1].split()
    with tempfile.TemporaryDirectory() as folder:
        given = [*arguments.inputs, "--shard-bytes", arguments.shard_bytes]
        chunks = retrodb(*given, "--out", f"{folder}/chunks", "--until", "chunk")["chunks"]
        seconds = {}
        for parallelism in (1, 2):
            out = f"{folder}/{parallelism}"
            shutil.copytree(f"{folder}/chunks", out)
            option = ["--runner-option", f"parallelism={parallelism}"]
            jobs = retrodb(*given, "--out", out, "--until", "embed", *flags, *option)["jobs"]
            seconds[parallelism] = next(job["seconds"] for job in jobs if job["stage"] == "embed")
            rate = chunks / seconds[parallelism]
            took = f"{chunks:,} chunks in {seconds[parallelism]:.1f} s, {rate:.1f}/s"
            print(f"{parallelism} TaskManager(s): {took}, load {os.getloadavg()[0]:.1f}")
        print(f"two against one: {seconds[1] / seconds[2]:.2f} x on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
