"""SAM-Med3D opened for classes: what it starts from, against the published numbers, and patches of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import Strategy, Tuning
from scarceseg.foundation.load import load_foundation
from scarceseg.foundation.sam_med3d import z_score
from scarceseg.foundation.sam_med3d_tuned import SamMed3DModel, TunedSamMed3D, decode_all_tokens
from scarceseg.foundation.volume_tuning import LowRankQV
from scarceseg.functional.losses import segmentation_loss
from tests.foundation.small import noise
from tests.foundation.test_sam_med3d import CASES, TINY, assert_close, published, tiny_network, upsampled

STRATEGIES: list[Strategy] = ["lora", "decoder", "adapter"]
SIDE = TINY.img_size


def opened(
    strategy: Strategy = "lora", channels: int = 1, classes: int = 2, channel: int | None = None, seed: int = 0
) -> TunedSamMed3D:
    model = SamMed3DModel(tiny_network(seed), channel=channel)
    torch.manual_seed(4)
    return model.tunable(channels, classes, Tuning(strategy, 2), (SIDE, SIDE, SIDE))


def answer(tuned: TunedSamMed3D, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = tuned.eval()(image)
    return logits


def place(size: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a patch of this size lies in the cube."""
    return (slice(None), slice(None), *(slice((SIDE - n) // 2, (SIDE - n) // 2 + n) for n in size))


def centred(image: torch.Tensor) -> torch.Tensor:
    """The patch in the middle of the cube, 0 around it."""
    cube = torch.zeros(len(image), 1, SIDE, SIDE, SIDE)
    cube[place(image.shape[2:])] = image
    return cube


@pytest.mark.parametrize("case", CASES)
def test_all_tokens_without_prompts_are_the_published_masks(shared: Path, case: str) -> None:
    network, arrays = published(shared, case)
    logits = decode_all_tokens(network, arrays["image_embedding"])
    assert_close(logits[:, :1], arrays["none_single_low_res"])
    if "none_multi_low_res" in arrays:
        assert_close(logits[:, 1:], arrays["none_multi_low_res"])


def test_all_tokens_are_those_of_the_network() -> None:
    network = tiny_network()
    embedding = network.image_encoder(noise((SIDE,) * 3, 2))
    logits = decode_all_tokens(network, embedding)
    single, multiple = (network(embedding, multimask=flag)[0] for flag in (False, True))
    torch.testing.assert_close(logits, torch.cat([single, multiple], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "fitting"), [((SIDE,) * 3,) * 2, ((13, 32, 9),) * 2, ((40, 13, 9), (32, 10, 7))])
def test_at_the_start_a_class_is_the_mask_without_prompts(
    strategy: Strategy, size: tuple[int, int, int], fitting: tuple[int, int, int]
) -> None:
    """With as many tokens as SAM-Med3D has, and its own in place of the copies, the decoder is the published one."""
    network, tuned, image = tiny_network(), opened(strategy, classes=4), noise(size, 2)
    with torch.no_grad():
        first = answer(tuned, image)
        tuned.network.mask_decoder.mask_tokens.load_state_dict(network.mask_decoder.mask_tokens.state_dict())
        heads = network.mask_decoder.output_hypernetworks_mlps
        tuned.network.mask_decoder.output_hypernetworks_mlps.load_state_dict(heads.state_dict())
        above = image - image.amin((1, 2, 3, 4), keepdim=True)
        shrunk = F.interpolate(above, fitting, mode="trilinear", align_corners=False)
        embedding = network.image_encoder(z_score(centred(shrunk)))
        low_res = decode_all_tokens(network, embedding)
    expected = F.interpolate(upsampled(low_res)[place(fitting)], size, mode="trilinear", align_corners=False)
    torch.testing.assert_close(answer(tuned, image), expected, rtol=1e-4, atol=1e-4)
    assert not first[:, 0].any(), "the background starts at 0"
    torch.testing.assert_close(first[:, 2:], first[:, 1:2].expand(-1, 2, -1, -1, -1))
    assert first[:, 1].std() > 1e-3


def test_low_rank_changes_queries_and_values_alone() -> None:
    weight, x = torch.randn(12, 4), torch.randn(5, 4)
    low_rank = LowRankQV(weight, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(low_rank(weight), weight)
    with torch.no_grad():
        low_rank.q.b.normal_()
        low_rank.v.b.normal_()
    q, k, v = F.linear(x, weight).chunk(3, -1)
    changed = F.linear(x, low_rank(weight)).chunk(3, -1)
    torch.testing.assert_close(changed[0], q + F.linear(F.linear(x, low_rank.q.a), low_rank.q.b))
    torch.testing.assert_close(changed[1], k)
    torch.testing.assert_close(changed[2], v + F.linear(F.linear(x, low_rank.v.a), low_rank.v.b))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_state_holds_published_names_and_what_was_added(strategy: Strategy) -> None:
    state = opened(strategy, channels=2, classes=3).tuned_state()
    encoder = {name for name in state if name.startswith("image_encoder.")}
    if strategy == "lora":
        parts = [f"{third}.{factor}" for third in "qv" for factor in "ab"]
        assert encoder == {f"image_encoder.blocks.{i}.attn.qkv.lora.{part}" for i in range(2) for part in parts}
    elif strategy == "adapter":
        parts = [f"{layer}.{value}" for layer in ("down", "up") for value in ("weight", "bias")]
        places = [f"blocks.{i}.{place}" for i in range(2) for place in ("attn.proj", "mlp")]
        assert encoder == {f"image_encoder.{place}.adapter.{part}" for place in places for part in parts}
    else:
        assert not encoder
    rest = {name for name in state.keys() - encoder if not name.startswith("mask_decoder.")}
    assert rest == {"channel_mix.weight", "prompt_encoder.no_mask_embed.weight"}
    known = tiny_network().state_dict()
    renamed = ("mask_tokens", "output_hypernetworks_mlps")
    decoder = {name for name in state if name.startswith("mask_decoder.") and not any(r in name for r in renamed)}
    assert decoder and all(state[name].shape == known[name].shape for name in decoder)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_everything_that_is_tuned(strategy: Strategy) -> None:
    tuned = opened(strategy, channels=2, classes=3).train()
    with torch.no_grad():  # away from the zeros that additions start with
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    label = torch.randint(3, (1, 9, 20, 14), generator=torch.Generator().manual_seed(0))
    segmentation_loss(tuned(noise((9, 20, 14), 1, 2)), label).backward()
    for name, parameter in tuned.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # a bias of keys shifts all scores of a query alike: its gradient is rounding
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, name


@pytest.mark.parametrize("size", [(1, 5, 3), (33, 32, 31), (70, 9, 40)])
def test_patches_of_any_size_come_out_as_they_went_in(size: tuple[int, int, int]) -> None:
    logits = answer(opened(classes=3), noise(size, 2))
    assert logits.shape == (2, 3, *size) and torch.isfinite(logits).all()


def test_the_scale_of_the_intensities_does_not_matter() -> None:
    tuned, image = opened(channels=2), noise((13, 9, 11), 1, 2)
    torch.testing.assert_close(answer(tuned, 30 * image - 7), answer(tuned, image), rtol=1e-3, atol=1e-3)


def test_channels_start_as_their_mean_or_as_the_one_that_was_chosen() -> None:
    image, one = noise((13, 9, 11), 1, 2), opened()
    mean = answer(opened(channels=2), image)
    torch.testing.assert_close(mean, answer(one, image.mean(1, keepdim=True)), rtol=1e-4, atol=1e-4)
    second = answer(opened(channels=2, channel=1), image)
    torch.testing.assert_close(second, answer(one, image[:, 1:]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no channel 2"):
        opened(channels=2, channel=2)
    with pytest.raises(DataError, match="opened for"):
        opened(channels=2)(image[0])


def test_a_file_of_weights_is_tunable(tmp_path: Path) -> None:
    path = tmp_path / "med.safetensors"
    save_file(tiny_network().state_dict(), path)
    model = load_foundation(path)
    assert isinstance(model, SamMed3DModel) and model.sees == "patch"
