"""A 2D SAM on volumes: frozen, embedded once, prompts in their place, slice by slice and as a mosaic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation import sam_ask, sam_volume
from scarceseg.foundation.base import Embedding, Masks, Tuning
from scarceseg.foundation.sam import decode
from scarceseg.foundation.sam_ask import EMPTY, Ask, answer, prompt_of_mask
from scarceseg.foundation.sam_keys import to_official
from scarceseg.foundation.sam_pixels import to_pixels, unit_range
from scarceseg.foundation.sam_volume import SamOptions, SamPromptable
from scarceseg.types import Prompt
from tests.foundation.test_lora import SIDE, tiny_sam

VIEWS = ["slices", "mosaic"]
SIZE = (13, 11, 9)
ISO = (1.0, 1.0, 1.0)


def volume(size: tuple[int, int, int] = SIZE, channels: int = 1, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, channels, *size, generator=torch.Generator().manual_seed(seed))


def model(view: str = "slices", **options: Any) -> SamPromptable:
    return SamPromptable(tiny_sam(), "tiny", SamOptions(view=view, **{"stop_quality": 0.0, **options}))  # type: ignore[arg-type]


def click(*places: tuple[float, ...], labels: list[int] | None = None, **rest: Any) -> Prompt:
    return Prompt(torch.tensor(places), torch.tensor(labels or [1] * len(places)), **rest)


def box(low: tuple[int, int, int], high: tuple[int, int, int]) -> Prompt:
    return Prompt(box_voxel=torch.tensor([low, high]))


class Painter:
    """A decoder that draws what it is asked: discs at clicks inside, boxes, masks; and holes at clicks outside.

    Where the mean of an embedding is below 0 it finds nothing (with `looks`).
    """

    def __init__(
        self, radius: float = 4.0, quality: float = 0.9, looks: bool = False, draws_boxes: bool = True
    ) -> None:
        self.radius, self.quality, self.looks, self.draws_boxes = radius, quality, looks, draws_boxes
        self.asks = 0

    def __call__(
        self,
        sam: Any,
        embedding: torch.Tensor,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, side = len(embedding), 4 * embedding.shape[-1]
        self.asks += rows
        y, x = ((torch.arange(side) + 0.5) * SIDE / side - 0.5 for _ in range(2))
        found = torch.zeros(rows, side, side, dtype=torch.bool)
        for row in range(rows):
            if boxes is not None and self.draws_boxes:
                x0, y0, x1, y1 = boxes[row]
                across = ((x >= x0 - 0.5) & (x <= x1 + 0.5))[None] & ((y >= y0 - 0.5) & (y <= y1 + 0.5))[:, None]
                found[row] |= across
            if masks is not None:
                found[row] |= masks[row, 0] > 0
            if points is not None and labels is not None:
                discs = [(p, int(k)) for p, k in zip(points[row], labels[row], strict=True)]
                for point, label in sorted(discs, key=lambda disc: -disc[1]):
                    disc = (x - point[0]).square()[None] + (y - point[1]).square()[:, None] <= self.radius**2
                    found[row] = found[row] | disc if label == 1 else found[row] & ~disc
            if self.looks and embedding[row].mean() < 0:
                found[row] = False
        logits = torch.where(found, 10.0, -10.0)[:, None].repeat(1, 3 if multimask else 1, 1, 1)
        return logits, torch.full((rows, logits.shape[1]), self.quality)


def paint(monkeypatch: pytest.MonkeyPatch, **how: Any) -> Painter:
    painter = Painter(**how)
    monkeypatch.setattr(sam_ask, "decode", painter)
    return painter


def ask(promptable: SamPromptable, image: torch.Tensor, *prompts: Prompt, spacing: Any = ISO) -> Masks:
    return promptable.segment(promptable.embed(image, spacing), prompts)


def inside(masks: Masks, row: int = 0) -> torch.Tensor:
    return masks.logits[row] > 0


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


# Frozen, embedded once


@pytest.mark.parametrize("view", VIEWS)
def test_frozen_means_frozen(view: str) -> None:
    promptable = model(view)
    before = {name: value.clone() for name, value in promptable.sam.state_dict().items()}
    image = volume().requires_grad_(True)
    embedding = promptable.embed(image, ISO)
    masks = promptable.segment(embedding, [click((6.0, 5.0, 4.0))])
    masks = promptable.segment(embedding, [click((6.0, 5.0, 4.0), (2.0, 2.0, 4.0), labels=[1, 0])], masks)
    assert not masks.logits.requires_grad and masks.logits.shape == (1, *SIZE)
    assert not any(parameter.requires_grad for parameter in promptable.sam.parameters())
    assert not promptable.sam.training
    after = promptable.sam.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("view", VIEWS)
def test_one_embedding_serves_ten_prompts(view: str) -> None:
    promptable = model(view, batch=4)
    images: list[int] = []
    promptable.sam.vision_encoder.register_forward_hook(lambda _m, _i, out: images.append(len(out[0])))
    embedding = promptable.embed(volume(), ISO)
    assert images == ([4, 4, 1] if view == "slices" else [1])
    for index in range(5):
        promptable.segment(embedding, [click((6.0, 5.0, float(index)))])
    several = embedding.select([0] * 5)
    assert len(several) == 5
    promptable.segment(several, [click((6.0, 5.0, float(index))) for index in range(5)])
    assert sum(images) == (SIZE[2] if view == "slices" else 1)


def test_selecting_a_volume_does_not_copy_its_slices() -> None:
    embedding = model().embed(volume(rows=2), ISO)
    chosen = embedding.select([1, 1, 0])
    assert chosen.frame is embedding.frame
    assert chosen.features["volume"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("view", VIEWS)
def test_rows_of_a_batch_do_not_touch_each_other(view: str) -> None:
    promptable, images = model(view), torch.cat([volume(seed=1), volume(seed=2)])
    mask = torch.zeros(SIZE)
    mask[3:9, 2:8, 3:6] = 1
    prompts = [
        click((6.0, 5.0, 4.0)),
        click((3.0, 3.0, 2.0), (8.0, 8.0, 6.0), labels=[1, 0]),
        box((2, 2, 3), (9, 8, 5)),
        Prompt(mask=mask),
    ]
    rows = [0, 1, 1, 0]
    embedding = promptable.embed(images, ISO)
    together = promptable.segment(embedding.select(rows), prompts)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = ask(promptable, images[row : row + 1], prompt)
        torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.quality[index], alone.quality[0], rtol=1e-4, atol=1e-5)
    assert together.quality.min() >= 0 and together.quality.max() <= 1


@pytest.mark.parametrize("view", VIEWS)
def test_the_batch_size_changes_nothing(view: str) -> None:
    prompts = [click((6.0, 5.0, 4.0), (2.0, 9.0, 7.0))]
    one, many = (ask(model(view, batch=batch), volume(), *prompts) for batch in (1, 64))
    torch.testing.assert_close(one.logits, many.logits, rtol=1e-4, atol=1e-4)


# Prompts in their place


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_a_click_lands_on_its_voxel(monkeypatch: pytest.MonkeyPatch, view: str, axis: int) -> None:
    paint(monkeypatch, radius=5.0 if view == "slices" else 2.0, quality=0.9)
    for place in [(6.0, 5.0, 4.0), (1.0, 9.0, 7.0), (11.0, 2.0, 0.0)]:
        promptable = model(view, axis=axis, stop_overlap=2.0)  # no mask agrees with its neighbour: nothing spreads
        found = inside(ask(promptable, volume(), click(place)))
        voxels = found.nonzero().float()
        assert len(voxels) and (voxels[:, axis] == place[axis]).all()
        assert found[tuple(int(i) for i in place)]
        assert (voxels.mean(dim=0) - torch.tensor(place)).abs().max() <= 1


def test_slices_keep_their_proportions_in_millimetres(monkeypatch: pytest.MonkeyPatch) -> None:
    paint(monkeypatch, radius=8.0)
    masks = ask(model(stop_overlap=2.0), volume((16, 16, 3)), click((8.0, 8.0, 1.0)), spacing=(1.0, 2.0, 1.0))
    voxels = inside(masks).nonzero()
    width, height, _ = (voxels.amax(dim=0) - voxels.amin(dim=0) + 1).tolist()
    assert width == pytest.approx(2 * height, abs=1)
    assert inside(masks)[8, 8, 1]


def test_a_mask_spreads_through_the_slices_that_show_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that sees only brightness, and a decoder that finds nothing in dark slices."""
    image = torch.full((1, 1, 12, 12, 9), -1.0)
    image[..., 2:7] = 1.0
    promptable = model()
    monkeypatch.setattr(sam_volume, "image_embedding", lambda _sam, x: x[:, :1, ::8, ::8].expand(-1, 16, -1, -1))
    paint(monkeypatch, radius=8.0, looks=True)
    masks = ask(promptable, image, click((6.0, 6.0, 4.0)))
    assert inside(masks).flatten(0, 1).any(dim=0).nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]
    assert float(masks.quality[0]) == pytest.approx(0.9)
    bounded = ask(promptable, image, click((6.0, 6.0, 4.0), box_voxel=torch.tensor([[3, 3, 4], [8, 8, 5]])))
    assert inside(bounded).flatten(0, 1).any(dim=0).nonzero()[:, 0].tolist() == [4, 5]


