"""What processes of `tests/forked.py` have imported before they start: libraries alone, none of retrodb."""

import asyncio
import importlib
import logging
import os
import sys

LIBRARIES = (
    "apache_beam",
    "apache_beam.runners.portability.fn_api_runner",
    "faiss",
    "gcsfs.retry",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "rich.console",
    "torch.utils.data",
    "typer",
)

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # see `tests/conftest.py`
_quiet = logging.NullHandler()
logging.getLogger().addHandler(_quiet)  # as retrodb's command line does, or what they log while imported is shown
for name in LIBRARIES:
    importlib.import_module(name)
logging.getLogger().removeHandler(_quiet)


class _Hasty:
    """All that `gcsfs.retry` uses of asyncio: between its six attempts it waits a tenth of half a minute."""

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


sys.modules["gcsfs.retry"].asyncio = _Hasty
