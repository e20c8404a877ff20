"""MagicNet: patches cut into cubes, which are swapped between images, shown alone, and asked where they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.functional.cubes import CubeGrid, random_order
from scarceseg.functional.losses import dice_loss, segmentation_loss
from scarceseg.functional.noise import clipped_gaussian
from scarceseg.methods.base import METHODS, Parts, RampName, Term, TermOptions
from scarceseg.networks.base import EncoderDecoder, channels_of, require_halves
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import ImageBatch, Labelled, Probability, Step, Unlabelled

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace

Count = Annotated[int, Field(ge=1)]


class MagicNetOptions(TermOptions):
    """Options of MagicNet.

    Attributes:
        cubes: wanted number of cubes along each axis; fewer where they would be thinner than the network's divisor.
        location: weight of the location loss.
        supervision: weight of the supervised losses of mixed images and single cubes.
        temperature: T of the blending weights; above 1 evens out the classes.
        memory: share of the class frequencies that is kept from one step to the next.
        decay, teacher_norm: of the teacher, see `scarceseg.networks.ema.EmaTeacher`.
        noise_std, noise_limit: of the teacher's input noise, in units of normalised intensity.
    """

    weight: float = Field(0.1, ge=0)
    ramp: RampName = "laine"
    cubes: tuple[Count, Count, Count] = (3, 3, 3)
    location: float = Field(0.1, ge=0)
    supervision: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    memory: float = Field(0.99, ge=0, lt=1)
    decay: float = Field(0.99, ge=0, lt=1)
    teacher_norm: Literal["batch", "running"] = "batch"
    noise_std: float = Field(0.1, ge=0)
    noise_limit: float = Field(0.2, ge=0)


@METHODS.register("magicnet")
class MagicNet(Term):
    """Magic-cube partition and recovery (Chen et al., CVPR 2023).

    - Across images: cubes are swapped between all rows of the batch, each keeping its position; the student's prediction
      is put back. On unlabelled rows its Dice loss against the pseudo-label is what weight and ramp multiply.
    - Within an image: the student sees every cube alone. From the bottleneck's features of one a head tells its position
      (cross-entropy, times 0.1); the predictions of the labelled images' cubes are put together.
    - Pseudo-label: arg-max of ``w p' + (1 - w) q'`` with p' the EMA teacher's probability of the whole patch, q' that of
      its cubes alone, and ``w = (r_c / max r)^(1/T)`` where r are the class frequencies of the teacher's labels over the
      last steps and c is the teacher's class: small organs are left to the cubes, large ones to the patch.

    The location loss and the mean of ``0.5 (CE + Dice)`` of labelled rows, mixed and from cubes, are added as they are.

    Choices (ours): cubes as equal as voxels allow and shown alone in a window that suits the network (`CubeGrid.fit`), so
    that any patch will do; equal frequencies at the start, which make the blend the teacher's; pooling to 2x2x2 before the
    location head, which changes nothing for cubes of two divisors as in the paper. Differs from the authors' code: the
    teacher makes q' from cubes it has encoded itself.
    """

    Options: ClassVar[type[TermOptions]] = MagicNetOptions
    options: MagicNetOptions
    teacher: EmaTeacher
    locator: nn.Sequential
    frequency: torch.Tensor
    order: torch.Tensor

    def check(self, student: nn.Module, work: Workspace) -> None:
        """The network has to have two halves, and the patch more than one cube."""
        self.cut(work.plan.patch, require_halves(student, self.name).divisor)

    def attach(self, student: nn.Module) -> None:
        """Make the teacher and the location head."""
        network = require_halves(student, self.name)
        # A tuple keeps the student out of the term's own parameters and state.
        self.student: tuple[EncoderDecoder] = (network,)
        self.teacher = EmaTeacher(network, self.options.decay, self.options.teacher_norm)
        deepest = channels_of(network)[0][-1]
        x, y, z = self.options.cubes
        self.locator = nn.Sequential(
            *(nn.AdaptiveAvgPool3d(2), nn.Flatten()),
            *(nn.Linear(8 * deepest, deepest), nn.ReLU(), nn.Linear(deepest, x * y * z)),
        )
        self.register_buffer("frequency", torch.full((self.classes,), 1.0 / self.classes))

    def grid(self, image: ImageBatch) -> CubeGrid:
        """How these patches are cut."""
        x, y, z = image.shape[2:]
        return self.cut((x, y, z), self.student[0].divisor)

    def cut(self, size: tuple[int, int, int], divisor: tuple[int, int, int]) -> CubeGrid:
        """How patches of this size are cut for a network of this divisor.

        Raises:
            ConfigError: into one cube.
        """
        grid = CubeGrid.fit(size, self.options.cubes, divisor)
        if len(grid.cubes) == 1:
            raise ConfigError(
                f"{self.name}: a patch of {'x'.join(map(str, size))} with cubes={list(self.options.cubes)} is not cut at "
                f"all, since a cube has at least {'x'.join(map(str, divisor))} voxels here: take a larger patch or more cubes"
            )
        return grid

    def extra_inputs(
        self, labelled: Labelled, unlabelled: Unlabelled | None, generator: torch.Generator
    ) -> ImageBatch | None:
        """All images of the batch with cubes swapped between them."""
        assert unlabelled is not None
        images = torch.cat([labelled.image, unlabelled.image])
        grid = self.grid(images)
        self.order = random_order(len(grid.cubes), len(images), generator)
        return grid.swap(images, self.order)

    @torch.no_grad()
    def blend(self, image: ImageBatch, grid: CubeGrid, generator: torch.Generator) -> Probability:
        """Pseudo-probabilities of unlabelled rows; their classes enter the frequencies afterwards."""
        noisy = image + clipped_gaussian(image, generator, self.options.noise_std, self.options.noise_limit)
        whole = self.teacher(noisy).softmax(1)
        single = grid.join_windows(self.teacher(grid.cut_windows(noisy))).softmax(1)
        classes = whole.argmax(1)
        weight = (self.frequency / self.frequency.max()).pow(1.0 / self.options.temperature)[classes].unsqueeze(1)
        seen = torch.stack([(classes == c).float().mean() for c in range(self.classes)])
        self.frequency.lerp_(seen, 1.0 - self.options.memory)
        return weight * whole + (1.0 - weight) * single

    def loss(self, step: Step) -> Parts:
        """Dice loss against the pseudo-label in [0, 1], and the supervision with the location loss."""
        assert step.unlabelled is not None
        images, label = torch.cat([step.labelled.image, step.unlabelled.image]), step.labelled.label
        grid, rows_l = self.grid(images), len(label)
        mixed = grid.swap(step.extra[self.name], self.order.argsort(1))
        alone = self.student[0].encode(grid.cut_windows(images))
        position = torch.arange(len(grid.cubes), device=label.device).repeat(len(images))
        located = F.cross_entropy(self.locator(alone[-1]).float(), position)
        single = self.student[0].decode([level[: rows_l * len(grid.cubes)] for level in alone]).float()
        supervised = [segmentation_loss(logits, label) for logits in (mixed[:rows_l], grid.join_windows(single))]
        pseudo = self.blend(step.unlabelled.image, grid, step.generator).argmax(1)
        return Parts(
            dice_loss(mixed[rows_l:].softmax(1), pseudo, background=True),
            self.options.supervision * torch.stack(supervised).mean() + self.options.location * located,
        )

    def after_update(self, student: nn.Module, iteration: int) -> None:
        """The teacher follows."""
        self.teacher.update(student, iteration)
