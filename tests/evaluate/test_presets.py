"""Presets name registered things, and set what distinguishes the tools."""

import inspect
from dataclasses import fields

import pytest
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from diffaccel.core.errors import UsageError
from diffaccel.evaluate.features import FEATURES
from diffaccel.evaluate.features.resize import FILTERS
from diffaccel.evaluate.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_records_are_complete_and_registered(name):
    preset = get_preset(name)
    assert preset.name == name and preset.summary and preset.source
    assert preset.features in FEATURES and preset.resize in FILTERS
    assert preset.remarks and all(remark == remark.strip() for remark in preset.remarks)
    assert (preset.kid_subsets is None) == (preset.kid_subset_size is None)


def test_filters_say_who_uses_them():
    for name, preset in PRESETS.items():
        assert name in " ".join(FILTERS[preset.resize].used_by).lower(), name


def test_only_pytorch_fid_normalises_symmetrically():
    symmetric = [name for name, preset in PRESETS.items() if FILTERS[preset.resize].inception_grey == 127.5]
    assert symmetric == ["pytorch-fid"]


def test_conventions_of_torchmetrics_are_its_defaults():
    def default(metric, argument):
        return inspect.signature(metric).parameters[argument].default

    preset = get_preset("torchmetrics")
    assert preset.kid_subsets == default(KernelInceptionDistance, "subsets")
    assert preset.kid_subset_size == default(KernelInceptionDistance, "subset_size")
    assert preset.is_splits == default(InceptionScore, "splits")
    assert default(FrechetInceptionDistance, "antialias") is True and preset.resize == "bilinear-antialias"


def test_an_unknown_preset_gets_a_hint():
    with pytest.raises(UsageError, match="Did you mean 'clean-fid'"):
        get_preset("cleanfid")


def test_presets_cannot_be_changed():
    preset = get_preset("edm")
    for field in fields(preset):
        with pytest.raises(AttributeError):
            setattr(preset, field.name, None)
