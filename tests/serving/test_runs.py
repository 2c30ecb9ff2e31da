import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serving.access import Access
from serving.app import create_app

PRETRAINED = {
    "data": "/home/me/Pictures.zip",
    "epochs": 4,
    "batch_size": 128,
    "encoder": "tiny",
    "width": 2,
    "init": "/home/me/elsewhere/run",
    "augment": {"crop_area": [0.25, 1.0]},
}
FINETUNED = {"data": "/home/me/few", "epochs": 50, "batch_size": 8, "mode": "full", "encoder": None, "init": "runs/a"}
CURVES = "epoch,step,loss,lr,images_per_s,knn\n1,26,5.5,0.1,200,\n2,52,5.0,0.2,200,0.25\n"
ROOT = Path(__file__).parents[2]
LONG_AGO = 3 * 24 * 3600


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINVIEW_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def make(place):
    """make(name, settings, age_s, **files) -> the folder of a run whose files are `age_s` old. files: NAME=text of
    NAME.json"""

    def write(name: str, settings=PRETRAINED, age_s: float = LONG_AGO, metrics: str = "", **files: str):
        folder = place / name
        folder.mkdir(parents=True)
        text = settings if isinstance(settings, str) else json.dumps(settings)
        texts = {"config.json": text} | {f"{stem}.json": content for stem, content in files.items()}
        texts |= {"metrics.csv": metrics} if metrics else {}
        for file, text in texts.items():
            (folder / file).write_text(text)
            os.utime(folder / file, (time.time() - age_s,) * 2)
        return folder

    return write


def listed(http) -> dict[str, dict]:
    answer = http.get("/runs")
    assert answer.status_code == 200, answer.text
    return {run["name"]: run for run in answer.json()["runs"]}


def test_without_runs_the_list_is_empty(http, place):
    assert http.get("/runs").json() == {"count": 0, "runs": []}


def test_runs_are_listed_newest_first_including_those_one_folder_deeper(http, make):
    for age, name in enumerate(("newest", "studies/deep", "oldest")):
        make(name, age_s=LONG_AGO + 100 * age)
    assert list(listed(http)) == ["newest", "studies/deep", "oldest"]
    two = http.get("/runs?limit=2").json()
    assert two["count"] == 3 and [run["name"] for run in two["runs"]] == ["newest", "studies/deep"]
    assert http.get("/runs/studies/deep").json()["name"] == "studies/deep"


def test_a_run_has_its_progress_and_its_latest_figures(http, make):
    folder = make("cats", metrics=CURVES + "3,78,4.5,0.1,200,\n")
    run = listed(http)["cats"]
    assert (run["kind"], run["epoch"], run["epochs"], run["encoder"]) == ("pretraining", 3, 4, "tiny-2x")
    assert run["figures"] == {"knn": 0.25}
    assert run["changed"] == pytest.approx((folder / "metrics.csv").stat().st_mtime, abs=1)


def test_a_run_has_all_its_settings_and_curves(http, make):
    make("cats", metrics=CURVES)
    run = http.get("/runs/cats").json()
    assert run["settings"]["augment"] == {"crop_area": [0.25, 1.0]}
    assert run["metrics"]["loss"] == [5.5, 5.0] and run["metrics"]["knn"] == [None, 0.25]


def test_chance_is_the_last_value_of_its_column(http, make):
    make("cats", metrics="epoch,loss,chance\n1,5.5,5.5\n2,5.0,6.25\n3,4.5,\n")
    make("before", metrics=CURVES)
    assert http.get("/runs/cats").json()["chance"] == 6.25
    assert http.get("/runs/before").json()["chance"] is None


def test_no_answer_contains_a_path(http, make, place):
    make("cats")
    make("few", FINETUNED)
    make("shards", PRETRAINED | {"data": "/home/me/photos/*.tar"})
    text = http.get("/runs").text + "".join(http.get(f"/runs/{name}").text for name in ("cats", "few", "shards"))
    assert "/home" not in text and str(place) not in text
    assert {run["data"] for run in listed(http).values()} == {"Pictures.zip", "few", "photos"}
    assert http.get("/runs/cats").json()["settings"]["init"] == "run"


@pytest.mark.parametrize(
    ("age_s", "metrics", "state"),
    [
        (5, CURVES, "training"),
        (100, CURVES, "training"),  # an epoch takes 26 * 128 / 200 = 17 s; the limit is three epochs and a minute
        (120, CURVES, "stopped"),
        (500, "", "training"),  # still in its first epoch
        (700, "", "stopped"),
        (5, CURVES + "4,104,4.4,0.0,200,0.5\n", "finished"),
    ],
)
def test_the_state_follows_from_the_epochs_and_the_age_of_the_files(http, make, age_s, metrics, state):
    make("cats", age_s=age_s, metrics=metrics)
    assert listed(http)["cats"]["state"] == state


