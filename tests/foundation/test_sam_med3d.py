"""SAM-Med3D against the published implementation's numbers, and the promises of its adapter."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import Embedding, Masks
from scarceseg.foundation.sam_med3d import LOGIT_LIMIT, Cube, SamMed3D, network_from_state, z_score
from scarceseg.foundation.sam_med3d_net import GridAttention, SamMed3DConfig, SamMed3DNet
from scarceseg.types import Prompt

CASES = ["sammed3d_a", "sammed3d_patch16"]
TINY = SamMed3DConfig(
    img_size=32,
    patch_size=8,
    embed_dim=12,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    window_size=5,
    global_attn_indexes=(1,),
    prompt_embed_dim=48,
    mask_in_chans=16,
    iou_hidden_dim=8,
    decoder_mlp_dim=16,
)
SPACING = (1.0, 1.0, 1.0)


def published(shared: Path, case: str) -> tuple[SamMed3DNet, dict[str, torch.Tensor]]:
    folder = shared / "conformance" / "sammed3d"
    network = network_from_state(load_file(folder / f"{case}_state.safetensors"))
    with np.load(folder / f"{case}.npz") as arrays:
        return network.eval().requires_grad_(False), {name: torch.from_numpy(array) for name, array in arrays.items()}


def assert_close(value: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 2e-4 * float(expected.std(correction=0)) + 1e-5 if expected.numel() else 0.0
    torch.testing.assert_close(value, expected, rtol=0, atol=atol)


def upsampled(low_res: torch.Tensor) -> torch.Tensor:
    return F.interpolate(low_res, size=(32, 32, 32), mode="trilinear", align_corners=False)


def assert_same_mask(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for voxels that rounding alone decides."""
    differing = (logits > 0) != (expected != 0)
    assert not torch.any(logits[differing].abs() > 1e-4)


def tiny_network(seed: int = 0) -> SamMed3DNet:
    torch.manual_seed(seed)
    network = SamMed3DNet(TINY)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            is_gain = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(torch.randn(tensor.shape) * 0.3 + is_gain)
    return network


def tiny(**options: Any) -> SamMed3D:
    return SamMed3D(tiny_network(), **options)


def click(*places: tuple[float, ...], labels: list[int] | None = None) -> Prompt:
    return Prompt(torch.tensor(places), torch.tensor(labels or [1] * len(places)))


