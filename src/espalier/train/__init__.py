"""A loop for people who have none: data, zoo, training."""

from espalier.train.checkpoint import seed_everything, write_checkpoint
from espalier.train.data import DATA, load_data
from espalier.train.loop import Epoch, History, fit
from espalier.train.recipe import Recipe
from espalier.train.score import Drop, Score, correct, drop, evaluate, recalibrate, recalibrate_if_better
from espalier.train.sources import SOURCES, Source, download
from espalier.train.split import Data, Split
from espalier.train.team import Processes, Team, launch
from espalier.train.told import Tried
from espalier.train.worked import TrainHooks
from espalier.train.zoo import ZOO, Network, build, example_shape, inner_widths, load_weights, read_weights

__all__ = [
    "DATA",
    "SOURCES",
    "ZOO",
    "Data",
    "Drop",
    "Epoch",
    "History",
    "Network",
    "Processes",
    "Recipe",
    "Score",
    "Source",
    "Split",
    "Team",
    "TrainHooks",
    "Tried",
    "build",
    "correct",
    "download",
    "drop",
    "evaluate",
    "example_shape",
    "fit",
    "inner_widths",
    "launch",
    "load_data",
    "load_weights",
    "read_weights",
    "recalibrate",
    "recalibrate_if_better",
    "seed_everything",
    "write_checkpoint",
]
