"""Where a run's figures go besides metrics.csv: TensorBoard, Weights & Biases or MLflow, by Lightning's loggers.

All of them write below runs/ and send nothing, unless the variables WANDB_MODE=online or MLFLOW_TRACKING_URI, which are
their own, say otherwise. Of several processes only the first writes.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
PROJECT = "twinview"


def check_tracker(name: TrackerName) -> None:
    """Raises ValueError if its package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"--logger {name} needs the Python package {name}, which is not installed: pip install {name}")


def trackers(name: TrackerName, run: Path, settings: dict[str, Any]) -> list[Logger]:
    """Lightning's loggers for a run. TensorBoard's is always there: by its events the page sees that a run goes on.

    run       its folder, runs/NAME
    settings  those of the run, with its name; TensorBoard does not show them
    raises    ValueError: the tracker does not start, for instance because its server cannot be reached
    """
    events = TensorBoardLogger(run, name="", version="")
    if name == "tensorboard":
        return [events]
    try:
        logger = (_wandb if name == "wandb" else _mlflow)(run, settings["name"])
        logger.log_hyperparams(settings)  # starts it
    except Exception as error:  # their own, which exist only where they are installed
        raise ValueError(f"--logger {name} cannot be used: {' '.join(str(error).split())}") from error
    return [events, logger]


def _wandb(run: Path, name: str) -> WandbLogger:
    offline = os.environ.get("WANDB_MODE", "offline") != "online"
    return WandbLogger(name=name, save_dir=run, offline=offline, project=PROJECT)


def _mlflow(run: Path, name: str) -> MLFlowLogger:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.parent.absolute()}/mlflow.db"
    return MLFlowLogger(PROJECT, run_name=name, tracking_uri=uri)