@pytest.mark.parametrize("case", CASES)
def test_embedding_and_positions_are_the_published_ones(shared: Path, case: str) -> None:
    network, arrays = published(shared, case)
    assert_close(network.image_encoder(arrays["volume"]), arrays["image_embedding"])
    assert_close(network.prompt_encoder.dense_code(), arrays["dense_pe"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompts", ["none", "clicks", "mask", "clicks_mask", "clicks_zero_mask"])
def test_answers_are_the_published_ones(shared: Path, case: str, prompts: str) -> None:
    network, arrays = published(shared, case)
    points, labels = (arrays["click_coords"], arrays["click_labels"]) if "clicks" in prompts else (None, None)
    mask = arrays["mask_input"] if prompts.endswith("mask") else None
    if prompts == "clicks_zero_mask":
        mask = torch.zeros_like(arrays["mask_input"])
    sparse, dense = network.prompt_encoder(points, labels, mask)
    assert_close(sparse, arrays[f"{prompts}_sparse"])
    if f"{prompts}_dense" in arrays:
        assert_close(dense, arrays[f"{prompts}_dense"])
    for multimask, name in ((False, "single"), (True, "multi")):
        if f"{prompts}_{name}_low_res" in arrays:
            low_res, iou = network(arrays["image_embedding"], points, labels, mask, multimask=multimask)
            assert_close(low_res, arrays[f"{prompts}_{name}_low_res"])
            assert_close(iou, arrays[f"{prompts}_{name}_iou"])


def test_every_published_answer_is_compared(shared: Path) -> None:
    """Guards the two conditions above: a renamed array must not silently skip a comparison."""
    _, arrays = published(shared, CASES[0])
    answers = {name for name in arrays if name.endswith("_low_res") and not name.startswith(("iter", "semisamplus"))}
    singles = {f"{p}_single_low_res" for p in ("none", "clicks", "mask", "clicks_mask", "clicks_zero_mask")}
    assert answers == singles | {"none_multi_low_res", "clicks_mask_multi_low_res"}
    assert {"none_dense", "mask_dense"} <= arrays.keys()


@pytest.mark.parametrize("case", CASES)
def test_accumulated_clicks_through_the_adapter_are_the_published_ones(shared: Path, case: str) -> None:
    network, arrays = published(shared, case)
    model = SamMed3D(network)
    size = (32, 32, 32)
    embedding = Embedding({"image": arrays["image_embedding"]}, size, Cube(size, size, 32))
    points, labels = arrays["click_coords"][0], arrays["click_labels"][0]
    answer: Masks | None = None
    for count in range(1, len(points) + 1):
        answer = model.segment(embedding, [Prompt(points[:count], labels[:count])], answer)
    assert answer is not None
    assert_close(answer.memory["low_res"], arrays["iter_accumulate_low_res"])
    assert_same_mask(answer.logits[:, None], arrays["iter_accumulate_sammed3d_mask"])


@pytest.mark.parametrize("case", CASES)
def test_latest_click_and_mask_styles_are_the_published_ones(shared: Path, case: str) -> None:
    network, arrays = published(shared, case)
    low_res = torch.zeros_like(arrays["mask_input"])
    for round_ in range(arrays["click_coords"].shape[1]):
        at = slice(round_, round_ + 1)
        clicks = arrays["click_coords"][:, at], arrays["click_labels"][:, at]
        low_res, _ = network(arrays["image_embedding"], *clicks, low_res)
    assert_close(low_res, arrays["iter_latest_low_res"])
    logits = upsampled(low_res)
    assert_close(logits, arrays["iter_latest_logits"])
    assert_same_mask(logits - 0.5, arrays["iter_latest_semisam_mask"])  # cut at a logit of 0.5, as published
    whole = F.interpolate(arrays["semisamplus_prob"], size=low_res.shape[2:], mode="nearest")
    assert torch.equal(whole, arrays["semisamplus_mask_input"])
    answer, _ = network(arrays["image_embedding"], mask=arrays["semisamplus_mask_input"])
    assert_close(answer, arrays["semisamplus_low_res"])
    assert_same_mask(upsampled(answer) - 0.5, arrays["semisamplus_mask"])


def test_the_published_layout_loads(shared: Path) -> None:
    layout = json.loads((shared / "conformance" / "sammed3d" / "layout_sammed3d_vit_b_ori.json").read_text())["tensors"]
    state = {name: torch.empty(tensor["shape"], device="meta") for name, tensor in layout.items()}
    assert SamMed3DConfig.from_state(state) == SamMed3DConfig()
    with torch.device("meta"):
        network = SamMed3DNet()
    network.load_state_dict(state, strict=True, assign=True)
    assert sum(p.numel() for p in network.parameters()) == 100_509_232
    assert network_from_state(state).config == SamMed3DConfig()


@pytest.mark.parametrize(("grid", "side"), [(3, 3), (2, 3), (3, 2)], ids=["global", "window above grid", "windows"])
def test_attention_is_the_written_out_one(grid: int, side: int) -> None:
    """A slow second version of the equation, one pair of tokens at a time, zeros of the windows included."""
    generator = torch.Generator().manual_seed(3)
    heads, dim, batch = 2, 6, 2
    attention = GridAttention(dim, heads, side).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(batch, grid, grid, grid, dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = _attend_slowly(attention, x.numpy(), heads, side)
        np.testing.assert_allclose(attention(x).numpy(), expected, rtol=1e-9, atol=1e-9)


def _attend_slowly(attention: GridAttention, x: np.ndarray, heads: int, side: int) -> np.ndarray:
    batch, grid, dim = x.shape[0], x.shape[1], x.shape[-1]
    width, whole = dim // heads, -(-grid // side) * side
    padded = np.zeros((batch, whole, whole, whole, dim))
    padded[:, :grid, :grid, :grid] = x
    names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "rel_pos_d", "rel_pos_h", "rel_pos_w")
    weight, bias, out, out_bias, rd, rh, rw = (attention.state_dict()[name].numpy() for name in names)
    answer = np.zeros_like(padded)
    corners = range(0, whole, side)
    for row, head in product(range(batch), range(heads)):
        for a, b, c in product(corners, corners, corners):
            tokens = padded[row, a : a + side, b : b + side, c : c + side]
            q, k, v = (
                (tokens @ weight.T + bias).reshape(side, side, side, 3, heads, width)[..., i, head, :] for i in range(3)
            )
            places = list(product(range(side), repeat=3))
            for i in places:
                scores = []
                for j in places:
                    score = q[i] @ k[j] / np.sqrt(width) + q[i] @ rd[i[0] - j[2] + side - 1]
                    score += q[i[0], i[1], j[0]] @ rh[i[1] - j[2] + side - 1]
                    scores.append(score + q[i[0], i[1], j[1]] @ rw[j[1] - j[2] + side - 1])
                share = np.exp(np.array(scores) - max(scores))
                mean = sum(s * v[j] for s, j in zip(share / share.sum(), places, strict=True))
                answer[row, a + i[0], b + i[1], c + i[2], head * width : (head + 1) * width] = mean
    return answer[:, :grid, :grid, :grid] @ out.T + out_bias


def test_sizes_are_read_from_the_tensors() -> None:
    assert SamMed3DConfig.from_state(tiny_network().state_dict()) == TINY


def test_files_of_both_kinds_give_the_same_answer(tmp_path: Path) -> None:
    state = tiny_network().state_dict()
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "wrapped.pth")
    save_file(state, tmp_path / "plain.safetensors")
    volume = torch.rand(1, 1, 20, 24, 28)
    answers = []
    for name in ("wrapped.pth", "plain.safetensors"):
        model = SamMed3D.from_file(tmp_path / name, name="mine", device="cpu", spacing_mm=None)
        assert model.name == "mine"
        answers.append(model.segment(model.embed(volume, SPACING), [click((3, 4, 5))]).logits)
    # Not bit for bit: some processors round differently where the weights lie elsewhere in memory.
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    direct = tiny(spacing_mm=None)
    expected = direct.segment(direct.embed(volume, SPACING), [click((3, 4, 5))]).logits
    torch.testing.assert_close(answers[0], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    whole = tiny_network().state_dict()
    path = tmp_path / "odd.safetensors"

    def refused(state: dict[str, torch.Tensor], message: str) -> None:
        save_file(state, path)
        with pytest.raises(DataError, match=message):
            SamMed3D.from_file(path)

    missing = "image_encoder.blocks.1.norm2.bias"
    refused({k: v for k, v in whole.items() if k != missing}, rf"1 tensors missing \({missing}\)")
    refused(whole | {"extra.weight": torch.zeros(1)}, r"1 tensors unexpected \(extra.weight\)")
    refused(whole | {missing: torch.zeros(5)}, r"another shape \(.*norm2.bias: expected \[12\], got \[5\]")
    refused({"some.weight": torch.zeros(2)}, "image_encoder.pos_embed is missing")
    refused(whole | {"image_encoder.pos_embed": torch.zeros(1, 4, 4, 3, 12)}, "one side E")
    (tmp_path / "text.pth").write_text("nothing", encoding="utf-8")
    with pytest.raises(DataError, match="text.pth"):
        SamMed3D.from_file(tmp_path / "text.pth")


def test_embeds_once_for_ten_prompts_and_stays_frozen() -> None:
    model = tiny()
    calls: list[int] = []
    model.network.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    embedding = model.embed(torch.rand(1, 1, 21, 17, 13), SPACING)
    for step in range(10):
        masks = model.segment(embedding, [click((step, step, step))])
        assert masks.logits.shape == (1, 21, 17, 13)
        assert not masks.logits.requires_grad
        assert 0 <= float(masks.quality) <= 1
    assert len(calls) == 1
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())


def test_a_batch_equals_its_rows() -> None:
    """Rows with other numbers of clicks, masks or no clicks do not change each other."""
    model = tiny(spacing_mm=None)
    size = (19, 26, 31)
    image = torch.rand(3, 1, *size)
    mask = torch.rand(size)
    prompts = [
        click((3, 4, 5)),
        click((1, 2, 3), (8, 9, 10), labels=[1, 0]),
        Prompt(mask=mask),
        Prompt(torch.tensor([[18, 25, 30]]), torch.tensor([1]), mask=mask),
    ]
    embedding = model.embed(image, SPACING).select([0, 1, 2, 2])
    together = model.segment(embedding, prompts)
    for row, prompt in enumerate(prompts):
        alone = model.segment(embedding.select([row]), [prompt])
        torch.testing.assert_close(together.logits[row : row + 1], alone.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.quality[row : row + 1], alone.quality, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.logits[2], together.logits[3], atol=1e-3)


@pytest.mark.parametrize(
    ("size", "spacing", "options"),
    [
        ((41, 33, 9), (0.7, 1.1, 4.0), {}),
        ((61, 45, 23), (1.0, 1.3, 2.9), {}),
        ((13, 31, 24), (1.0, 1.0, 1.0), {"spacing_mm": None}),
        ((51, 20, 37), (1.0, 1.0, 1.0), {"spacing_mm": None, "fit": "crop"}),
    ],
    ids=["fits", "shrunk", "own grid", "cut"],
)
def test_a_ball_painted_at_the_click_lies_at_the_clicked_voxel(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], spacing: tuple[float, float, float], options: Any
) -> None:
    """The decoder paints around the click it is told; back in the volume the ball must lie around the voxel clicked."""
    model = tiny(**options)
    radius = 2.5

    def paint(
        _embedding: torch.Tensor, points: torch.Tensor, _labels: torch.Tensor, mask: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        side = mask.shape[-1]
        centre = (points[:, -1] + 0.5) * side / TINY.img_size - 0.5
        grid = torch.stack(torch.meshgrid(*[torch.arange(side, dtype=torch.float32)] * 3, indexing="ij"))
        distance = (grid[None] - centre[:, :, None, None, None]).norm(dim=1, keepdim=True)
        return radius - distance, torch.ones(len(points), 1)

    monkeypatch.setattr(model.network, "forward", paint)
    embedding = model.embed(torch.rand(1, 1, *size), spacing)
    cube: Cube = embedding.frame
    scale = np.array(cube.resampled) / size  # voxels of the cube to a voxel of the volume
    low_res = TINY.img_size / (4 * TINY.grid)
    for part in ((0.5, 0.5, 0.5), (0.4, 0.62, 0.45), (0.55, 0.4, 0.6)):
        voxel = tuple(int(p * n) for p, n in zip(part, size, strict=True))
        mask = model.segment(embedding, [click(voxel)]).logits[0] > 0
        assert mask.shape == size
        assert mask[voxel]
        centroid = mask.nonzero().double().mean(0).numpy()
        room = radius * low_res / scale  # half extent of the ball in voxels of the volume
        whole = [v - r >= -0.5 and v + r <= n - 0.5 for v, r, n in zip(voxel, room, size, strict=True)]
        off = np.abs(centroid - voxel) * scale
        assert all(o < 0.6 for o, w in zip(off, whole, strict=True) if w), (voxel, centroid)
        if all(whole):
            wanted = 4 / 3 * np.pi * np.prod(room)
            assert 0.75 < float(mask.sum()) / wanted < 1.25
    assert any(whole)


@pytest.mark.parametrize(
    ("size", "side", "target"), [((21, 34, 9), 32, 1.5), ((70, 34, 20), 32, 1.0), ((33, 7, 32), 64, 0.8)]
)
def test_places_and_intensities_move_alike_and_come_back(size: tuple[int, int, int], side: int, target: float) -> None:
    """A volume that holds its own coordinates: the cube holds them at the moved places, and `take` brings them back."""
    cube = Cube.around(size, (0.9, 1.2, 2.1), side, target, "shrink")
    assert max(cube.resampled) <= side
    axes = [torch.arange(n, dtype=torch.float32) for n in size]
    ramps = torch.stack(torch.meshgrid(*axes, indexing="ij"))[:, None]
    inside = cube.put(ramps)
    back = cube.take(inside, -1.0)
    ratio = [n / m for n, m in zip(size, cube.resampled, strict=True)]
    for part in ((0.5, 0.5, 0.5), (0.31, 0.7, 0.4), (0.66, 0.35, 0.6)):
        voxel = torch.tensor([float(int(p * n)) for p, n in zip(part, size, strict=True)])
        place = cube.points(voxel[None])[0]
        for axis in range(3):
            low = int(place[axis])
            index = [round(float(p)) for p in place]
            values = []
            for step in (low, low + 1):
                index[axis] = step
                values.append(float(inside[axis, 0, index[0], index[1], index[2]]))
            at = float(place[axis]) - low
            assert values[0] * (1 - at) + values[1] * at == pytest.approx(float(voxel[axis]), abs=1e-3)
    margin = [int(np.ceil(r)) for r in ratio]
    inner = tuple(slice(m, n - m) for m, n in zip(margin, size, strict=True))
    for axis in range(3):
        if size[axis] > 2 * margin[axis]:
            torch.testing.assert_close(back[axis, 0][inner], ramps[axis, 0][inner], rtol=0, atol=1e-3)


def test_whatever_is_cut_off_is_outside() -> None:
    model = tiny(spacing_mm=None, fit="crop")
    embedding = model.embed(torch.rand(1, 1, 50, 20, 20), SPACING)
    logits = model.segment(embedding, [click((25, 10, 10))]).logits[0]
    assert torch.all(logits[:9] == -LOGIT_LIMIT)
    assert torch.all(logits[41:] == -LOGIT_LIMIT)
    assert not torch.any(logits[9:41] == -LOGIT_LIMIT)
    with pytest.raises(DataError, match=r"\(3.0, 10.0, 10.0\).*fit='shrink'"):
        model.segment(embedding, [click((3, 10, 10))])


def test_scale_and_shift_of_the_intensities_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 1, 24, 20, 28, generator=generator) * 300
    image[:, :, :6] = 0
    model = tiny()
    wanted = model.embed(image, SPACING).features["image"]
    scored = (image - image.mean()) / image.std()
    for other in (scored, image * 7 - 1024):
        torch.testing.assert_close(model.embed(other, SPACING).features["image"], wanted, rtol=1e-3, atol=1e-3)
    to_the_letter = tiny(foreground="above-zero")
    torch.testing.assert_close(to_the_letter.embed(image, SPACING).features["image"], wanted)
    assert not torch.allclose(to_the_letter.embed(scored, SPACING).features["image"], wanted, atol=1e-2)


