"""Which figures of a run reach TensorBoard, Weights & Biases and MLflow, and by which settings."""

import csv
from types import SimpleNamespace

import pytest
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import trackers
from training.pretrain import pretrain


@pytest.fixture
def made(monkeypatch):
    """The arguments with which Lightning's loggers were made, and the settings that they were given."""
    calls = []

    def logger(kind):
        def make(*arguments, **options):
            calls.append((kind, arguments, options))
            return SimpleNamespace(log_hyperparams=calls.append)

        return make

    for kind in ("WandbLogger", "MLFlowLogger"):
        monkeypatch.setattr(trackers, kind, logger(kind))
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    return calls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")
def test_tensorboard_gets_the_figures_of_metrics_csv(small_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = pretrain(small_settings(knn_epochs=2))
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    events = EventAccumulator(str(run)).Reload()
    for name in rows[0].keys() - {"epoch", "step"}:
        expected = [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows if row[name]]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected, name


def test_only_the_first_process_writes_events(tmp_path, monkeypatch):
    for rank, expected in ((1, 0), (0, 1)):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        for logger in trackers.trackers("tensorboard", tmp_path, {}):
            logger.log_metrics({"loss": 1.0}, 1)
            logger.finalize("success")
        assert len(list(tmp_path.glob("events.*"))) == expected


def test_wandb_and_mlflow_write_below_runs_unless_their_variables_say_otherwise(tmp_path, monkeypatch, made):
    run, settings = tmp_path / "runs" / "mine", {"name": "mine", "lr": 0.1}
    assert len(trackers.trackers("wandb", run, settings)) == len(trackers.trackers("mlflow", run, settings)) == 2
    wandb = {"name": "mine", "save_dir": run, "offline": True, "project": "twinview"}
    mlflow = {"run_name": "mine", "tracking_uri": f"sqlite:///{tmp_path}/runs/mlflow.db"}
    assert made == [("WandbLogger", (), wandb), settings, ("MLFlowLogger", ("twinview",), mlflow), settings]
    made.clear()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    trackers.trackers("wandb", run, settings)
    trackers.trackers("mlflow", run, settings)
    assert made[0][2]["offline"] is False and made[2][2]["tracking_uri"] == "http://127.0.0.1:5000"


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no server\nthere")

    monkeypatch.setattr(trackers, "MLFlowLogger", fails)
    with pytest.raises(ValueError, match=r"^--logger mlflow cannot be used: no server there$"):
        trackers.trackers("mlflow", tmp_path, {"name": "mine"})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_read(small_settings, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"^--logger {name} needs the Python package {name}.*pip install {name}$"):
        pretrain(small_settings(logger=name, data="nowhere"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--logger must be one of tensorboard, wandb, mlflow, not 'paper'"):
        small_settings(logger="paper")
