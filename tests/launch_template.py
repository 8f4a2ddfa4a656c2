"""What ``gcloud dataflow flex-template run`` does, against `fake_dataflow`: ``python launch_template.py SOURCE FOLDER
WORD...`` puts SOURCE on gs://, has the template's launcher write its job, starts that job, and waits for its end.

The database is copied to FOLDER. WORDs go to ``retrodb.pipelines.launch``.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from object_stores import BUCKET

from retrodb.storage import Storage

JOBS = f"{os.environ['FAKE_DATAFLOW']}/v1b3/projects/p/locations/europe-west4/jobs"


def ask(url: str, body: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as answer:
        return json.load(answer)


def main(source: Path, folder: Path, words: list[str]) -> None:
    bucket = Storage(f"gs://{BUCKET}/x")
    Storage(f"gs://{BUCKET}/inputs").commit_bytes("in.jsonl", source.read_bytes())
    template = [f"--template_location=gs://{BUCKET}/x/job_object", f"--dataflow_endpoint={os.environ['FAKE_DATAFLOW']}"]
    subprocess.run([sys.executable, "-m", "retrodb.pipelines.launch", *words, *template], check=True)
    job = ask(JOBS, bucket.read_bytes("job_object"))["id"]
    while (state := ask(f"{JOBS}/{job}")["currentState"]) == "JOB_STATE_RUNNING":
        time.sleep(0.2)
    print(ask(f"{JOBS}/{job}/messages"), file=sys.stderr)
    database = Storage(f"gs://{BUCKET}/db")
    for name in [
        "manifest.json",
        *(path for folder in database.list_folders("") for path in database.list_below(folder)),
    ]:
        with database.local_copy(name) as copy:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy, target)
    assert state == "JOB_STATE_DONE", state


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
