"""What the plan chooses, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarceseg.config import Config
from scarceseg.data.dataset import Case, Dataset, Split, UnlabelledCase, load_dataset, make_split
from scarceseg.data.fingerprint import CaseFacts, Intensities, _read
from scarceseg.data.images import write_image
from scarceseg.data.plan import PATCH_VOXELS, Fingerprint, Plan, fingerprint, make_plan
from scarceseg.errors import ConfigError, DataError
from scarceseg.networks.base import sides_of
from tests.data.volumes import SAGITTAL, ball, grid, planned, smooth, write_dataset, write_facts

GREY = Intensities(low=-1000, median=0, high=400, mean=20, std=90, zeros=0)
TISSUE = Intensities(low=-150, median=40, high=250, mean=60, std=30, zeros=0)

Three = tuple[int, int, int]
Millimetres = tuple[float, float, float]


def _facts(*cases: tuple[Three, Millimetres], counts: list[int] | None = None, tissue: bool = True) -> Fingerprint:
    return Fingerprint(
        cases=[
            CaseFacts(
                name=f"c{n}",
                labelled=n == 0,
                size=size,
                spacing_mm=spacing,
                intensities=[GREY],
                class_voxels=(counts or [1000, 1000]) if n == 0 else None,
            )
            for n, (size, spacing) in enumerate(cases)
        ],
        overall=[GREY],
        foreground=[TISSUE] if tissue else None,
    )


def _plan(facts: Fingerprint, channel: str = "MRI", divisor: int | Three = 16, **plan: object) -> Plan:
    dataset = Dataset(Path("d"), "made", (channel,), ("background", "organ"), ".nii.gz", ())
    split = Split((Case("c0", (), Path("x")),), (UnlabelledCase("c1", ()),), ())
    return make_plan(facts, dataset, split, Config.build({"method": "mean-teacher", "plan": plan}), divisor)


@pytest.mark.parametrize("size", [(180, 140, 88), (512, 512, 150), (240, 240, 155), (95, 70, 44), (30, 20, 9)])
@pytest.mark.parametrize("divisor", [16, (8, 8, 4), 1])
def test_patch_suits_network_and_volume(size: Three, divisor: int | Three) -> None:
    patch = _plan(_facts((size, (1, 1, 1))), divisor=divisor).patch
    steps = np.broadcast_to(divisor, 3)
    assert not np.mod(patch, steps).any()
    assert (np.array(patch) <= np.ceil(np.array(size) / steps) * steps).all()
    assert np.prod(patch) <= 1.05 * PATCH_VOXELS
    whole = np.prod(np.ceil(np.array(size) / steps) * steps)
    assert np.prod(patch) >= min(whole, 0.7 * PATCH_VOXELS)


def test_patch_has_the_shape_of_the_volume() -> None:
    patch = np.array(_plan(_facts(((400, 200, 100), (1, 1, 1))), divisor=4).patch)
    np.testing.assert_allclose(patch / patch[2], [4, 2, 1], rtol=0.1)


def test_spacing_is_the_median_and_thick_slices_go_finer() -> None:
    plan = _plan(_facts(*[((64, 64, 64), (s, 1.0, 1.0)) for s in (0.5, 0.8, 2.0)]))
    assert plan.spacing_mm == (0.8, 1.0, 1.0)
    thick: list[tuple[Three, Millimetres]] = [((200, 200, 20), (0.7, 0.7, z)) for z in (3.0, 5.0, 5.0, 5.0, 6.0)]
    assert _plan(_facts(*thick)).spacing_mm == (0.7, 0.7, 3.8)  # 10th percentile of 3, 5, 5, 5, 6


def test_given_values_win() -> None:
    plan = _plan(_facts(((95, 70, 44), (1, 1, 1))), spacing_mm=2, patch=(64, 64, 48), normalisation="none")
    assert plan.spacing_mm == (2, 2, 2) and plan.patch == (64, 64, 48) and plan.normalisation[0].kind == "none"
    assert plan.median_shape == (48, 35, 22)


def test_indivisible_patch_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 16x16x16, got 60x64x3; .* 64,64,16"):
        _plan(_facts(((95, 70, 44), (1, 1, 1))), patch=(60, 64, 3))


def test_a_network_of_one_size_gets_that_patch() -> None:
    facts = _facts(((150, 150, 150), (1, 1, 1)))
    dataset = Dataset(Path("d"), "made", ("MRI",), ("background", "organ"), ".nii.gz", ())
    split = Split((Case("c0", (), Path("x")),), (UnlabelledCase("c1", ()),), ())
    network = {"name": "UNETR", "args": {"img_size": [64, 64, 64], "hidden_size": 48, "num_heads": 4, "mlp_dim": 48}}
    config = Config.build({"network": network})
    sides = sides_of("UNETR", network["args"])
    assert make_plan(facts, dataset, split, config, *sides).patch == (64, 64, 64)
    wrong = Config.build({"network": network, "plan": {"patch": [128, 128, 64]}})
    with pytest.raises(ConfigError, match="built for 64x64x64 voxels alone, got 128x128x64"):
        make_plan(facts, dataset, split, wrong, *sides)


@pytest.mark.parametrize("spacing", [0, -1, float("nan"), 1e-3, 1e3])
def test_absurd_spacing(spacing: float) -> None:
    with pytest.raises(ConfigError, match="spacing_mm"):
        _plan(_facts(((95, 70, 44), (1, 1, 1))), spacing_mm=spacing)


def test_ct_is_known_by_its_channel_and_uses_the_labelled_foreground() -> None:
    chosen = _plan(_facts(((95, 70, 44), (1, 1, 1))), "CT").normalisation[0]
    assert (chosen.kind, chosen.low, chosen.high, chosen.mean, chosen.std) == ("ct", -150, 250, 60, 30)
    assert _plan(_facts(((95, 70, 44), (1, 1, 1))), "active MRI").normalisation[0].kind == "zscore"
    without = _plan(_facts(((95, 70, 44), (1, 1, 1)), tissue=False), "CT")
    assert without.normalisation[0].low == -1000 and "CT window" in "".join(without.warnings)


@pytest.mark.parametrize("channel", ["CTA", "CBCT", "CT1"])
def test_hounsfield_units_under_another_name_are_told(channel: str) -> None:
    facts = _facts(((95, 70, 44), (1, 1, 1)))
    plan = _plan(facts, channel)
    (warning,) = plan.warnings
    assert plan.normalisation[0].kind == "zscore"
    assert f"{channel!r} looks like Hounsfield units (down to -1000)" in warning and "name it 'CT'" in warning
    assert not _plan(facts, "CT").warnings and not _plan(facts, channel, normalisation="zscore").warnings
    assert not _plan(facts.model_copy(update={"overall": [TISSUE]}), channel).warnings


def test_warnings_about_the_data() -> None:
    far = _plan(_facts(((60, 60, 60), (0.5, 1, 1)), ((60, 60, 60), (2, 1, 1))))
    assert "0.5 to 2 mm along x" in "".join(far.warnings)
    assert "tiny: about 12 voxels" in "".join(_plan(_facts(((64, 64, 64), (1, 1, 1)), counts=[9000, 12])).warnings)
    absent = "".join(_plan(_facts(((64, 64, 64), (1, 1, 1)), counts=[9000, 0])).warnings)
    assert "empty label" in absent and "'organ' (1) is in no labelled case" in absent
    small = _plan(_facts(((90, 90, 90), (1, 1, 1)), ((20, 90, 90), (1, 1, 1))), patch=(96, 96, 96))
    assert "1 of 2 cases are smaller than the patch" in "".join(small.warnings)
    assert not _plan(_facts(((95, 70, 44), (1, 1, 1))), "CT").warnings


def test_windows_cover_the_median_volume_at_half_overlap() -> None:
    assert _plan(_facts(((100, 64, 40), (1, 1, 1))), patch=(64, 64, 48)).windows == (3, 1, 1)


def test_memory_grows_with_rows_and_patch() -> None:
    facts = _facts(((95, 70, 44), (1, 1, 1)))
    small, large = (_plan(facts, patch=p).memory_estimate_mb for p in ((32, 32, 32), (64, 64, 64)))
    assert large > small


def test_plan_survives_saving() -> None:
    plan = _plan(_facts(((95, 70, 44), (0.1 + 0.2, 1, 1))), "CT")
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_fingerprint_of_files(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", geometry=grid((12, 11, 9), (1, 2, 3), direction=SAGITTAL))
    dataset = load_dataset(folder)
    facts = fingerprint(dataset, make_split(dataset, 2, ["c"]))
    assert [(case.name, case.labelled) for case in facts.cases] == [
        ("a", True), ("b", True), ("d", False), ("e", False)
    ]  # fmt: skip
    image = smooth((12, 11, 9), seed=0)
    first = facts.cases[0]
    # SAGITTAL: index axis x runs along the patient's y, y along z and z along x.
    assert first.size == (9, 12, 11) and first.spacing_mm == (3, 1, 2)
    foreground = int(ball((12, 11, 9), 3.5).sum())
    assert first.class_voxels == [image.size - foreground, foreground]
    assert first.intensities[0].mean == pytest.approx(image.mean(), rel=1e-5)
    assert first.intensities[0].high == pytest.approx(np.percentile(image, 99.5), rel=1e-5)
    assert facts.cases[2].class_voxels is None


def test_files_are_read_again_only_when_they_or_the_role_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "d", geometry=grid((12, 11, 9)))
    dataset = load_dataset(folder)
    read: list[str] = []

    def watched(case: Case | UnlabelledCase, classes: range) -> Any:
        read.append(case.name)
        return _read(case, classes)

    monkeypatch.setattr("scarceseg.data.fingerprint._read", watched)
    few, more = make_split(dataset, 1, []), make_split(dataset, 2, [])
    first = fingerprint(dataset, few, tmp_path / "cache")
    assert sorted(read) == ["a", "b", "c", "d", "e"]
    assert fingerprint(dataset, few, tmp_path / "cache") == first and len(read) == 5
    assert fingerprint(dataset, more, tmp_path / "cache").cases[1].class_voxels is not None and read[5:] == ["b"]
    again = fingerprint(dataset, few, tmp_path / "cache")
    assert again.cases[1].class_voxels is None and again == first and len(read) == 6
    write_image(smooth((12, 11, 9), seed=9), grid((12, 11, 9)), folder / "imagesTr" / "c_0000.nii.gz")
    assert fingerprint(dataset, few, tmp_path / "cache") != first and read[6:] == ["c"]
    for path in (tmp_path / "cache").glob("d-facts*.json"):
        path.write_text(path.read_text().replace("samples", "sample"))
    (tmp_path / "file").touch()
    changed = fingerprint(dataset, few, tmp_path / "cache")
    assert read[7:] == ["d"] and fingerprint(dataset, few, tmp_path / "file" / "cache") == changed


def test_the_facts_of_a_volume_do_not_keep_it_in_memory(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", geometry=grid((60, 60, 60)))
    case = make_split(load_dataset(folder), 1, ["c"]).labelled[0]
    for kept in _read(case, range(2))[1:]:
        assert kept.base is None and kept.nbytes < 60**3 * 4


def test_plan_of_ct_files_takes_the_window_from_labelled_foreground(tmp_path: Path) -> None:
    geometry = grid((24, 24, 24))
    folder = write_dataset(tmp_path / "d", geometry=geometry)
    write_facts(folder, channel_names={"0": "CT"})
    for name in "abcde":
        inside = ball(geometry.size, 10)
        write_image(np.where(inside, 50, -1000).astype(np.int16), geometry, folder / "imagesTr" / f"{name}_0000.nii.gz")
        if name in "abc":
            write_image(inside, geometry, folder / "labelsTr" / f"{name}.nii.gz")
    _, plan = planned(folder, 1)
    assert (plan.normalisation[0].low, plan.normalisation[0].high) == (50, 50)


def test_bad_files_are_told_together(tmp_path: Path) -> None:
    names = [f"c{number:02d}" for number in range(15)]
    folder = write_dataset(tmp_path / "d", labelled=names[:3], unlabelled=names[3:])
    for name in names[1:]:
        (folder / "imagesTr" / f"{name}_0000.nii.gz").write_text("no image")
    dataset = load_dataset(folder)
    with pytest.raises(
        DataError, match=r"^14 of 15 cases cannot be used: .*c01_0000.*c10_0000.*; and 4 more$"
    ) as caught:
        fingerprint(dataset, make_split(dataset, 2, ["c02"]), tmp_path / "cache")
    assert "c14_0000" not in str(caught.value)
