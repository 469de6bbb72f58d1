"""The networks as configuration: backbone, decoder, text tower, heads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from m3i_scale.config.types import Count, Node, PathText, Positive

# ruff: noqa: RUF012  (pydantic copies defaults)

# Words that name encoders and representations.
RESERVED = {"teacher", "student", "pixels", "features", "global", "text", "category", "gram"}


class Backbone(Node):
    """The image encoder by name; `options` go to its constructor, which knows their names."""

    name: str
    """`intern_image_t` to `intern_image_g`, `vit_b16`, or `intern_image`, `vit` with options."""
    options: dict[str, Any] = {}
    """Arguments of the backbone's constructor; they override those that the name stands for."""


class Decoder(Node):
    """Image decoder (Table 7). `head`: how its last layer starts (docs/paper.md: why at zero)."""

    depth: Count = 4
    """Transformer blocks."""
    width: Count = 768
    """Features of a token."""
    heads: Count = 16
    """Attention heads."""
    ffn: Count = 3072
    """Hidden features of each MLP."""
    head: Literal["zero", "xavier"] = "zero"
    """How the last layer starts."""
    position_grid: Count | None = None
    """Rows and columns of patches in which positions are counted, whatever the size of the images:
    those that a stage before this one was trained on; null: those of `data.image_size`.
    """
    checkpoint_blocks: bool = False
    """Recompute blocks in the backward pass to save memory."""


class TextTower(Node):
    """BERT-shaped text encoder and its tokenizer (a tokenizer.json path or a Hub name)."""

    tokenizer: PathText
    """Path of a tokenizer.json (`m3i tokenizer`), or a name on the Hugging Face Hub."""
    vocab_size: Count = 30522
    """Rows of the embedding: the tokenizer's number of tokens, or more."""
    depth: Count = 12
    """Transformer blocks."""
    width: Count = 768
    """Features of a token."""
    heads: Count = 12
    """Attention heads."""
    ffn: Count = 3072
    """Hidden features of each MLP."""
    max_length: Count = 64
    """Tokens of a caption; longer captions are cut."""
    embed_dim: Count = 768
    """Features of the caption's vector, in which images and texts are compared."""
    checkpoint_blocks: bool = False
    """Recompute blocks in the backward pass to save memory."""


class GlobalHead(Node):
    """Projector and predictor (MLPs) of `global` targets, and of dense ones with a projector.

    Built only where such a target is present; one pair serves all global targets, another all
    dense ones.
    """

    hidden: Count = 4096
    """Hidden features of the MLPs."""
    width: Count = 256
    """Features of projections."""
    predictor: bool = True
    """Whether the student has an MLP behind its projector (BYOL, SimSiam, MoCo v3)."""


class FrozenTeacher(Node):
    """A trained network that makes targets and is never changed; docs/methods.md shows one at work.

    It lies whole on every rank, outside of ZeRO and of checkpoints, which keep a checksum.
    """

    source: PathText
    """Its weights: a file of `m3i export`, a file or folder of timm or transformers, or a name on
    the Hub (OWNER/NAME).
    """
    architecture: str | None = None
    """What they are of: a model of timm or a backbone; null: as the file or its folder says."""
    options: dict[str, Any] = {}
    """Arguments of the network; they override those that its file says."""
    image_size: Count | None = None
    """Side that it sees images at, in pixels, in every step; null: `data.image_size`."""
    mean: tuple[float, float, float] | None = None
    """Of each channel of its images, from 0 to 1; null: as its file says, else timm, else
    `data.mean`.
    """
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of each channel, as `mean`."""

    @model_validator(mode="after")
    def _possible(self) -> FrozenTeacher:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or neither")
        return self


TeacherName = Annotated[str, Field(pattern=r"^[\w-]+$")]


class Model(Node):
    """All networks."""

    backbone: Backbone
    """The image encoder."""
    init: PathText | None = None
    """Weights that the backbone starts with: a file of `m3i export`, a file or folder of published
    weights, of timm or transformers, or a name on the Hub (OWNER/NAME); null: drawn from `seed`.
    A run folder, or a checkpoint: all networks start with those of that run, the teacher's averages
    among them. A run that has a checkpoint of its own goes on from that.
    """
    decoder: Decoder = Decoder()
    """The image decoder of dense targets."""
    text: TextTower | None = None
    """The text encoder; needed for text targets."""
    categories: Annotated[int, Field(ge=0)] = 0
    """Number of categories; needed for category targets."""
    global_head: GlobalHead = GlobalHead()
    """Projector and predictor."""
    frozen_teachers: dict[TeacherName, FrozenTeacher] = {}
    """Trained networks by names that `encoder` of a target may say; those that none says are not
    loaded.
    """

    @model_validator(mode="after")
    def _possible(self) -> Model:
        taken = sorted(self.frozen_teachers.keys() & RESERVED)
        if taken:
            raise ValueError(f"frozen_teachers: {taken[0]!r} means something else; rename it")
        return self