def test_z_score_is_over_voxels_above_zero() -> None:
    cube = torch.zeros(2, 1, 4, 4, 4)
    values = torch.rand(2, 40) + 0.5
    cube.flatten(1)[:, :40] = values
    scored = z_score(cube)
    for row in range(2):
        mean, std = values[row].mean(), values[row].std()
        torch.testing.assert_close(scored[row].flatten()[:40], (values[row] - mean) / std)
        torch.testing.assert_close(scored[row].flatten()[40:], (-mean / std).expand(24))
    assert torch.equal(z_score(torch.full((1, 1, 3, 3, 3), 0.1)), torch.zeros(1, 1, 3, 3, 3))
    assert torch.equal(z_score(torch.zeros(1, 1, 3, 3, 3)), torch.zeros(1, 1, 3, 3, 3))
    constant = torch.stack([torch.rand(1, 3, 3, 3), torch.zeros(1, 3, 3, 3)]).requires_grad_()
    z_score(constant).square().sum().backward()
    assert constant.grad is not None and constant.grad.isfinite().all(), "one empty patch does not spoil the others"


def test_a_mask_prompt_becomes_logits_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(spacing_mm=None)
    seen: list[torch.Tensor] = []
    forward = model.network.forward

    def watch(*args: Any, **options: Any) -> Any:
        seen.append(args[3])
        return forward(*args, **options)

    monkeypatch.setattr(model.network, "forward", watch)
    embedding = model.embed(torch.rand(1, 1, 32, 32, 32), SPACING)
    mask = torch.zeros(32, 32, 32)
    mask[8:12, 20:24, 2:6] = 1
    mask[0:2, 0:2, 0:2] = 0.8
    answer = model.segment(embedding, [Prompt(mask=mask)])
    start = seen[0][0, 0]
    assert start.shape == (16, 16, 16)
    assert torch.all(start[4:6, 10:12, 1:3] == LOGIT_LIMIT)
    assert start[0, 0, 0] == pytest.approx(np.log(4), rel=1e-4)
    assert int((start > 0).sum()) == 9
    assert start.min() == -LOGIT_LIMIT
    model.segment(embedding, [Prompt(mask=mask)], answer)
    assert torch.equal(seen[1], answer.memory["low_res"])
    model.segment(embedding, [click((3, 3, 3))])
    assert torch.equal(seen[2], torch.zeros(1, 1, 16, 16, 16))


