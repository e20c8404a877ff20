"""Which weights of foundation models we know: where they come from, how large they are, and under which licence.

A hash or an exact size stands here only where the owner of the file publishes it, or where it was read from the owner's
own storage; None means that nobody does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scarceseg.errors import ConfigError, near_matches

Architecture = Literal["sam", "sam-med3d", "tiny-sam", "tiny-sam3d"]


@dataclass(frozen=True)
class HubFiles:
    """Files of one repository on the Hugging Face Hub.

    Attributes:
        repo: owner and name.
        files: names in the repository; one alone is kept as a file, several as a folder.
        revision: commit, so that the files cannot change under the same name.
    """

    repo: str
    files: tuple[str, ...]
    revision: str


@dataclass(frozen=True)
class Weights:
    """One set of weights.

    Exactly one of `packaged`, `urls` and `hub` says where the file is; none of them does where its owners offer no
    address that a program can fetch.

    Attributes:
        name: as the user types it.
        description: one line.
        kind: architecture it belongs to.
        licence: of the weights.
        size_bytes: of the file, or of all files of a folder; None when it is not known.
        source: page to read about it and to get it by hand.
        citation: of the model.
        filename: name of the file or folder on disk.
        packaged: the file lies in the package.
        urls: plain addresses of the same file, the preferred one first.
        hub: files on the Hugging Face Hub.
        sha256, md5: of the file, hexadecimal.
        exact: whether `size_bytes` is the exact length; otherwise it is as rounded on the page it was read from.
    """

    name: str
    description: str
    kind: Architecture
    licence: str
    size_bytes: int | None
    source: str
    citation: str
    filename: str
    packaged: bool = False
    urls: tuple[str, ...] = ()
    hub: HubFiles | None = None
    sha256: str | None = None
    md5: str | None = None
    exact: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is several files, kept in a folder."""
        return self.hub is not None and len(self.hub.files) > 1

    @property
    def origin(self) -> str:
        """How it is had: ``package``, ``url``, ``hub`` or ``by hand``."""
        if self.packaged:
            return "package"
        if self.urls:
            return "url"
        return "hub" if self.hub else "by hand"


def weights_called(name: str) -> Weights:
    """The entry of the catalogue called `name`.

    Raises:
        ConfigError: unknown name; near matches are listed.
    """
    if name not in CATALOGUE:
        raise ConfigError(f"unknown weights {name!r}: {near_matches(name, CATALOGUE)}")
    return CATALOGUE[name]


_SAM = "Kirillov et al., Segment Anything, ICCV 2023, arXiv:2304.02643"
_SAM_PAGE = "https://github.com/facebookresearch/segment-anything"
_SAM_FILES = "https://dl.fbaipublicfiles.com/segment_anything"
_SAM_MED3D = "Wang et al., SAM-Med3D, arXiv:2310.15161"
_OURS = "ScarceSeg"
_OUR_PAGE = "this package"


def _sam(letter: str, size: int, sha256: str, md5: str) -> Weights:
    """One of Meta's three files; the digits in a file's name are the first six of its MD5."""
    filename = f"sam_vit_{letter}_{md5[:6]}.pth"
    return Weights(
        name=f"sam-vit-{letter}",
        description=f"Segment Anything, ViT-{letter.upper()} (2D)",
        kind="sam",
        licence="Apache-2.0",
        size_bytes=size,
        source=_SAM_PAGE,
        citation=_SAM,
        filename=filename,
        urls=(f"{_SAM_FILES}/{filename}",),
        sha256=sha256,
        md5=md5,
        exact=True,
    )


def _tiny(name: str, kind: Architecture, description: str) -> Weights:
    return Weights(
        name=name,
        description=description,
        kind=kind,
        licence="Apache-2.0",
        size_bytes=None,
        source=_OUR_PAGE,
        citation=_OURS,
        filename=f"{kind.replace('-', '_')}.safetensors",
        packaged=True,
    )


_ALL = (
    _tiny("tiny-sam", "tiny-sam", "small SAM for stitched mosaics of slices, made from synthetic volumes alone"),
    _tiny("tiny-sam3d", "tiny-sam3d", "small promptable 3D network, made from synthetic volumes alone"),
    _sam(
        "b",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        "01ec64d29a2fca3f0661936605ae66f8",
    ),
    _sam(
        "l",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        "0b3195507c641ddb6910d2bb5adee89c",
    ),
    _sam(
        "h",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        "4b8939a88964f0f4ff5f5b2642c598a6",
    ),
    Weights(
        name="medsam",
        description="SAM ViT-B fine-tuned on medical images with box prompts (2D)",
        kind="sam",
        licence="Apache-2.0",
        size_bytes=375_000_000,
        source="https://huggingface.co/wanglab/medsam-vit-base",
        citation="Ma et al., Segment Anything in Medical Images, Nature Communications 2024, arXiv:2304.12306",
        filename="medsam-vit-base",
        hub=HubFiles(
            "wanglab/medsam-vit-base",
            ("config.json", "pytorch_model.bin"),
            "de8488bca37bb1d4fb190f612c516126d739ce3b",
        ),
    ),
    Weights(
        name="sam-med3d",
        description="SAM-Med3D, first version (3D); its owners offer it on file-sharing pages alone",
        kind="sam-med3d",
        licence="Apache-2.0",
        size_bytes=None,
        source="https://github.com/uni-medical/SAM-Med3D",
        citation=_SAM_MED3D,
        filename="sam_med3d.pth",
    ),
    Weights(
        name="sam-med3d-turbo",
        description="SAM-Med3D fine-tuned on 44 datasets (3D)",
        kind="sam-med3d",
        licence="Apache-2.0",
        size_bytes=402_000_000,
        source="https://huggingface.co/blueyo0/SAM-Med3D",
        citation=_SAM_MED3D,
        filename="sam_med3d_turbo.pth",
        hub=HubFiles("blueyo0/SAM-Med3D", ("sam_med3d_turbo.pth",), "main"),
        sha256="899a46d04d3b70f723282ceb489149373558bf0aaba389a346f5ab57da5cdd3c",
    ),
)

CATALOGUE: dict[str, Weights] = {entry.name: entry for entry in _ALL}
"""Every set of weights we know, by name."""
