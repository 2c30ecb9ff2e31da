"""Settings: what is refused, what a preset changes, what a checkpoint gives back."""

import dataclasses
import json

import pytest

from training.augment import AugmentSettings
from training.config import PRESETS, PretrainSettings, parse


def test_no_argument_gives_the_tiny_preset():
    assert parse([]) == PRESETS["tiny"][1]


@pytest.mark.parametrize("spelling", [["--preset", "cifar"], ["--preset=cifar"]])
def test_the_command_line_goes_over_the_preset_that_it_names(spelling):
    settings = parse([*spelling, "--epochs", "7", "--augment.grey", "0.3"])
    expected = PRESETS["cifar"][1]
    augment = dataclasses.replace(expected.augment, grey=0.3)
    assert settings == dataclasses.replace(expected, epochs=7, augment=augment)


def test_every_preset_is_of_its_own_name_and_stands_in_the_help(capsys):
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"temperature": 0.0}, "--temperature must be above 0, not 0.0"),
        ({"temperature": float("nan")}, "--temperature must be above 0, not nan"),
        ({"epochs": 0}, "--epochs must be above 0, not 0"),
        ({"minutes": -1.0}, "--minutes must be above 0, not -1.0"),
        ({"warmup": 1.0}, "--warmup is a share of the steps"),
        ({"momentum": 1.0}, "--momentum must be in"),
        ({"weight_decay": -1e-4}, "--weight-decay must be at least 0"),
        ({"seed": 20251125}, "--seed must be at least 0 and below 16,777,216, not 20251125"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"name": "../elsewhere"}, "--name must be a folder name below runs/"),
        ({"name": "/elsewhere"}, "--name must be a folder name below runs/"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(change, words):
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
