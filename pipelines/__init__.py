"""One Beam pipeline a stage, the runners, and the driver that runs what the manifest says is missing.

A stage is a list of *tasks* (small, picklable, one shard each). Its pipeline sends the tasks to workers; a worker
writes the task's shards whole and then a *receipt* beside them (`receipts`): path, rows, bytes, sha256, counts. The
driver (`driver`) reads the receipts of all tasks and only then records the shards in the manifest. A task with a
receipt is never done twice, so running again is resuming. Nothing but tasks, receipts and, in the two shuffles,
arrays crosses the runner; nothing is shared between workers but the database URL.
"""
