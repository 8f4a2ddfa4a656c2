"""Following a trainer: which of its exports are due, how stale the published version is, and who waits for whom."""

from retrodb.refreshing.exports import DONE_MARKER, HOLD_MARKER, STATUS_NAME, Export, list_exports
from retrodb.refreshing.follower import Follower
from retrodb.refreshing.schedule import Schedule, Staleness, StalenessLimit

__all__ = [
    "DONE_MARKER",
    "HOLD_MARKER",
    "STATUS_NAME",
    "Export",
    "Follower",
    "Schedule",
    "Staleness",
    "StalenessLimit",
    "list_exports",
]
