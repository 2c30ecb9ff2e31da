"""Small studies: measurements of a cell, reuse of finished runs, and the verdict on a claim."""

import json
import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from training import ablate
from training.ablate import AblateSettings
from training.config import PretrainSettings
from training.data.sources import DataError, open_source
from training.study import cell, factors
from training.study.studies import STUDIES, Cell
from training.study.verdict import Claim, RunRow, SeedGroup, halfwidth, judge, pooled

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_this_process(monkeypatch):
    """Run cells one after the other in this process; returns the requested cells."""
    asked = []

    def run_all(grid, kinds):
        asked.append([[cell.cell_key(one) for one in seeds] for seeds in grid])
        return [[cell.run_cell(one, kinds) for one in seeds] for seeds in grid]

    monkeypatch.setattr(ablate, "run_all", run_all)
    return asked


def rows_of(**values) -> list[RunRow]:
    return [RunRow({"name": name}, {"figure": list(of)}) for name, of in values.items()]


def over(more: str, less: str) -> Claim:
    groups = [(SeedGroup("figure", lambda row, name=name: row["name"] == name),) for name in (more, less)]
    return Claim("more is better", *groups)


def test_the_pooled_deviation_uses_the_mean_of_each_row():
    rows = rows_of(a=(1.0, 3.0), b=(10.0, 10.0, 13.0))
    s, freedom = pooled(rows, "figure")
    assert (s, freedom) == (pytest.approx(math.sqrt((1 + 1 + 1 + 1 + 4) / 3)), 3)
    assert halfwidth(rows, "figure", 2) == pytest.approx(stats.t.ppf(0.975, 3) * s / math.sqrt(2))
    assert math.isnan(halfwidth(rows_of(a=(1.0,), b=(2.0,)), "figure", 1))


def test_the_interval_decides_whether_a_claim_held_or_the_reverse_or_neither():
    clear = rows_of(a=(0.70, 0.72), b=(0.50, 0.51), c=(0.4, 0.41), d=(0.1, 0.12), e=(0.2, 0.21))
    held = judge(over("a", "b"), clear)
    assert held["held"] is True and "held, +20.5 points (+" in held["sentence"]
    assert judge(over("b", "a"), clear)["held"] is False
    noisy = rows_of(a=(0.5, 0.7), b=(0.4, 0.6), c=(0.3, 0.5), d=(0.1, 0.4), e=(0.2, 0.5))
    found = judge(over("a", "b"), noisy)
    assert found["held"] is None and "undecided, +10.0 points (-" in found["sentence"]
    s, _ = pooled(noisy, "figure")
    assert found["high"] - found["contrast"] == pytest.approx(stats.t.ppf(0.975, 5) * s)  # sqrt(1/2 + 1/2)
    assert not found["absent"]


def test_the_detectable_difference_is_found_in_four_of_five_studies():
    """Studies are drawn whose true difference is the one that they state on average."""
    rng, found, stated = np.random.default_rng(0), 0, []
    for difference in [0.0] * 200 + [None] * 1000:
        difference = np.mean(stated[:200]) if difference is None else difference
        cells = {name: rng.normal(0.5 + difference * (name == "a"), 0.02, 5).tolist() for name in "abcdefg"}
        verdict = judge(over("a", "b"), rows_of(**cells))
        stated.append(verdict["detectable"])
        found += verdict["held"] is True and len(stated) > 200
    assert found / 1000 == pytest.approx(0.8, abs=0.04)
    assert f"80% power at {100 * stated[-1]:.1f} points" in verdict["sentence"]


def test_a_narrow_interval_around_zero_shows_that_a_difference_is_absent():
    equal = rows_of(a=(0.500, 0.502), b=(0.500, 0.501), c=(0.5, 0.501), d=(0.3, 0.302))
    found = judge(over("a", "b"), equal)
    assert found["absent"] and found["held"] is None
    assert "no difference of 1 point or more, +0.1 points" in found["sentence"]
    small = judge(over("a", "b"), rows_of(a=(0.506, 0.506), b=(0.5, 0.5), c=(0.5, 0.501), d=(0.3, 0.301)))
    assert small["held"] is True and not small["absent"]  # a small difference is not none