def test_spreading_ends_where_the_model_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    painter = paint(monkeypatch, radius=8.0, quality=0.4)
    masks = ask(model(stop_quality=0.5), volume(), click((6.0, 5.0, 4.0)))
    assert inside(masks).flatten(0, 1).any(dim=0).nonzero()[:, 0].tolist() == [4]
    assert painter.asks == 3
    assert (masks.logits[..., 0] == EMPTY).all()
    painter.quality = 0.6
    assert inside(ask(model(stop_quality=0.5), volume(), click((6.0, 5.0, 4.0)))).flatten(0, 1).any(dim=0).all()


def test_every_slice_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    painter = paint(monkeypatch, radius=8.0)
    ask(model(), volume(), click((6.0, 5.0, 1.0), (6.0, 5.0, 6.0), (5.0, 5.0, 6.0)))
    assert painter.asks == SIZE[2]


@pytest.mark.parametrize("view", VIEWS)
def test_a_click_outside_acts_on_its_own_slice(monkeypatch: pytest.MonkeyPatch, view: str) -> None:
    paint(monkeypatch, radius=8.0 if view == "slices" else 2.0)
    inner, outer = (6.0, 5.0, 4.0), (6.0, 5.0, 5.0)
    found = inside(ask(model(view), volume(), click(inner, outer, labels=[1, 0])))
    assert found[6, 5, 4] and not found[6, 5, 5]
    if view == "slices":
        found = inside(ask(model(), volume(), click(inner, (8.0, 5.0, 3.0), labels=[1, 0])))
        assert found[8, 5, 4] == (inside(ask(model(), volume(), click(inner))))[8, 5, 4]
        assert not found[8, 5, 3]


