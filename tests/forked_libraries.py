"""What processes of `tests/forked.py` have imported before they start: libraries alone, none of retrodb."""

import importlib
import logging

LIBRARIES = (
    "apache_beam",
    "apache_beam.runners.portability.fn_api_runner",
    "faiss",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "rich.console",
    "torch.utils.data",
    "typer",
)

_quiet = logging.NullHandler()
logging.getLogger().addHandler(_quiet)  # as retrodb's command line does, or what they log while imported is shown
for name in LIBRARIES:
    importlib.import_module(name)
logging.getLogger().removeHandler(_quiet)