def test_h_and_z_of_a_run_are_compared_with_each_other():
    """Runs that differ from each other much, but whose h is better than their z by the same, tell the two apart."""
    study = STUDIES["projection-head"]
    runs = [[{"linear h": h, "linear z": h - 0.02 - noise} for h, noise in ((0.3, 0.001), (0.6, 0.0))]] * 7
    rows = study.judged(study.cells(PretrainSettings()), runs)
    (found,) = [judge(claim, rows) for claim in study.claims if "non-linear head, h" in claim.words]
    assert found["held"] and found["contrast"] == pytest.approx(0.0205) and found["low"] > 0.019
    assert pooled(rows, "linear h - z")[1] == 6  # without a head there is no difference to vary


def test_dcl_and_four_views_take_as_many_steps_and_views_as_what_they_are_compared_with():
    cells = STUDIES["batch-size"].cells(PretrainSettings(epochs=4))
    cost = {"NT-Xent": [], "DCL": [], "4 views": []}
    for made in cells:
        s = made.settings
        if made.labels["loss"] == "DCL" or s.views == 4 or made.labels["length"] == 1:
            name = "4 views" if s.views == 4 else made.labels["loss"]
            cost[name].append((s.epochs / s.batch_size, s.views * s.batch_size))
    assert cost["NT-Xent"] == cost["DCL"] == cost["4 views"] and len(cost["DCL"]) == 3