@pytest.mark.parametrize("size", [(16, 16, 9), (13, 11, 9), (16, 9, 5)])
@pytest.mark.parametrize("view", VIEWS)
def test_a_box_bounds_the_answer(monkeypatch: pytest.MonkeyPatch, view: str, size: tuple[int, int, int]) -> None:
    paint(monkeypatch)
    low, high = (2, 3, 1), (9, 7, 3)
    found = inside(ask(model(view), volume(size), box(low, high)))
    expected = torch.zeros(size, dtype=torch.bool)
    expected[2:10, 3:8, 1:4] = True
    assert found.any(dim=0).any(dim=0).nonzero()[:, 0].tolist() == [1, 2, 3]
    for axis in range(2):
        others = tuple(i for i in range(3) if i != axis)
        got, wanted = (x.sum(dim=others).nonzero()[:, 0] for x in (found, expected))
        assert abs(int(got[0] - wanted[0])) <= 1 and abs(int(got[-1] - wanted[-1])) <= 1
    assert iou(found, expected) > (0.99 if size == (16, 16, 9) and view == "slices" else 0.6)


@pytest.mark.parametrize("size", [(16, 16, 4), (13, 11, 9)], ids=["aligned", "odd"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_dense_mask_comes_back_in_its_place(
    monkeypatch: pytest.MonkeyPatch, view: str, size: tuple[int, int, int]
) -> None:
    paint(monkeypatch, radius=0.5, draws_boxes=False)
    mask = torch.zeros(size)
    mask[4:10, 2:8, 1:3] = 0.9
    mask[8:12, 6:10, 2] = 0.8
    found = inside(ask(model(view), volume(size), Prompt(mask=mask)))
    assert found.any(dim=0).any(dim=0).nonzero()[:, 0].tolist() == [1, 2]
    for number in (1, 2):
        centres = [(m[..., number]).nonzero().float().mean(dim=0) for m in (found, mask > 0.5)]
        assert (centres[0] - centres[1]).abs().max() < 0.5
    # Where pixels of the mask prompt and voxels do not fall together, a rim of half a prompt pixel is lost or won.
    assert iou(found, mask > 0.5) > (0.95 if size[0] == 16 else 0.5)


def test_a_tile_answers_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    paint(monkeypatch, radius=60.0)  # a disc over the whole canvas
    prompt = click((4.0, 4.0, 2.0), box_voxel=torch.tensor([[2, 2, 2], [9, 8, 3]]))
    found = inside(ask(model("mosaic"), volume(), prompt))
    assert found.any(dim=0).any(dim=0).nonzero()[:, 0].tolist() == [2, 3]
    prompt = click((4.0, 4.0, 7.0), box_voxel=torch.tensor([[2, 2, 2], [9, 8, 3]]))
    found = inside(ask(model("mosaic"), volume(), prompt))
    assert found.any(dim=0).any(dim=0).nonzero()[:, 0].tolist() == [2, 3, 7]
    assert found[..., 7].all()


def test_a_large_volume_still_is_one_mosaic(monkeypatch: pytest.MonkeyPatch) -> None:
    paint(monkeypatch, radius=2.0)
    size = (70, 30, 40)
    found = inside(ask(model("mosaic"), volume(size), click((35.0, 15.0, 20.0))))
    assert found[35, 15, 20] and found.shape == size


@pytest.mark.parametrize("view", VIEWS)
def test_the_last_answer_is_the_next_mask_prompt(monkeypatch: pytest.MonkeyPatch, view: str) -> None:
    paint(monkeypatch, radius=6.0 if view == "slices" else 2.0)
    promptable = model(view, stop_overlap=2.0)
    embedding = promptable.embed(volume(), ISO)
    first = promptable.segment(embedding, [click((3.0, 5.0, 4.0))])
    second = promptable.segment(embedding, [click((9.0, 5.0, 4.0))], first)
    assert inside(second)[3, 5, 4] and inside(second)[9, 5, 4]
    assert not inside(promptable.segment(embedding, [click((9.0, 5.0, 4.0))]))[3, 5, 4]
    with pytest.raises(DataError, match="low_res"):
        promptable.segment(embedding, [click((9.0, 5.0, 4.0))], Masks(first.logits, first.quality))
    with pytest.raises(DataError, match="low_res"):
        promptable.segment(embedding.select([0, 0]), [click((9.0, 5.0, 4.0))] * 2, first)


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_meant_is_nothing_found(view: str) -> None:
    for prompt in (
        click((6.0, 5.0, 4.0), labels=[0]),
        Prompt(mask=torch.zeros(SIZE)),
        Prompt(points_voxel=torch.zeros(0, 3), point_labels=torch.zeros(0)),
    ):
        masks = ask(model(view), volume(), prompt)
        assert (masks.logits == EMPTY).all() and float(masks.quality[0]) == 0


def test_of_one_click_the_best_mask_counts() -> None:
    """Masks 1 to 3 answer a single click, the best by their own estimate; mask 0 answers all other prompts."""
    sam = tiny_sam()
    with torch.no_grad():
        sam.mask_decoder.iou_prediction_head.proj_out.bias.copy_(torch.tensor([0.1, 0.2, 0.9, 1.7]))
        sam.mask_decoder.iou_prediction_head.proj_out.weight.zero_()
    image, points, labels = torch.randn(16, 8, 8), torch.tensor([[20.0, 30.0]]), torch.tensor([1])
    single = Ask(image, points, labels)
    others = [
        Ask(image, points, labels, box=torch.tensor([8.0, 8.0, 40.0, 40.0])),
        Ask(image, points, labels, mask=torch.randn(32, 32)),
        Ask(image, points.repeat(2, 1), labels.repeat(2)),
    ]
    asks = [others[0], single, *others[1:]]
    logits, quality = answer(sam, asks, batch=2, multimask=True)
    with torch.no_grad():
        several, _ = decode(sam, image[None], points[None], labels[None], multimask=True)
    torch.testing.assert_close(logits[1], several[0, 2])
    torch.testing.assert_close(quality, torch.tensor([0.1, 1.0, 0.1, 0.1]))
    _, plain = answer(sam, asks, batch=8, multimask=False)
    torch.testing.assert_close(plain, torch.full((4,), 0.1))


# Intensities


@pytest.mark.parametrize("normalise", ["sam", "minmax", "zscore"])
@pytest.mark.parametrize("view", VIEWS)
def test_the_scale_of_the_intensities_does_not_matter(view: str, normalise: str) -> None:
    promptable, image, prompt = model(view, normalise=normalise), volume(), click((6.0, 5.0, 4.0))
    first = ask(promptable, image, prompt)
    for other in (image * 400 - 1000, image / 50 + 3, (image * 1000).round().to(torch.int16)):
        again = ask(promptable, other, prompt)
        torch.testing.assert_close(again.logits, first.logits, rtol=0.02, atol=0.02)


def test_pixels_are_in_the_range_the_network_knows() -> None:
    image = volume((9, 9, 9)) * 300
    unit = unit_range(image)
    assert float(unit.min()) == 0 and float(unit.max()) == 1
    assert (unit_range(torch.full_like(image, 7)) == 0).all()
    pixels = to_pixels(image, "sam", 3)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(pixels.amin(dim=(0, 2, 3, 4)), -mean / std)
    torch.testing.assert_close(pixels.amax(dim=(0, 2, 3, 4)), (255 - mean) / std)
    torch.testing.assert_close(to_pixels(image, "minmax", 3), unit.expand(-1, 3, -1, -1, -1))
    score = to_pixels(image, "zscore", 3)
    assert abs(float(score.mean())) < 1e-5 and float(score.std(correction=0)) == pytest.approx(1, abs=1e-5)
    two = to_pixels(volume(channels=2), "minmax", 3)
    torch.testing.assert_close(two[:, 2], two[:, :2].mean(dim=1))


def test_an_outlier_does_not_darken_the_rest() -> None:
    image = volume((20, 20, 20))
    spoiled = image.clone()
    spoiled[0, 0, 0, 0, 0] = 1e6
    assert (unit_range(spoiled) - unit_range(image)).abs()[0, 0, 1:].max() < 0.05


# The rest of the interface


@pytest.mark.parametrize("view", VIEWS)
def test_bad_prompts_and_images_are_refused(view: str) -> None:
    promptable = model(view)
    embedding = promptable.embed(volume(), ISO)
    for prompts, message in (
        ([click((6.0, 5.0, 9.0))], "outside the volume"),
        ([click((-1.0, 5.0, 4.0))], "outside the volume"),
        ([box((0, 0, 0), (13, 5, 5))], "outside the volume"),
        ([Prompt()], "empty prompt"),
        ([Prompt(mask=torch.zeros(3, 3, 3))], "expected the volume's size"),
        ([click((6.0, 5.0, 4.0))] * 2, "expected 1 prompts"),
    ):
        with pytest.raises(DataError, match=message):
            promptable.segment(embedding, prompts)
    with pytest.raises(DataError, match="1, 2 or 3 channels, got 5"):
        promptable.embed(volume(channels=5), ISO)
    with pytest.raises(DataError, match="expected volumes"):
        promptable.embed(volume()[0], ISO)
    other = model("mosaic" if view == "slices" else "slices").embed(volume(), ISO)
    with pytest.raises(DataError, match="embed the volume again"):
        promptable.segment(other, [click((6.0, 5.0, 4.0))])


@pytest.mark.parametrize("view", VIEWS)
def test_half_precision_takes_half_the_memory(view: str) -> None:
    full, half = model(view), model(view, half=True)
    prompt = click((6.0, 5.0, 4.0))
    a, b = (promptable.embed(volume(), ISO) for promptable in (full, half))
    tensors = [e.features.get("canvas", e.frame.volumes[0] if view == "slices" else None) for e in (a, b)]
    assert [t.element_size() for t in tensors if t is not None] == [4, 2]
    masks = half.segment(b, [prompt])
    assert masks.logits.dtype == torch.float32 and masks.memory["low_res"].dtype == torch.float16
    half.segment(b, [prompt], masks)
    assert iou(inside(masks), inside(full.segment(a, [prompt]))) > 0.9 or not inside(masks).any()


@pytest.mark.parametrize("view", VIEWS)
def test_any_size_and_number_of_channels(view: str) -> None:
    for size, channels in (((5, 64, 3), 1), ((1, 1, 1), 2), ((33, 7, 2), 3)):
        masks = ask(model(view), volume(size, channels), click((0.0, 0.0, 0.0)))
        assert masks.logits.shape == (1, *size) and masks.logits.isfinite().all()


def test_built_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sam.safetensors"
    state = {k: v.clone().contiguous() for k, v in to_official(tiny_sam().state_dict()).items()}
    save_file(state, path, metadata={"decoder_heads": "2"})
    image, prompt = volume(), click((6.0, 5.0, 4.0))
    promptable = SamPromptable.from_file(path, view="mosaic", name="medsam-small", batch=2)
    assert promptable.options == SamOptions(view="mosaic", normalise="minmax", batch=2)
    assert promptable.name == "medsam-small"
    expected = ask(model("mosaic", normalise="minmax"), image, prompt)
    torch.testing.assert_close(ask(promptable, image, prompt).logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert SamPromptable.from_file(path).options == SamOptions()
    larger = SamPromptable.from_file(path, image_size=96)
    assert ask(larger, image, prompt).logits.shape == (1, *SIZE)
    with pytest.raises(ConfigError, match="no option 'colour'"):
        SamPromptable.from_file(path, colour=1)


def test_impossible_options_are_refused() -> None:
    for options in ({"view": "side"}, {"normalise": "none"}, {"axis": 3}, {"batch": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            SamOptions(**options)


def test_tuning_leaves_the_original_as_it_is() -> None:
    promptable = model()
    before = {name: value.clone() for name, value in promptable.sam.state_dict().items()}
    tuned = promptable.tunable(1, 2, Tuning("decoder"), (8, 8, 4))
    tuned(volume((8, 8, 4))).mean().backward()
    assert any(parameter.grad is not None for parameter in tuned.parameters())
    assert not any(parameter.requires_grad for parameter in promptable.sam.parameters())
    assert all(torch.equal(value, promptable.sam.state_dict()[name]) for name, value in before.items())


def test_a_mask_is_described_by_its_inner_point_and_its_box() -> None:
    logits = torch.full((16, 16), -5.0)
    logits[2:9, 4:15] = 5.0
    logits[12, 0] = 5.0
    point, around = prompt_of_mask(logits, 64)
    row, column = (float(point[1]) + 0.5) / 4, (float(point[0]) + 0.5) / 4
    assert 5 <= row <= 6 and 7 <= column <= 12
    assert around.tolist() == [0, 8, 59, 51]


def test_embedding_is_batch_first() -> None:
    for view in VIEWS:
        embedding = model(view).embed(volume(rows=3), ISO)
        assert isinstance(embedding, Embedding) and len(embedding) == 3 and embedding.size == SIZE
        assert all(len(value) == 3 for value in embedding.features.values())