def test_clicks_are_taken_up_again() -> None:
    """A dialogue that is stored after its first round goes on as if it had never stopped; the memory matters."""
    model = tiny()
    embedding = model.embed(torch.rand(2, 1, 30, 25, 17), (1.0, 1.0, 2.0))
    first = [click((4, 5, 6)), click((20, 12, 8))]
    both = [click((4, 5, 6), (9, 9, 9), labels=[1, 0]), click((20, 12, 8), (2, 2, 2), labels=[1, 0])]
    start = model.segment(embedding, first)
    stored = Masks(start.logits, start.quality, {name: value.clone() for name, value in start.memory.items()})
    going_on = model.segment(embedding, both, start)
    assert torch.equal(tiny().segment(embedding, both, stored).logits, going_on.logits)
    assert not torch.allclose(model.segment(embedding, both).logits, going_on.logits, atol=1e-3)
    with pytest.raises(DataError, match="low_res"):
        model.segment(embedding, both, Masks(start.logits, start.quality))
    with pytest.raises(DataError, match=r"\[2, 1, 16, 16, 16\], got \[1, 1, 16, 16, 16\]"):
        model.segment(embedding, both, Masks(start.logits, start.quality, {"low_res": start.memory["low_res"][:1]}))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (click((5, 5, 20)), "lies outside the volume"),
        (click((-1, 5, 5)), "lies outside the volume"),
        (click((1, 1, 1), labels=[2]), "labels 1"),
        (Prompt(box_voxel=torch.tensor([[1, 1, 1], [4, 4, 4]])), "does not understand a box"),
        (Prompt(mask=torch.zeros(3, 3, 3)), "mask prompt: expected the volume's size"),
        (Prompt(), "empty prompt"),
    ],
)
def test_prompts_it_cannot_answer_are_refused(prompt: Prompt, message: str) -> None:
    model = tiny()
    embedding = model.embed(torch.rand(1, 1, 10, 11, 12), SPACING)
    with pytest.raises(DataError, match=message):
        model.segment(embedding, [prompt])


def test_images_it_cannot_take_are_refused() -> None:
    model = tiny()
    with pytest.raises(DataError, match="channel=0 to 2"):
        model.embed(torch.rand(1, 3, 8, 8, 8), SPACING)
    with pytest.raises(DataError, match="channel 3 was asked for"):
        tiny(channel=3).embed(torch.rand(1, 3, 8, 8, 8), SPACING)
    with pytest.raises(DataError, match=r"\[B, C, X, Y, Z\]"):
        model.embed(torch.rand(8, 8, 8), SPACING)
    with pytest.raises(DataError, match="not finite"):
        model.embed(torch.full((1, 1, 8, 8, 8), float("nan")), SPACING)


def test_the_chosen_channel_is_the_one_seen() -> None:
    image = torch.rand(1, 3, 16, 16, 16)
    chosen = tiny(channel=1).embed(image, SPACING).features["image"]
    assert torch.equal(chosen, tiny().embed(image[:, 1:2], SPACING).features["image"])


@pytest.mark.parametrize("option", [{"spacing_mm": 0.0}, {"fit": "stretch"}, {"foreground": "above"}])
def test_impossible_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        tiny(**option)