def test_all_cells_of_a_seed_are_run_before_those_of_the_next(small_settings, monkeypatch):
    ran = []

    class AtOnce(ThreadPoolExecutor):
        def __init__(self, *_):
            super().__init__(1)

    monkeypatch.setattr(ablate, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(ablate, "run_cell", lambda s, _: ran.append((s.temperature, s.seed)) or {"seed": s.seed})
    grid = [[small_settings(temperature=tau, seed=seed) for seed in (0, 1)] for tau in (0.1, 0.5)]
    assert ablate.run_all(grid, ()) == [[{"seed": 0}, {"seed": 1}]] * 2
    assert ran == [(0.1, 0), (0.5, 0), (0.1, 1), (0.5, 1)]


def test_one_seed_gives_no_verdict():
    found = judge(over("a", "b"), rows_of(a=(0.7,), b=(0.5,)))
    assert found["held"] is None and "+20.0 points with one seed, so it cannot be judged" in found["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STUDIES))
def test_a_studys_claims_and_figure_find_their_rows(name, tmp_path):
    """Every group of every claim has rows, and the figure is drawn from the names of the measurements."""
    study = STUDIES[name]
    cells = study.cells(PretrainSettings(epochs=4))
    assert len({json.dumps(c.settings.to_dict()) for c in cells}) == len(cells)
    found = {"linear h": 0.5, "linear z": 0.4, "kNN h": 0.3, "views matched z": 0.1, "steps": 10}
    found |= {"views matched by histogram": 0.2}
    names = (factors.GREY, *factors.NAMES, *(n.removesuffix("_deg") for n in factors.NUMBERS))
    found[cell.COMMIT] = "abcdef0"
    found |= {f"{n}: {way}": 0.3 for n in names for way in ("chance", "linear h", "linear z", "mlp h", "mlp z")}
    other = found | {key: value * 1.01 for key, value in found.items() if key != cell.COMMIT}
    rows = study.rows(cells, [[found, other] for _ in cells])
    judged = study.judged(cells, [[found, other] for _ in cells]) if study.judged else rows
    for claim in study.claims:
        assert all(group.values(judged) for group in (*claim.more, *claim.less)), claim.words
        assert math.isfinite(judge(claim, judged)["contrast"])
    facts = {"base": PretrainSettings().to_dict(), "data": "shapes", "seeds": 2}
    ablate.draw(tmp_path / "page.png", study, rows, facts)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 900
    assert (tmp_path / "page.png").stat().st_size < 200_000
    assert len(ablate.table(study, rows).splitlines()) == len(rows) + 2


@pytest.mark.slow
def test_a_study_is_written_and_finished_runs_are_reused(small_shapes, in_this_process, monkeypatch, tmp_path, capsys):
    base = {"data": str(small_shapes), "size_px": 16, "batch_size": 32, "epochs": 1, "out": tmp_path / "out"}
    taus = [
        Cell({"tau": tau}, replace(AblateSettings("temperature", **base).base(), temperature=tau)) for tau in (0.1, 1.0)
    ]
    short = replace(STUDIES["temperature"], cells=lambda of: taus, claims=STUDIES["temperature"].claims[:1])
    monkeypatch.setitem(STUDIES, "temperature", short)
    facts = ablate.ablate(AblateSettings("temperature", **base, seeds=1))
    assert [row["tau"] for row in facts["rows"]] == [0.1, 1.0]
    page = (tmp_path / "out" / "temperature.md").read_text()
    assert facts["claims"][0]["sentence"] in page and "![Temperature (Table 5)](temperature.png)" in page
    assert json.loads((tmp_path / "out" / "temperature.json").read_text())["rows"] == facts["rows"]

    monkeypatch.setattr(cell, "pretrain", lambda settings: pytest.fail("trained again"))
    again = ablate.ablate(AblateSettings("temperature", **base, seeds=1))
    assert again["rows"] == facts["rows"] and again["cpu_minutes"] == facts["cpu_minutes"]
    assert in_this_process[0] == in_this_process[1]


def test_the_key_of_a_run_depends_on_settings_and_pictures_but_not_on_its_name(small_settings, tmp_path):
    settings = small_settings()
    assert cell.cell_key(settings) == cell.cell_key(replace(settings, name="other", knn_epochs=3))
    different = [replace(settings, **change) for change in ({"seed": 1}, {"temperature": 0.5}, {"epochs": 4})]
    assert len({cell.cell_key(one) for one in (settings, *different)}) == 4


@pytest.mark.slow
def test_measurements_are_those_of_the_checkpoint(small_settings, tmp_path):
    found = cell.run_cell(small_settings(epochs=1, head_layers=0), ("quality", "histograms"))
    assert found["linear h"] == found["linear z"] and found["steps"] == 2  # without a head z is h
    assert 0 <= found["views matched by histogram"] <= 1 and found["cpu_s"] > 0
    (folder,) = Path("runs/studies").iterdir()
    assert "kNN accuracy" in (folder / "log.txt").read_text()


def test_histograms_depend_on_colours_but_not_on_their_places():
    pixels = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cell.histogram(pixels), cell.histogram(pixels.flip(3)))
    counts = cell.histogram(pixels).square().view(5, 3, cell.BINS)
    assert torch.equal(counts.sum(dim=2).round(), torch.full((5, 3), 64.0))
    assert counts[0, 0, 0].round() == (pixels[0, 0] < 1 / cell.BINS).sum()


class ColourCell:
    """Shapes whose h is the mean colour and its spread, and whose z is the sum of the mean colour."""

    def __init__(self, folder: Path):
        self.source, self.settings = open_source(str(folder)), PretrainSettings(data=str(folder))
        self.names, pictures = ([], []), ([], [])
        for picture in self.source.pictures:
            side = picture.split == "test"
            self.names[side].append(picture.name)
            pictures[side].append(np.array(Image.open(picture.path)))
        self.pixels, self.queries = (np.stack(of) for of in pictures)

    def h_and_z(self, pixels):
        h = torch.from_numpy(pixels.astype(np.float32)).std(dim=3).mean(dim=(1, 2))[:, None]
        h = torch.cat([h, torch.from_numpy(pixels.astype(np.float32)).mean(dim=(1, 2))], dim=1)
        return h, h[:, 1:].sum(dim=1, keepdim=True)


@pytest.mark.slow
def test_whether_a_picture_was_made_grey_is_read_from_colour_and_not_from_brightness(small_shapes):
    found = factors.measure(ColourCell(small_shapes))
    assert found["made grey: linear h"] == 1.0
    assert found["made grey: linear z"] < 0.8
    assert found["made grey: chance"] == 0.5
    assert {name.partition(": ")[2] for name in found} == {"chance", "linear h", "linear z", "mlp h", "mlp z"}
    assert len(found) == 5 * 11


@pytest.mark.slow
def test_pictures_without_known_factors_are_refused(small_settings, tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / "own" / name / f"{i}.png")
    with pytest.raises(DataError, match=r"own has no factors\.csv: this study needs shapes"):
        cell.run_cell(small_settings(data=str(tmp_path / "own"), batch_size=4, epochs=1), ("factors",))


@pytest.mark.slow
def test_the_command_runs_cells_in_separate_processes(small_shapes, tmp_path):
    command = [sys.executable, ROOT / "training" / "ablate.py", "what-g-forgets", "--data", small_shapes, "--quick"]
    command += ["--size-px", "16", "--batch-size", "32", "--out", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs" in done.stdout and "It reads orientation better from h than from z: " in done.stdout
    assert (tmp_path / "what-g-forgets.png").exists()


def test_factors_of_one_run_do_not_count_as_seeds():
    study = STUDIES["what-g-forgets"]
    names = (factors.GREY, *factors.NAMES, *(name.removesuffix("_deg") for name in factors.NUMBERS))
    runs = [
        [{f"{name}: mlp {of}": value for name in names for of, value in (("h", h), ("z", 0.5))} for h in (0.6, 0.8)]
        for _ in range(2)
    ]
    rows = study.judged(study.cells(PretrainSettings()), runs)
    found = judge(study.claims[0], rows)
    assert found["contrast"] == pytest.approx(0.2)
    s = math.sqrt((0.1**2 * 4) / 2)  # two cells of two runs, each 0.1 from its cell's mean
    assert found["high"] - 0.2 == pytest.approx(stats.t.ppf(0.975, 2) * s / math.sqrt(2))


def test_unusable_pictures_are_refused_before_anything_is_trained(small_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "run_all", lambda *_: pytest.fail("trained"))
    small = {"size_px": 16, "batch_size": 32, "epochs": 1, "out": tmp_path}
    with pytest.raises(DataError, match=r"compares batches of up to 512 pictures, and \S*some shapes has 64 training"):
        ablate.ablate(AblateSettings("batch-size", data=str(small_shapes), **small))
    with pytest.raises(DataError, match=r"some shapes/train: .*factors\.csv has no picture \w+/\d+\.png"):
        ablate.ablate(AblateSettings("what-g-forgets", data=str(small_shapes / "train"), **small))
    (tmp_path / "plain").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / "plain" / f"{i}.png")
    with pytest.raises(DataError, match="plain has no labels in its split train"):
        ablate.ablate(AblateSettings("temperature", data=str(tmp_path / "plain"), **small))
    assert "batch size 32 -> 3" in capsys.readouterr().out
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / "foreign" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "foreign" / name)
    (tmp_path / "foreign" / "factors.csv").write_text("length,width\n1,2\n")
    with pytest.raises(DataError, match=r"foreign/factors\.csv is not of shapes"):
        cell.check_pictures(PretrainSettings(data=str(tmp_path / "foreign"), size_px=16), ("factors",))


