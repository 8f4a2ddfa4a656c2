"""Where jobs run: on this machine, or wherever a runner of Beam's has its workers. One stage graph for all.

One module a runner; `make_runner` chooses. A runner takes a `Job` (a pipeline and what to call it), runs it to its end,
and says what became of it (`JobRecord`), or raises the worker's own error.
"""

from retrodb.pipelines.runners.base import Job, JobRecord, Runner, WorkerDiedError
from retrodb.pipelines.runners.choose import make_runner
from retrodb.pipelines.runners.local import LocalRunner, run_local

__all__ = ["Job", "JobRecord", "LocalRunner", "Runner", "WorkerDiedError", "make_runner", "run_local"]
