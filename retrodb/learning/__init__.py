"""Training the reference model from a database's rows: from scratch, or RETROfit of a frozen base.

    settings = TrainSettings(steps=2000, preset="small")
    train(retrodb.open("my-db"), "ckpt", settings, progress)       # run again: goes on, or does nothing
    retrofit(retrodb.open("my-db"), "base", "fitted", settings, progress)

`settings` is what a run is made with; `stream` the endless rows and their position; `schedule` the learning rate;
`trainer` one optimiser step and all that a resumed run needs; `run` the whole; `plot` the picture of the loss.
"""

from retrodb.learning.settings import TrainSettings, make_settings

__all__ = ["TrainSettings", "make_settings"]
