"""Settings: values that are refused, presets, and the settings in checkpoints."""

import dataclasses
import json

import pytest

from training.augment import AugmentSettings
from training.config import PRESETS, PretrainSettings, parse
from training.loss import LOSSES
from training.optimizers import OPTIMIZERS


def test_no_argument_gives_the_tiny_preset():
    assert parse([]) == PRESETS["tiny"][1]


@pytest.mark.parametrize("spelling", [["--preset", "cifar"], ["--preset=cifar"]])
def test_the_command_line_overrides_the_preset_that_it_names(spelling):
    settings = parse([*spelling, "--epochs", "7", "--augment.grey", "0.3"])
    expected = PRESETS["cifar"][1]
    augment = dataclasses.replace(expected.augment, grey=0.3)
    assert settings == dataclasses.replace(expected, epochs=7, augment=augment)


def test_every_preset_has_its_own_name_and_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, settings) in PRESETS.items():
        assert settings.preset == name
        assert f"{name}: " in text
    assert "WebDataset" in text


def test_settings_survive_json():
    for _, settings in PRESETS.values():
        assert PretrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_settings_from_before_there_was_a_choice_of_loss_are_of_nt_xent():
    old = PretrainSettings(loss="dcl").to_dict()
    del old["loss"]
    assert PretrainSettings.from_dict(old).loss == "nt_xent"


@pytest.mark.parametrize(("field", "table"), [("loss", LOSSES), ("optimizer", OPTIMIZERS)])
def test_the_command_line_takes_every_row_of_a_table_and_nothing_else(field, table, capsys):
    for name in table:
        assert getattr(parse([f"--{field}", name]), field) == name
    with pytest.raises(SystemExit):
        parse([f"--{field}", "another"])
    assert "Invalid choice" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"--{field} must be one of {', '.join(table)}, not 'another'"):
        PretrainSettings(**{field: "another"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"temperature": 0.0}, "--temperature must be above 0, not 0.0"),
        ({"temperature": float("nan")}, "--temperature must be above 0, not nan"),
        ({"weight_decay": float("inf")}, "--weight-decay must be a finite number, not inf"),
        ({"epochs": 0}, "--epochs must be above 0, not 0"),
        ({"minutes": -1.0}, "--minutes must be above 0, not -1.0"),
        ({"warmup": 1.0}, "--warmup must be in"),
        ({"momentum": 1.0}, "--momentum must be in"),
        ({"weight_decay": -1e-4}, "--weight-decay must be at least 0"),
        ({"chunk_size": -1}, "--chunk-size must be at least 0"),
        ({"views": 1}, "--views must be at least 2, not 1"),
        ({"ema": 1.0}, "--ema must be in"),
        ({"patience": -1}, "--patience must be at least 0"),
        ({"keep_every": -1}, "--keep-every must be at least 0"),
        ({"devices": -1}, "--devices must be at least 0"),
        ({"seed": 2**32}, "--seed must be at least 0 and below 4,294,967,296, not 4294967296"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"name": "../elsewhere"}, "--name must be a folder name below runs/"),
        ({"name": "/elsewhere"}, "--name must be a folder name below runs/"),
    ],
)
def test_impossible_values_are_refused_by_their_flag(change, words):
    with pytest.raises(ValueError, match=words):
        PretrainSettings(**change)


def test_augmentation_out_of_range_is_refused():
    with pytest.raises(ValueError, match="crop_area must satisfy"):
        AugmentSettings(crop_area=(0.5, 0.2))


def test_a_value_out_of_range_on_the_command_line_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--batch-size", "1"])
    assert stopped.value.code == 2
    assert "--batch-size must be at least 2" in capsys.readouterr().err


def test_a_config_of_another_run_gives_the_defaults(tmp_path):
    other = dataclasses.replace(PRESETS["aerial"][1], name="other", epochs=7, also=("more=2",), resume=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(other.to_dict()))
    for spelling in (["--config", str(file)], [f"--config={file}"]):
        settings = parse([*spelling, "--lr", "0.5", "--augment.gamma", "1"])
        augment = dataclasses.replace(other.augment, gamma=1.0)
        assert settings == dataclasses.replace(other, name="", resume=False, lr=0.5, augment=augment)


def test_the_folder_of_a_run_is_a_config_and_a_preset_beside_it_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.replace(PRESETS["photos"][1], lr=0.5).to_dict()))
    assert parse(["--config", str(tmp_path)]).lr == 0.5
    with pytest.raises(ValueError, match="either --config or --preset"):
        parse(["--config", str(tmp_path), "--preset", "tiny"])
    for arguments in (["--config"], ["--config", "--name", "x"], ["--preset"]):
        with pytest.raises(ValueError, match=f"{arguments[0]} needs a value"):
            parse(arguments)


@pytest.mark.parametrize("content", [None, "not JSON", "[]", "{}", '{"augment": {"crop_area": [0.1, 1]}, "speed": 1}'])
def test_a_config_that_is_none_is_named(tmp_path, content):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=rf"--config {file} (cannot be read|does not hold the settings of a run)"):
        parse(["--config", str(file)])