def test_a_run_that_writes_events_in_a_long_epoch_is_training(http, make):
    (make("cats") / "events.out.tfevents.1").write_text("")
    assert listed(http)["cats"]["state"] == "training"


def test_a_run_with_max_steps_is_finished_after_them(http, make):
    make("cats", PRETRAINED | {"max_steps": 52}, age_s=5, metrics=CURVES)
    assert listed(http)["cats"]["state"] == "finished"


def test_a_finetuning_has_its_accuracy_and_can_end_early(http, make):
    result = json.dumps({"after": {"held_out": 0.7, "test": {"accuracy": 0.8}}})
    make("few", FINETUNED, metrics="epoch,loss,lr,held_out\n1,2.0,0.1,0.6\n", result=result)
    make("way", FINETUNED, age_s=5, metrics="epoch,loss,lr\n1,2.0,0.1\n")
    run, way = listed(http)["few"], listed(http)["way"]
    assert (run["kind"], run["state"], run["encoder"], run["init"]) == ("fine-tuning", "finished", "", "a")
    assert run["figures"] == {"held_out": 0.6, "accuracy": 0.8}
    assert way["state"] == "training" and http.get("/runs/way").json()["chance"] is None


def test_a_distillation_names_its_teacher(http, make):
    make("student", FINETUNED | {"mode": None, "teacher": "/home/me/runs/large", "init": ""})
    run = listed(http)["student"]
    assert (run["kind"], run["init"]) == ("distillation", "large")
    assert "/home" not in http.get("/runs/student").text


def test_incomplete_files_are_read_as_far_as_possible(http, make):
    make("half", metrics=CURVES + "3,78,4.")
    make("nan", metrics=CURVES + "3,78,nan,0.1,200,inf\n")
    make("torn", '{"data": "Pict')
    make("list", "[1]")
    make("typed", PRETRAINED | {"epochs": "many"})
    assert set(listed(http)) == {"half", "nan"}
    assert listed(http)["nan"]["figures"] == {"knn": 0.25}
    assert http.get("/runs/half").json()["metrics"]["epoch"] == [1, 2]
    assert http.get("/runs/nan").json()["metrics"]["loss"] == [5.5, 5.0, None]
    assert http.get("/runs/torn").status_code == 404


def test_changed_files_are_read_again(http, make):
    folder = make("cats", metrics=CURVES)
    assert listed(http)["cats"]["epoch"] == 2
    (folder / "metrics.csv").write_text(CURVES + "3,78,4.5,0.1,200,\n")
    assert listed(http)["cats"]["epoch"] == 3


def test_a_long_run_is_thinned_but_keeps_its_last_row_and_its_figures(http, make):
    rows = [f"{i},{i * 26},5.0,0.1,200,{0.5 if i % 1001 == 0 else ''}\n" for i in range(1, 10_001)]
    make("long", metrics=CURVES.splitlines()[0] + "\n" + "".join(rows))
    metrics = http.get("/runs/long").json()["metrics"]
    assert 2000 <= len(metrics["epoch"]) <= 2100 and metrics["epoch"][-1] == 10_000
    assert metrics["knn"].count(0.5) == 9


@pytest.mark.parametrize("name", ["../secret", "%2e%2e/secret", "cats/../../secret", "%2Fetc", "nothing", ""])
def test_only_listed_runs_are_answered(http, make, place, name):
    make("cats")
    make("../secret")
    answer = http.get(f"/runs/{name}")
    assert answer.status_code == 404
    assert "secret" not in json.dumps(list(listed(http)))


def test_runs_need_no_encoder_but_a_key(tmp_path, make, serve, no_store):
    make("cats")
    with TestClient(create_app(str(tmp_path / "none"), tmp_path / "index"), "http://127.0.0.1") as client:
        assert list(listed(client)) == ["cats"]
    locked = serve(access=Access.from_environment({"TWINVIEW_API_KEYS": "secret-key-of-this-test"}))
    assert locked.get("/runs").status_code == 401


@pytest.mark.slow
def test_reading_runs_imports_neither_training_nor_fastapi():
    code = "import serving.runs, sys; sys.exit(any(n in ('torch', 'training', 'fastapi') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