@pytest.mark.slow
def test_a_page_names_the_commits_of_its_runs(small_settings, monkeypatch):
    monkeypatch.setattr(cell, "commit", lambda: "abcdef0")
    settings = small_settings(epochs=1)
    assert cell.run_cell(settings, ("quality",))[cell.COMMIT] == "abcdef0"
    monkeypatch.setattr(cell, "commit", lambda: "1234567")
    assert cell.run_cell(settings, ("quality",))[cell.COMMIT] == "abcdef0"  # nothing was measured again


@pytest.mark.slow
def test_a_run_with_a_reduced_batch_size_is_found_again_by_its_requested_one(small_settings):
    settings = small_settings(epochs=1, batch_size=100)  # of 64 pictures
    cell.run_cell(settings, ("quality",))
    assert "views matched by histogram" in cell.run_cell(settings, ("quality", "histograms"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_study_at_once(small_shapes, tmp_path, wait_until):
    command = [sys.executable, ROOT / "training" / "ablate.py", "colour", "--data", small_shapes]
    command += ["--size-px", "16", "--batch-size", "32", "--epochs", "100000", "--out", tmp_path]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ends() -> bool:
        process.send_signal(signal.SIGINT)  # two signals at once may arrive as one
        return process.poll() is not None

    try:
        wait_until(lambda: list(tmp_path.glob("runs/studies/*/config.json")), "no run has begun")
        process.send_signal(signal.SIGINT)
        wait_until(ends, "the study goes on after a second Ctrl-C")
        process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130


def test_a_study_is_written_beside_its_runs():
    assert AblateSettings("colour").out == cell.RUNS / cell.FOLDER


def test_zero_seeds_are_refused():
    with pytest.raises(ValueError, match="--seeds must be at least 1, not 0"):
        AblateSettings("colour", seeds=0)
