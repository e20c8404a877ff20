"""Many targets: what is looked at, what is kept, and that neither order nor workers matter."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from scarceseg.atlas import (
    AtlasLabel,
    AtlasOptions,
    Fusion,
    Registration,
    atlas_labels,
    copy_labels,
    expected_dice,
    pairs,
    teacher,
)
from scarceseg.atlas.fuse import fuse
from scarceseg.atlas.register import register
from scarceseg.atlas.spread import Spread, at_once, count_workers, free_memory
from scarceseg.atlas.teacher import class_dice
from scarceseg.atlas.warp import copy_label, warp_image, warp_label
from scarceseg.data.prepare import PreparedCase
from scarceseg.errors import ConfigError, DataError
from tests.atlas.bodies import FEET_FIRST, case, dice, grid, without_label

FAST = AtlasOptions(registration=Registration(spacing_mm=3.0, iterations=4, levels=((3, 2),)))
ATLASES = [
    case("a", grid(), seed=1),
    case("b", grid((27, 33, 31), (2.0, 2.0, 1.9), (5.0, 600.0, -70.0), FEET_FIRST), bent=2.0, seed=2),
    case("c", grid((34, 29, 25), (2.0, 2.1, 2.3)), shift=(2.0, 1.0, -3.0), seed=3),
]
TARGETS = [case("t", grid((31, 32, 29)), label=False, bent=3.0, seed=4), case("u", grid(), label=False, seed=5)]


class Sealed:
    """A prepared case whose label must not be looked at."""

    def __init__(self, known: PreparedCase) -> None:
        self.name, self.image, self.geometry, self.original = known.name, known.image, known.geometry, known.original

    @property
    def label(self) -> Any:
        raise AssertionError(f"the label of target {self.name} was looked at")


def assert_same(first: list[AtlasLabel], second: list[AtlasLabel]) -> None:
    assert [(a.name, a.atlases, a.notes) for a in first] == [(b.name, b.atlases, b.notes) for b in second]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.probability, b.probability)
        np.testing.assert_array_equal(a.agreement, b.agreement)


def refuse(*_: Any) -> Any:
    raise AssertionError("something was registered that is in the cache")


def test_the_labels_are_those_of_the_functions_put_together(tmp_path: Path) -> None:
    target = TARGETS[0]
    (made,) = atlas_labels([target], ATLASES[:2], 3, FAST, workers=1, cache=tmp_path)
    order = [next(atlas for atlas in ATLASES if atlas.name == name) for name in made.atlases]
    assert sorted(made.atlases) == ["a", "b"]
    shares, images = [], []
    for atlas in order:
        transform = register(target.image, target.geometry, atlas.image, atlas.geometry, FAST.registration)
        assert atlas.label is not None
        shares.append(warp_label(atlas.label, atlas.geometry, transform, target.geometry, 3))
        images.append(warp_image(atlas.image, atlas.geometry, transform, target.geometry))
    probability, agreement = fuse(np.stack(shares), np.stack(images), target.image, FAST.fusion, (2.0, 2.0, 2.0))
    np.testing.assert_array_equal(made.probability, probability)
    np.testing.assert_array_equal(made.label, probability.argmax(0))
    np.testing.assert_array_equal(made.agreement, agreement)
    assert made.label.dtype == np.uint8
    np.testing.assert_allclose(made.probability.sum(0), 1, atol=1e-5)


def test_two_processes_give_what_one_gives_and_no_label_of_a_target_is_looked_at(tmp_path: Path) -> None:
    sealed = [cast(PreparedCase, Sealed(target)) for target in TARGETS]
    seen: list[tuple[int, int, str]] = []
    alone = list(atlas_labels(sealed, ATLASES[:2], 3, FAST, workers=1, cache=tmp_path / "one"))
    both = list(
        atlas_labels(
            sealed, ATLASES[:2], 3, FAST, workers=2, cache=tmp_path / "two", on_progress=lambda *step: seen.append(step)
        )
    )
    assert_same(alone, both)
    assert [step[0] for step in seen] == list(range(1, 11))  # 4 affine, 4 deformable, 2 fused
    assert {step[1] for step in seen} == {10}
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


def test_what_is_in_the_cache_is_not_registered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(atlas_labels(TARGETS, ATLASES[:2], 3, FAST, workers=1, cache=tmp_path))
    monkeypatch.setattr(pairs, "align_deformable", refuse)
    monkeypatch.setattr(pairs, "align_affine", refuse)
    assert_same(first, list(atlas_labels(TARGETS, ATLASES[:2], 3, FAST, workers=1, cache=tmp_path)))
    # Fusion has no part in an alignment, names have none in its identity beyond the entry's name.
    other = FAST.model_copy(update={"fusion": Fusion(kind="mean")})
    assert len(list(atlas_labels(TARGETS, ATLASES[:2], 3, other, workers=1, cache=tmp_path))) == 2
    changed = replace(TARGETS[1], image=TARGETS[1].image + np.float32(0.01))
    with pytest.raises(AssertionError, match="in the cache"):
        list(atlas_labels([changed], ATLASES[:1], 3, FAST, workers=1, cache=tmp_path))


def test_other_options_of_the_deformation_keep_the_affine_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(atlas_labels(TARGETS[:1], ATLASES[:1], 3, FAST, workers=1, cache=tmp_path))
    monkeypatch.setattr(pairs, "align_affine", refuse)
    stiffer = FAST.registration.model_copy(update={"smoothness": 2.0})
    options = FAST.model_copy(update={"registration": stiffer})
    assert len(list(atlas_labels(TARGETS[:1], ATLASES[:1], 3, options, workers=1, cache=tmp_path))) == 1
    finer = FAST.model_copy(update={"registration": stiffer.model_copy(update={"spacing_mm": 2.9})})
    with pytest.raises(AssertionError, match="in the cache"):
        list(atlas_labels(TARGETS[:1], ATLASES[:1], 3, finer, workers=1, cache=tmp_path))


def test_a_stopped_job_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pairs.align_deformable
    calls: list[Any] = []

    def tired(*args: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(pairs, "align_deformable", tired)
    with pytest.raises(KeyboardInterrupt):
        list(atlas_labels(TARGETS, ATLASES[:2], 3, FAST, workers=1, cache=tmp_path))
    calls.clear()
    resumed = list(atlas_labels(TARGETS, ATLASES[:2], 3, FAST, workers=1, cache=tmp_path))
    assert len(calls) == 2  # of four
    monkeypatch.setattr(pairs, "align_deformable", real)
    assert_same(resumed, list(atlas_labels(TARGETS, ATLASES[:2], 3, FAST, workers=1, cache=tmp_path / "afresh")))


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    first = list(atlas_labels(TARGETS[:1], ATLASES[:1], 3, FAST, workers=1, cache=tmp_path))
    for entry in tmp_path.glob("*deformable*.npy"):
        entry.write_bytes(entry.read_bytes()[:-7])
    assert_same(first, list(atlas_labels(TARGETS[:1], ATLASES[:1], 3, FAST, workers=1, cache=tmp_path)))


def test_only_the_most_similar_atlases_are_registered_fully(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlike = [replace(ATLASES[0], name=f"x{k}", image=np.roll(ATLASES[0].image, 9 + k, axis=1 + k)) for k in range(2)]
    full = []
    real = pairs.align_deformable

    def counted(*args: Any) -> Any:
        full.append(args)
        return real(*args)

    monkeypatch.setattr(pairs, "align_deformable", counted)
    options = FAST.model_copy(update={"max_atlases": 2})
    (made,) = atlas_labels(TARGETS[1:], [*unlike, *ATLASES[::2]], 3, options, workers=1, cache=tmp_path)
    assert made.atlases == ("a", "c") or made.atlases == ("c", "a")
    assert len(full) == 2


def test_a_hopeless_atlas_is_noted_and_copied(tmp_path: Path) -> None:
    flat = replace(ATLASES[0], image=np.zeros_like(ATLASES[0].image))
    (made,) = atlas_labels(TARGETS[:1], [flat], 3, FAST, workers=1, cache=tmp_path)
    assert ATLASES[0].label is not None
    copied = copy_label(ATLASES[0].label, flat.geometry, TARGETS[0].geometry, 3)
    np.testing.assert_allclose(made.probability, copied, atol=1e-6)
    assert len(made.notes) == 1
    assert "a to t" in made.notes[0]
    assert "constant" in made.notes[0]


def test_leave_one_out(tmp_path: Path) -> None:
    expected = expected_dice(ATLASES, 4, FAST, workers=1, cache=tmp_path)
    assert list(expected.cases) == ["a", "b", "c"]
    (made,) = atlas_labels([without_label(ATLASES[1])], ATLASES[::2], 4, FAST, workers=1, cache=tmp_path)
    reference = ATLASES[1].label
    assert reference is not None
    assert expected.cases["b"][:2] == pytest.approx([dice(made.label, reference, value) for value in (1, 2)])
    assert np.isnan(expected.cases["b"][2])  # class 3 is nowhere
    assert expected.mean == pytest.approx(np.mean([row[:2] for row in expected.cases.values()]))
    assert expected.mean > 0.6


def test_copy_labels() -> None:
    sealed = cast(PreparedCase, Sealed(TARGETS[0]))
    (one,) = copy_labels([sealed], ATLASES[:1], 3)
    labels = [atlas.label for atlas in ATLASES if atlas.label is not None]
    copies = [copy_label(x, y.geometry, sealed.geometry, 3) for x, y in zip(labels, ATLASES, strict=True)]
    np.testing.assert_allclose(one.probability, copies[0], atol=1e-6)
    np.testing.assert_allclose(one.agreement, copies[0].max(0), atol=1e-6)
    (three,) = copy_labels([sealed], ATLASES, 3)
    np.testing.assert_allclose(three.probability, np.mean(copies, axis=0), atol=1e-6)
    votes = np.array([c.argmax(0) for c in copies])
    np.testing.assert_allclose(three.agreement, (votes == three.label).mean(0), atol=1e-6)
    assert three.atlases == ("a", "b", "c")


def test_bad_atlases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one labelled volume"):
        list(atlas_labels(TARGETS, [], 3, cache=tmp_path))
    with pytest.raises(DataError, match="label for atlas u"):
        list(atlas_labels(TARGETS[:1], TARGETS[1:], 3, cache=tmp_path))
    with pytest.raises(DataError, match="values 0 to 1"):
        list(copy_labels(TARGETS, ATLASES, 2))
    with pytest.raises(ConfigError, match="a is the only atlas"):
        list(atlas_labels(ATLASES[:1], ATLASES[:1], 3, cache=tmp_path))
    with pytest.raises(ConfigError, match="two or more"):
        expected_dice(ATLASES[:1], 3, cache=tmp_path)


def test_class_dice() -> None:
    a, b = np.array([0, 1, 1, 2], np.uint8), np.array([0, 1, 0, 0], np.uint8)
    assert class_dice(a, b, 4)[:2] == pytest.approx((2 / 3, 0.0))
    assert np.isnan(class_dice(a, b, 4)[2])


def double_or_die(number: int) -> int:
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    return 2 * number


def test_the_work_goes_on_when_worker_processes_die() -> None:
    with pytest.warns(UserWarning, match="worker processes ended early"), Spread(2, 9, None) as spread:
        assert list(spread.results(double_or_die, range(9), str)) == list(range(0, 18, 2))


def test_large_jobs_wait_for_each_other() -> None:
    assert at_once(100, memory=1000) == 10 and at_once(1e12, memory=5) == 1
    assert (at_once(1) or 1000) >= 1000  # what this machine has free
    given: list[int] = []
    waiting = 0

    class Late:
        def __init__(self, number: int) -> None:
            self.number = number

        def result(self) -> int:
            nonlocal waiting
            waiting -= 1
            return 2 * self.number

    def submit(_: Any, number: int) -> Late:
        nonlocal waiting
        waiting += 1
        given.append(waiting)
        return Late(number)

    for most, largest in ((2, 2), (9, 4), (None, 4)):
        with Spread(3, 6, None) as spread:
            given.clear()
            spread._submit = submit  # type: ignore[assignment, method-assign]
            assert list(spread.results(int, range(6), str, most)) == [0, 2, 4, 6, 8, 10]
            assert max(given) == largest
    with Spread(3, 6, None) as spread:  # one alone: no process is needed
        spread._submit = refuse  # type: ignore[method-assign]
        assert list(spread.results(str, range(3), str, 1)) == ["0", "1", "2"]


def test_workers_default_to_the_cores_at_hand() -> None:
    assert count_workers(None) >= 1
    assert count_workers(0) == 1
    assert count_workers(3) == 3


def test_processes_beside_this_one_share_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert count_workers(None) == 12
    for beside, share in (("4", 3), ("99", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
        assert count_workers(None) == share and count_workers(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert at_once(100, memory=1000) == 2


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_memory_of_a_container_or_job_is_the_limit(tmp_path: Path) -> None:
    """Of nested groups the one with the least left counts; copies of files that can be dropped are free."""
    free = {"meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
    two = written(tmp_path / "proc2", free | {"self/cgroup": "0::/job/step\n"})
    job = {"memory.max": "5000000\n", "memory.current": "3000000\n", "memory.stat": "anon 7\ninactive_file 500\n"}
    groups = written(tmp_path / "two", {f"job/{name}": text for name, text in job.items()})
    written(groups, {"job/step/memory.max": "max\n", "job/step/memory.current": "3000\n"})
    assert free_memory(two, groups) == 2_000_500
    one = written(tmp_path / "proc1", free | {"self/cgroup": "5:cpu:/a\n4:memory:/a\n"})
    groups = written(
        tmp_path / "one", {"memory/memory.limit_in_bytes": str(2**62), "memory/memory.usage_in_bytes": "9"}
    )
    assert free_memory(one, groups) == 8000 * 1024
    step = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "800", "memory.stat": "total_inactive_file 50\n"}
    assert free_memory(one, written(groups, {f"memory/a/{name}": text for name, text in step.items()})) == 150
    assert free_memory(tmp_path / "none", tmp_path / "none") is None


def test_registrations_wait_for_each_other_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, kept = [], []
    original = Spread.run

    def run(self: Spread, function: Any, jobs: Any, is_done: Any, text: Any, most: int | None = None) -> None:
        kept.append(most)
        original(self, function, jobs, is_done, text, most)

    monkeypatch.setattr(Spread, "run", run)
    monkeypatch.setattr(teacher, "at_once", lambda largest: asked.append(largest) or 1)
    list(atlas_labels(TARGETS[:1], ATLASES[:2], 3, FAST, workers=4, cache=tmp_path))
    assert kept == [1, 1]  # one at a time, so that no process is needed
    assert 200 * 2**20 < asked[0] < asked[1] < 300 * 2**20
