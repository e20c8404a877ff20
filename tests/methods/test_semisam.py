"""SemiSAM: what is asked, what of it reaches the student, and what the gate lets through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scarceseg.errors import ConfigError
from scarceseg.foundation.base import Embedding, Masks, Promptable
from scarceseg.foundation.dialogue import Asking, converse, first_prompts
from scarceseg.functional.reliability import mask_gate, merge_masks, soft_dice, voxel_gate
from scarceseg.methods import build_terms
from scarceseg.methods.proven_masks import ProvenMasks
from scarceseg.methods.semisam import SemiSam, need
from scarceseg.types import Labelled, Step, Unlabelled
from tests.foundation.small import noise, small_net, small_sam
from tests.foundation.stub import Stub
from tests.reference.semisam import semisam

SIZE = (12, 10, 8)
PAPER = {"gate": False, "prompts": ["point"], "clicks": 1}
CENTRES = {1: (4, 5, 4), 2: (9, 5, 4)}


def ball(centre: tuple[int, int, int], radius: float = 2.5) -> torch.Tensor:
    axes = torch.meshgrid(*(torch.arange(n) for n in SIZE), indexing="ij")
    return sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True)) <= radius**2


def logits_of(*rows: dict[int, float], classes: int = 2) -> torch.Tensor:
    """For each row the classes it shows as balls, with how sure the student is of them (a logit)."""
    logits = torch.zeros(len(rows), classes, *SIZE)
    logits[:, 0] = 6.0
    for row, shown in enumerate(rows):
        for value, sure in shown.items():
            logits[row, value][ball(CENTRES[value])] = 6.0 + sure
    return logits.requires_grad_()


def step_of(logits_u: torch.Tensor, iteration: int = 0, seed: int = 0) -> Step:
    classes, rows = logits_u.shape[1], len(logits_u)
    image = noise(SIZE, rows, seed=seed)
    return Step(
        iteration=iteration,
        total=100,
        labelled=Labelled(noise(SIZE), torch.zeros(1, *SIZE, dtype=torch.long), ("l",)),
        unlabelled=Unlabelled(image, tuple(f"u{i}" for i in range(rows))),
        logits_l=torch.zeros(1, classes, *SIZE),
        logits_u=logits_u,
        generator=torch.Generator().manual_seed(seed),
    )


def term_of(*models: Promptable, classes: int = 2, **options: Any) -> SemiSam:
    term = build_terms("semisam", {"semisam": options}, classes)["semisam"]
    assert isinstance(term, SemiSam)
    term.consult(models, (1.0, 1.0, 1.0))
    return term


def gradient(term: SemiSam, step: Step) -> torch.Tensor:
    assert step.logits_u is not None
    step.logits_u.grad = None
    term.loss(step).backward()
    assert step.logits_u.grad is not None
    return step.logits_u.grad


def test_without_a_gate_it_is_the_papers_mean_over_all_classes() -> None:
    target = ball((5, 5, 4), 3).float()
    logits = logits_of({1: 2.0}, {1: 1.0})
    value = term_of(Stub(target), **PAPER).loss(step_of(logits))
    both = torch.stack([1 - target, target])
    expected = (logits.softmax(1) - both).square().mean()
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


class Tables(Stub):
    """Another fixed answer for every row and class, which it knows by the patch's mean and by where the click lies."""

    def __init__(self, image: torch.Tensor, classes: int, quality: float) -> None:
        super().__init__(quality=quality)
        self.means = image.flatten(1).mean(1)
        draw = torch.Generator().manual_seed(3)
        self.answers = 0.02 + 0.96 * torch.rand(len(image), classes - 1, *SIZE, generator=draw)

    def segment(self, embedding: Embedding, prompts: Any, previous: Masks | None = None) -> Masks:
        masks = []
        for mean, prompt in zip(embedding.features["mean"], prompts, strict=True):
            (row,) = (self.means == mean).nonzero().flatten().tolist()
            place = tuple(prompt.points_voxel[0].long().tolist())
            (value,) = (value for value in CENTRES if ball(CENTRES[value])[place])
            masks.append(self.answers[row, value - 1])
        return Masks(torch.logit(torch.stack(masks)), torch.full((len(masks),), self.quality))


