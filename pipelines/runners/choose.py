"""The runner that the settings name."""

from retrodb.pipelines.runners.base import Runner
from retrodb.pipelines.runners.local import LocalRunner

from retrodb.config import RunSettings
from retrodb.errors import InputError


def make_runner(run: RunSettings) -> Runner:
    """The runner of a build; nothing is contacted before `Runner.check`.

    ``--workers``, where it is given, is the number of processes here, Flink's parallelism, or Dataflow's most workers.

    Raises:
        InputError: it does not take these options.
    """
    if run.runner == "local":
        if run.runner_option:
            raise InputError(
                f"--runner-option {run.runner_option[0]}: the runner 'local' takes none; "
                "give --runner flink, dataflow or portable."
            )
        return LocalRunner(run.workers)
    from retrodb.pipelines.runners.options import RunnerOptions  # noqa: PLC0415 - a local build pays for no other runner

    options = RunnerOptions.parse(run.runner_option)
    workers = run.workers if "workers" in run.model_fields_set else None
    if run.runner == "flink":
        from retrodb.pipelines.runners.flink import FlinkClusterRunner  # noqa: PLC0415

        return FlinkClusterRunner(options, workers)
    if run.runner == "dataflow":
        from retrodb.pipelines.runners.dataflow import DataflowRunner  # noqa: PLC0415

        return DataflowRunner(options, workers, run.device)
    from retrodb.pipelines.runners.portable import JobServerRunner  # noqa: PLC0415

    return JobServerRunner(options)
