"""Exceptions with exit codes: what went wrong, where, the values, and what to do about it.

Every error a user can cause is one of these; the command line prints ``str(error)`` and exits with
``error.exit_code``. Anything else that escapes is a defect of retrodb itself.
"""

from typing import ClassVar, Final

INTERRUPTED: Final = 130
"""The exit code of a program that Ctrl-C, or a request to terminate, has ended."""


class RetrodbError(Exception):
    """Base of all errors a user may meet. ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(RetrodbError):
    """A flag or argument that cannot be meant (exit 2)."""

    exit_code = 2


class InputError(RetrodbError):
    """Bad input, configuration or a mismatch: refused before anything is changed (exit 3)."""

    exit_code = 3


class MismatchError(InputError):
    """Two things that must have been made alike were not: encoder, metric, schema (exit 3)."""


class EncoderError(InputError):
    """An encoder that the database cannot have: no encoder's folder, another tokenizer, vectors that are not finite
    (exit 3). A refresher that follows a trainer leaves it out; what else is refused ends it."""


class UnreachableError(RetrodbError):
    """The storage does not answer or refuses: no such bucket, no credentials, no permission, no network (exit 3)."""

    exit_code = 3


class DamagedError(RetrodbError):
    """A recorded shard is missing or its bytes are not the recorded ones (exit 4)."""

    exit_code = 4


class RecallError(RetrodbError):
    """The index does not reach the configured recall gate (exit 5)."""

    exit_code = 5


class LockedError(RetrodbError):
    """Someone else is building this database, or training into this checkpoint (exit 6)."""

    exit_code = 6


class WorkerError(RetrodbError):
    """A worker process died or failed on a shard; completed shards are kept (exit 1)."""