@pytest.mark.parametrize("gate", [True, False])
def test_every_answer_reaches_its_own_row_and_class(gate: bool) -> None:
    logits = logits_of({2: 4.0}, {1: 3.0, 2: 4.0}, {}, {1: 2.0}, classes=4)
    step = step_of(logits)
    assert step.unlabelled is not None
    model = Tables(step.unlabelled.image, 4, quality=0.2)
    term = term_of(model, classes=4, prompts=["point"], clicks=1, gate=gate, agreement=(0.0, 0.9), proof=(0.0, 0.0))
    answers = {key: model.answers[key].numpy() for key in ((0, 1), (1, 0), (1, 1), (3, 0))}
    limits = {"low": 0.0, "high": 0.9, "sure": 0.3, "doubt": term.options.doubt} if gate else None
    expected = semisam(logits.detach().numpy(), answers, 0.2, limits)
    assert float(term.loss(step).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gate", [True, False])
def test_a_step_down_the_gradient_moves_the_student_towards_the_models_mask(gate: bool) -> None:
    target = ball((6, 5, 4), 3).float()
    logits = logits_of({1: 1.0})
    term = term_of(Stub(target), gate=gate)
    slope = gradient(term, step_of(logits))
    with torch.no_grad():
        before, after = logits.softmax(1)[0, 1], (logits - 1000 * slope).softmax(1)[0, 1]
    wanted = (target > 0.5) & ~ball(CENTRES[1])
    surplus = (target < 0.5) & ball(CENTRES[1])
    assert wanted.any() and surplus.any()
    assert (after[wanted] > before[wanted]).all()
    assert (after[surplus] < before[surplus]).all()


def test_foreground_is_asked_for_and_never_the_background() -> None:
    model = Stub()
    term_of(model, classes=3, **PAPER).loss(step_of(logits_of({1: 4.0, 2: 4.0}, {2: 4.0}, classes=3)))
    ((_, prompts),) = model.asked
    assert len(prompts) == 3
    for value, prompt in zip((1, 2, 2), prompts, strict=True):
        assert prompt.points_voxel is not None
        assert ball(CENTRES[value])[tuple(prompt.points_voxel.long().T)].all()
    assert all((prompt.point_labels == 1).all() for prompt in prompts)


def test_each_row_is_asked_about_its_own_image() -> None:
    model = Stub()
    step = step_of(logits_of({1: 4.0}, {}, {1: 4.0}))
    term_of(model, **PAPER).loss(step)
    (means, _), assert_image = model.asked[0], step.unlabelled
    assert assert_image is not None
    assert torch.equal(means, assert_image.image.flatten(1).mean(1)[[0, 2]])
    assert len(model.embedded) == 1 and len(model.embedded[0]) == 2  # one batch, and no row that nothing is asked about


def test_classes_share_one_embedding_of_a_row() -> None:
    model = Stub()
    term_of(model, classes=3, **PAPER).loss(step_of(logits_of({1: 4.0, 2: 4.0}, classes=3)))
    assert [len(image) for image in model.embedded] == [1]


def test_an_empty_prediction_gives_no_prompt_and_no_loss() -> None:
    model = Stub()
    logits = logits_of({}, {})
    term = term_of(model)
    slope = gradient(term, step_of(logits))
    assert not model.asked and not model.embedded
    assert float(term.loss(step_of(logits)).detach()) == 0 and not slope.any()
    assert term.numbers() == {"asked": 0, "agreement": 0, "quality": 0, "gate": 0}


def test_a_class_the_student_does_not_find_is_left_alone() -> None:
    logits = logits_of({1: 4.0}, classes=3)
    opinion = term_of(Stub(), classes=3, **PAPER).opinion(
        noise(SIZE), logits.detach().softmax(1)[:, 1:], torch.Generator()
    )
    assert opinion.asked.tolist() == [[True, False]]
    assert not opinion.weight[:, 1].any() and opinion.weight[:, 0].any()


def test_masks_that_claim_the_same_voxel_are_merged() -> None:
    masks = torch.tensor([0.9, 0.8, 0.6]).reshape(1, 3, 1, 1, 1)
    asked = torch.tensor([[True, True, False]])
    merged = merge_masks(masks, asked).flatten()
    odds = torch.tensor([9.0, 4.0, 0.0])
    torch.testing.assert_close(merged, odds / (1 + odds.sum()))
    alone = merge_masks(masks[:, :1], asked[:, :1])
    torch.testing.assert_close(alone, masks[:, :1])


def test_the_gate_closes_for_a_mask_that_has_nothing_to_do_with_the_students() -> None:
    far = ball((10, 8, 6), 1.5).float()
    logits = logits_of({1: 4.0})
    assert not gradient(term_of(Stub(far)), step_of(logits)).any()
    assert gradient(term_of(Stub(far), gate=False), step_of(logits)).any()


def test_the_gate_closes_for_a_mask_the_model_itself_thinks_little_of() -> None:
    target = ball((5, 5, 4), 3).float()
    logits = logits_of({1: 4.0})
    assert not gradient(term_of(Stub(target, quality=0.0)), step_of(logits)).any()
    assert gradient(term_of(Stub(target, quality=0.9)), step_of(logits)).any()


def test_gate_factors() -> None:
    alike = torch.tensor([0.1, 0.35, 0.8])
    best = torch.ones(3)
    torch.testing.assert_close(mask_gate(alike, best, (0.2, 0.5), (0, 0.3)), torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(mask_gate(best, alike, (0.2, 0.5), (0, 0.7)), torch.tensor([1 / 7, 0.5, 1.0]))
    one, half = torch.tensor(1.0), torch.tensor(0.5)
    none = torch.tensor(0.0)
    assert float(voxel_gate(half, one, none, 1.0)) == 1  # the model sure, the student not
    assert float(voxel_gate(one, one, none, 1.0)) == 0  # both sure
    assert float(voxel_gate(half, half, none, 1.0)) == 0  # neither
    assert float(voxel_gate(half, one, torch.tensor(0.25), 1.0)) == 0  # answers contradict each other
    torch.testing.assert_close(voxel_gate(one, one, none, 0.8), torch.tensor(0.2))
    p, s = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    expected = [2 * float((a * b).sum()) / float((a + b).sum()) for a, b in zip(p, s, strict=True)]
    torch.testing.assert_close(soft_dice(p, s), torch.tensor(expected))


def labelled_step(logits_u: torch.Tensor, found: dict[int, float], there: tuple[int, ...]) -> Step:
    """A step whose labelled row has the structures `there`, of which the student shows those in `found`."""
    label = torch.zeros(1, *SIZE, dtype=torch.long)
    for value in there:
        label[0][ball(CENTRES[value])] = value
    step = step_of(logits_u)
    logits_l = logits_of(found, classes=logits_u.shape[1]).detach()
    return replace(step, labelled=replace(step.labelled, label=label), logits_l=logits_l)


def test_with_several_classes_masks_count_as_they_prove_on_labelled_rows() -> None:
    logits = logits_of({1: 4.0}, classes=3)
    seen = {1: 6.0}
    good, large = Stub(ball(CENTRES[1], 2.5).float()), Stub(ball(CENTRES[1], 5).float())
    assert gradient(term_of(good, classes=3), labelled_step(logits, seen, (1,))).any()
    assert not gradient(term_of(large, classes=3), labelled_step(logits, seen, (1,))).any()
    assert gradient(term_of(large, classes=3, proof=(0.0, 0.0)), labelled_step(logits, seen, (1,))).any()
    assert gradient(term_of(large, classes=3, gate=False), labelled_step(logits, seen, (1,))).any()
    assert not gradient(term_of(good, classes=3), labelled_step(logits, {}, (1,))).any()  # nothing was asked there
    asked = len(large.asked)
    gradient(term_of(large, classes=3), labelled_step(logits, seen, (1,)))
    assert len(large.asked) == asked + 1  # on the labelled row alone: its masks would count for nothing
    assert term_of(Stub()).proven is None  # nothing else's place to take


def test_labelled_rows_are_looked_at_each_tenth_time() -> None:
    model = Stub(ball(CENTRES[1], 2.5).float())
    term = term_of(model, classes=3, every=2, prompts=["point"], clicks=1)
    asked = []
    for iteration in range(42):
        before = len(model.asked)
        term.loss(replace(labelled_step(logits_of({1: 4.0}, classes=3), {1: 6.0}, (1,)), iteration=iteration))
        asked.append(len(model.asked) - before)
    assert [number for number, count in enumerate(asked) if count == 2] == [0, 20, 40]
    assert [number for number, count in enumerate(asked) if count] == list(range(0, 42, 2))
    assert term.numbers() == {} or 0 < term.numbers()["proof_1"] <= 1


def test_masks_are_proven_on_labelled_rows() -> None:
    proven = ProvenMasks(3)
    assert proven.dice().tolist() == [0, 0, 0]
    label = torch.tensor([1, 1, 2, 2, 0, 255]).reshape(1, 6, 1, 1)
    masks = torch.tensor([[1.0, 1, 0.5, 0, 0, 1], [0, 0, 0.5, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).reshape(1, 3, 6, 1, 1)
    proven.see(masks, torch.tensor([[True, True, False]]), label)
    expected = torch.tensor([2 * 2 / (2.5 + 2), 2 * 0.5 / (0.5 + 2), 0.0])  # 255 does not count, nor what was not asked
    torch.testing.assert_close(proven.dice(), expected)
    proven.see(torch.zeros_like(masks), torch.tensor([[False, True, True]]), label)
    expected = torch.tensor([expected[0], 2 * 0.9 * 0.5 / (0.9 * 0.5 + 0.9 * 2 + 2), 0.0])
    torch.testing.assert_close(proven.dice(), expected)
    other = ProvenMasks(3)
    other.load_state_dict(proven.state_dict())
    assert torch.equal(other.dice(), proven.dice())


def test_the_more_labels_the_less_a_model_is_needed() -> None:
    assert [need(labelled, 4) for labelled in (1, 2, 4, 8, 16)] == [3, 2, 1, 0, 0]
    assert [need(labelled, 1) for labelled in (1, 2)] == [1, 0]
    assert need(6, 4) == need(6, 4, pool=True) == pytest.approx(0.4150375)  # log2(8 / 6)
    assert [need(labelled, 4, pool=True) for labelled in (1, 2, 4, 8)] == [1, 1, 1, 0]


def test_the_weight_of_tuned_models_stays_and_that_of_others_falls() -> None:
    stub = Stub(ball((5, 5, 4), 3).float())
    term = term_of(stub)
    assert [term.weight(t, 100) for t in (0, 100)] == pytest.approx([1.0, math.exp(-5)])
    term.consult([stub], (1.0, 1.0, 1.0), tuned=True)
    assert [term.weight(t, 100) for t in (0, 100)] == [1.0, 1.0]
    term = term_of(stub, ramp="semisam-down", weight=0.1)
    term.consult([stub], (1.0, 1.0, 1.0), tuned=True)
    assert [term.weight(t, 100) for t in (0, 100)] == pytest.approx([0.1, 0.1 * math.exp(-5)])


@pytest.mark.parametrize(
    ("method", "labelled", "options", "factor"),
    [
        ("ua-mt+semisam", 1, {}, 3),
        ("acmt+semisam", 2, {}, 2),
        ("mean-teacher+semisam", 1, {"enough": None}, 1),
        ("mean-teacher+semisam", 8, {"enough": None}, 1),
        ("mean-teacher+semisam", 8, PAPER, 1),
        ("mean-teacher+sfr+semisam", 1, {}, 1),
        ("mean-teacher+atlas+semisam", 1, {}, 1),
        ("semisam+self-training", 6, {}, 0.415037),
    ],
)
def test_a_run_multiplies_the_loss_by_the_need(method: str, labelled: int, options: Any, factor: float) -> None:
    target = ball((5, 5, 4), 3).float()

    def slope(term: SemiSam) -> torch.Tensor:
        return gradient(term, step_of(logits_of({1: 4.0})))

    once, term = term_of(Stub(target), **options), term_of(Stub(target), **options)
    config = SimpleNamespace(method=method)
    term.initialise(
        torch.nn.Identity(),
        SimpleNamespace(  # type: ignore[arg-type]
            config=config,
            labelled=range(labelled),
            plan=SimpleNamespace(spacing_mm=(1.0, 1.0, 1.0)),
            foundation_of=lambda _: "stub",
            model=lambda _: Stub(target),
            warnings=[],
        ),
    )
    assert slope(once).any()
    torch.testing.assert_close(slope(term), factor * slope(once))


def test_from_twice_as_many_labels_on_nothing_is_asked() -> None:
    class Deaf(Stub):
        def segment(self, *_: Any) -> Any:
            raise AssertionError("asked")

    term = term_of(Deaf(ball((5, 5, 4), 3).float()))
    for labelled in (8, 16):
        term.consult([Deaf(ball((5, 5, 4), 3).float())], (1.0, 1.0, 1.0), need(labelled, 4))
        step = step_of(logits_of({1: 4.0}))
        state = step.generator.get_state()
        assert not gradient(term, step).any() and torch.equal(step.generator.get_state(), state)
        assert not term.numbers() and term.picture() is None
        assert term.conclude([{"iteration": 0}]) is None  # it was said before the training
    term.consult([Deaf(ball((5, 5, 4), 3).float())], (1.0, 1.0, 1.0), need(7, 4))
    with pytest.raises(AssertionError, match="asked"):
        gradient(term, step_of(logits_of({1: 4.0})))


@pytest.mark.parametrize("view", ["slices", "mosaic", "volume", "sam-med3d"])
def test_models_are_asked_in_full_precision_under_autocast(view: str) -> None:
    from scarceseg.foundation.sam_med3d_tuned import SamMed3DModel
    from scarceseg.foundation.sam_volume import SamPromptable
    from scarceseg.foundation.tiny_sam3d import TinySam3D
    from tests.foundation.test_sam_med3d import tiny_network

    models: dict[str, Callable[[], Promptable]] = {
        "volume": lambda: TinySam3D(small_net(), longest=16),
        "sam-med3d": lambda: SamMed3DModel(tiny_network()),
    }
    model = models[view]() if view in models else SamPromptable(small_sam()).seen_as(view)
    prompts = ["uncertainty", *(["mask"] if "mask" in model.prompt_kinds else [])]
    term = term_of(model, prompts=prompts, gate=False)
    term.consult([model], (1.5, 1.5, 2.0))  # its grid is not the patch's
    logits = torch.full((1, 2, *SIZE), 0.0)
    logits[:, 1] = 12 * ball((1, 5, 4), 3) - 6.0  # touches a face of the patch
    step = replace(step_of(logits_of({})), unlabelled=Unlabelled(noise(SIZE), ("u",)), logits_u=logits.requires_grad_())
    exact = term.loss(step)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = term.loss(replace(step, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(rounded, exact, rtol=0.2, atol=1e-3)
    torch.autograd.backward(rounded)
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.any()


def test_corrections_are_about_the_piece_that_was_asked_about() -> None:
    probability = (ball((3, 4, 4), 2.5) | ball((10, 8, 6), 1.5)).float() * 0.98
    model = Stub(ball((3, 4, 4), 2.5).float())  # answers with the piece it was asked about
    embedding = model.embed(noise(SIZE), (1.0, 1.0, 1.0))
    for components, clicks in (("largest", 1), ("all", 2)):
        asking = Asking(kinds=("point",), corrections=1, components=components)  # type: ignore[arg-type]
        prompts = first_prompts(probability, replace(asking, components="largest"), (1.0, 1.0, 1.0))
        answers = converse(model, embedding, [0], probability[None], [prompts], asking, (1.0, 1.0, 1.0))
        (prompt,) = answers.prompts
        assert prompt.points_voxel is not None and len(prompt.points_voxel) == clicks


def test_answers_to_single_clicks_that_differ_count_less() -> None:
    logits = logits_of({1: 4.0})
    foreground = logits.detach().softmax(1)[:, 1:]
    options = {"prompts": ["uncertainty"], "clicks": 2, "gate": False}
    opinion = term_of(Stub(radius=2.0), **options).opinion(noise(SIZE), foreground, torch.Generator().manual_seed(0))
    mean, weight = opinion.probability[0, 0], opinion.weight[0, 0]
    disputed = (mean > 0.4) & (mean < 0.6)
    assert disputed.any()
    torch.testing.assert_close(weight[disputed], torch.zeros(int(disputed.sum())), atol=1e-2, rtol=0)
    torch.testing.assert_close(weight[~disputed], torch.ones(int((~disputed).sum())), atol=1e-2, rtol=0)


def test_several_models_are_averaged_by_their_weights() -> None:
    near, far = ball((5, 5, 4), 3).float(), ball((10, 8, 6), 1.5).float()
    foreground = logits_of({1: 4.0}).detach().softmax(1)[:, 1:]
    generator = torch.Generator()
    both = term_of(Stub(near), Stub(far), **PAPER).opinion(noise(SIZE), foreground, generator)
    torch.testing.assert_close(both.probability[0, 0], (near + far) / 2, atol=2e-4, rtol=0)
    gated = term_of(Stub(near), Stub(far)).opinion(noise(SIZE), foreground, generator)
    alone = term_of(Stub(near)).opinion(noise(SIZE), foreground, generator)
    counted = gated.weight > 0
    torch.testing.assert_close(gated.weight, alone.weight / 2)
    torch.testing.assert_close(gated.probability[counted], alone.probability[counted])


def test_every_few_iterations() -> None:
    model = Stub()
    term = term_of(model, every=3)
    logits = logits_of({1: 4.0})
    silent = [not gradient(term, step_of(logits, iteration)).any() for iteration in range(7)]
    assert silent == [False, True, True, False, True, True, False]
    assert len(model.asked) == 3


def test_a_patch_that_comes_again_is_not_embedded_again() -> None:
    model = Stub()
    term = term_of(model, remember=4)
    step = step_of(logits_of({1: 4.0}, {1: 3.0}))
    first = term.loss(step)
    again = term.loss(replace(step, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(first, again) and len(model.embedded) == 1
    assert step.unlabelled is not None
    mixed = torch.cat([noise(SIZE, 1, seed=9), step.unlabelled.image[:1]])
    term.loss(replace(step, unlabelled=replace(step.unlabelled, image=mixed)))
    assert [len(image) for image in model.embedded] == [2, 1]
    assert torch.allclose(model.asked[-1][0].sort().values, mixed.flatten(1).mean(1).repeat_interleave(3).sort().values)
    term_of(Stub(), remember=0).loss(step)


def test_patches_remembered_from_different_steps_keep_their_own_answers() -> None:
    """Whatever a model keeps in the frame belongs to one batch; parts of two batches are not put together."""

    class Framed(Stub):
        """Its embedding is a number into what the frame keeps, as that of slices is."""

        def embed(self, image: torch.Tensor, spacing_mm: Any) -> Embedding:
            made = super().embed(image, spacing_mm)
            return Embedding({"row": torch.arange(len(image))}, made.size, tuple(made.features["mean"].tolist()))

        def segment(self, embedding: Embedding, prompts: Any, previous: Any = None) -> Masks:
            mean = torch.tensor([embedding.frame[row] for row in embedding.features["row"].tolist()])
            return super().segment(Embedding({"mean": mean}, embedding.size), prompts, previous)

    model = Framed()
    term = term_of(model, remember=8)
    step = step_of(logits_of({1: 4.0}, {1: 3.0}))
    assert step.unlabelled is not None
    patches = [noise(SIZE, 1, seed=seed) for seed in range(4)]
    for first, second in ((0, 1), (2, 3), (0, 2)):
        image = torch.cat([patches[first], patches[second]])
        term.loss(replace(step, unlabelled=replace(step.unlabelled, image=image)))
        assert sorted(set(model.asked[-1][0].tolist())) == sorted(image.flatten(1).mean(1).tolist())


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        ({"prompt_kinds": frozenset({"point", "mask"})}, {"prompts": ["box"]}, "box"),
        ({"prompt_kinds": frozenset({"box"})}, {"prompts": ["uncertainty"]}, "point"),
        ({"channels": frozenset({1})}, {}, "channel"),
        ({}, {"channel": 3}, "channel"),
    ],
)
def test_what_the_model_cannot_be_asked_is_told_before_training(
    model: dict[str, Any], options: dict[str, Any], word: str
) -> None:
    stub = Stub()
    for key, value in model.items():
        setattr(stub, key, value)
    term = term_of(stub, **options)
    with pytest.raises(ConfigError, match=word):
        term._check(stub, "stub", 3)


def test_the_models_are_shown_the_chosen_channel() -> None:
    model = Stub()
    term = term_of(model, channel=1)
    image = torch.cat([noise(SIZE, 1, seed=3), noise(SIZE, 1, seed=4)], 1)
    step = step_of(logits_of({1: 4.0}))
    assert step.unlabelled is not None
    term.loss(replace(step, unlabelled=replace(step.unlabelled, image=image)))
    assert torch.equal(model.embedded[0], image[:, 1:])


def test_a_dense_prompt_is_given_once_and_then_the_model_corrects_its_own_answer() -> None:
    model = Stub(ball(CENTRES[1], 1.5).float())
    term_of(model, gate=False, prompts=["mask", "point"], clicks=1, corrections=2).loss(step_of(logits_of({1: 4.0})))
    assert [prompts[0].mask is not None for _, prompts in model.asked] == [True, False, False]
    right = Stub(echo=True)
    term_of(right, gate=False, prompts=["mask"], corrections=1).loss(step_of(logits_of({1: 4.0})))
    assert all(prompts[0].mask is not None for _, prompts in right.asked), (
        "an answer as wished is asked for again as it was"
    )


def test_corrections_are_clicked_where_the_answer_differs_from_the_student() -> None:
    model = Stub(ball(CENTRES[1], 1.5).float())
    term_of(model, gate=False, prompts=["point"], clicks=1, corrections=2).loss(step_of(logits_of({1: 4.0})))
    assert [len(prompts[0].points_voxel) for _, prompts in model.asked] == [1, 2, 3]  # type: ignore[arg-type]
    last = model.asked[-1][1][0]
    assert last.points_voxel is not None and last.point_labels is not None
    for place, label in zip(last.points_voxel[1:].long(), last.point_labels[1:], strict=True):
        assert bool(ball(CENTRES[1])[tuple(place)]) == bool(label)
        assert not bool(ball(CENTRES[1], 1.5)[tuple(place)])


def test_a_box_and_a_mask_go_into_the_same_prompt() -> None:
    model = Stub()
    term_of(model, prompts=["point", "box", "mask"]).loss(step_of(logits_of({1: 4.0})))
    ((_, (prompt,)),) = model.asked
    assert prompt.points_voxel is not None and prompt.mask is not None and prompt.box_voxel is not None
    inside = ball(CENTRES[1]).nonzero()
    assert (prompt.box_voxel[0] <= inside.amin(0)).all() and (prompt.box_voxel[1] >= inside.amax(0)).all()


def test_the_models_weights_are_no_state_and_get_no_gradient() -> None:
    from scarceseg.foundation.tiny_sam3d import TinySam3D
    from tests.foundation.small import small_net

    network = small_net()
    term = term_of(TinySam3D(network, longest=16))
    size = (16, 16, 16)
    logits = torch.zeros(1, 2, *size)
    logits[:, 1, 4:12, 4:12, 4:12] = 3.0
    logits.requires_grad_()
    step = replace(step_of(logits_of({})), unlabelled=Unlabelled(noise(size), ("u",)), logits_u=logits)
    term.loss(step).backward()
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert not term.state_dict() and not list(term.parameters())


def test_a_2d_sam_sees_the_patch_as_a_mosaic() -> None:
    from scarceseg.foundation.sam_volume import SamPromptable

    model = SamPromptable(small_sam())
    seen = model.seen_as("mosaic")
    assert isinstance(seen, SamPromptable)
    assert seen.options.view == "mosaic" and seen.sam is model.sam and model.options.view == "slices"
    term = term_of(seen, gate=False)
    logits = logits_of({1: 4.0}, {1: 2.0})
    assert gradient(term, step_of(logits)).any()
    with pytest.raises(ConfigError, match="expected slices, mosaic, got 'cube'"):
        model.seen_as("cube")


def test_numbers_and_picture_of_a_step() -> None:
    term = term_of(Stub(radius=3.0), classes=3, prompts=["point", "box", "mask"], outside=1, proof=(0.0, 0.0))
    assert term.numbers() == {} and term.picture() is None
    term.loss(step_of(logits_of({1: 4.0, 2: 4.0}, {1: 4.0}, classes=3)))
    numbers = term.numbers()
    assert numbers["asked"] == 0.75 and 0 < numbers["agreement"] <= 1
    assert numbers["quality"] == pytest.approx(0.9) and 0 < numbers["gate"] <= 1
    picture = term.picture()
    assert picture is not None and picture.dtype.name == "uint8" and picture.shape[2] == 3
    assert (picture == (70, 230, 110)).all(2).any()  # a click inside
    assert (picture == (255, 230, 90)).all(2).any()  # a box
