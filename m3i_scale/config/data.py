"""The data as configuration: sources, views and their colours, storage, the stream.

These classes are what `m3i_scale.data` and `m3i_scale.shards` take: each setting, its default and
its bounds are declared here and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from m3i_scale.config.types import Count, Fraction, Node, PathText, Positive

# ruff: noqa: RUF012  (pydantic copies defaults)

SourceKind = Literal["text", "category", "both"]
MAX_PIXELS = 100_000_000  # of an image, unless `data.max_pixels` says otherwise


def _low_to_high(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if low > high:
        raise ValueError(f"[{low:g}, {high:g}] runs backwards; write the smaller number first")
    return bounds


_Ordered = AfterValidator(_low_to_high)


class Source(Node):
    """One indexed set of WebDataset shards."""

    name: str
    """Name of the source in logs."""
    index: PathText
    """Path or URL of the index (`m3i shards index`)."""
    kind: SourceKind
    """The supervision that every sample of the source carries."""
    weight: Positive | None = None
    """Share of the stream, relative to the other weights. null: samples times `epochs`."""
    epochs: Positive = 1.0
    """How often the source is shown while sources with `epochs: 1` are shown once."""
    captions: dict[str, Positive] | None = None
    """Weights of the places that captions are drawn from: `txt`, `alt.txt`, `json:FIELD`. Drawn by
    seed and stream position, among the places of which a sample has a caption; of a list evenly.
    The index must have the members (`m3i shards index --caption txt --caption alt.txt`). null: the
    first caption.
    """

    @model_validator(mode="after")
    def _captions_can_be_there(self) -> Source:
        if self.captions is None:
            return self
        if self.kind == "category":
            raise ValueError("captions belong to kinds text and both, and this source is of kind "
                             "category; remove them, or set kind: both")  # fmt: skip
        if not self.captions:
            raise ValueError("captions names no place; remove it, or write {txt: 1}")
        for place in self.captions:
            member, colon, field = place.partition(":")
            if not member.strip() or (colon and not field) or (colon and member != "json"):
                raise ValueError(
                    f"captions: {place!r} is no place of captions; write txt, alt.txt, json, or "
                    "json:FIELD"
                )
        return self

    @property
    def has_text(self) -> bool:
        """Whether every sample has a caption."""
        return self.kind != "category"

    @property
    def has_category(self) -> bool:
        """Whether every sample has a category."""
        return self.kind != "text"


class Photometric(Node):
    """Photometric strengths of one view (conventions of torchvision's ColorJitter)."""

    jitter_probability: Fraction = 0.8
    """Of changing brightness, contrast, saturation and hue."""
    brightness: Fraction = 0.4
    """Largest relative change."""
    contrast: Fraction = 0.4
    """Largest relative change."""
    saturation: Fraction = 0.2
    """Largest relative change."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest shift, as a share of the colour circle."""
    grayscale_probability: Fraction = 0.2
    """Of removing colour."""
    blur_probability: Fraction = 0.5
    """Of a Gaussian blur."""
    blur_sigma: Annotated[tuple[Positive, Positive], _Ordered] = (0.1, 2.0)
    """Smallest and largest sigma of the blur, in pixels."""
    solarize_probability: Fraction = 0.0
    """Of inverting bright pixels."""
    solarize_threshold: float = 128.0
    """Values from here on count as bright, of 0 to 255."""


class Augmentation(Node):
    """How two views are made of an image (Table 7 names the operations).

    Photometric strengths are BYOL's; the crop scale is MoCo v2's (BYOL's begins at 0.08).
    """

    scale: Annotated[tuple[Positive, Fraction], _Ordered] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: Annotated[tuple[Positive, Positive], _Ordered] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip_probability: Fraction = 0.5
    """Of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized."""
    views: Literal[1, 2] = 2
    """Views of each image. 1 where the objective uses a single view: less to decode and crop."""
    view_a: Photometric = Photometric(blur_probability=1.0)
    """Colours of view a, which the input shows."""
    view_b: Photometric = Photometric(blur_probability=0.1, solarize_probability=0.2)
    """Colours of view b."""


class Storage(Node):
    """How shards are read."""

    retries: Annotated[int, Field(ge=0)] = 4
    """Further attempts to read a range, with growing pauses."""
    cache: PathText | None = None
    """Folder of a disk cache of remote shards; null: none."""
    cache_gibibytes: Positive = 93.0
    """Size of the cache; the default is a little less than 100 GB."""
    allow_pipe: bool = False
    """Whether shards named `pipe:COMMAND` may run their command."""
    options: dict[str, Any] = {}
    """Options of the file systems by protocol, for instance {s3: {endpoint_url: ...}}."""


class MixedSize(Node):
    """One of several sizes of the views."""

    size: Count
    """Side in pixels."""
    weight: Positive = 1.0
    """Share of the steps, relative to the other weights."""


class Data(Node):
    """The stream of images, texts and categories."""

    sources: list[Source] = Field(min_length=1)
    """The indexed data sets, mixed by weight."""
    image_size: Count = 224
    """Side of the views in pixels."""
    mixed_sizes: Annotated[list[MixedSize], Field(min_length=1)] | None = None
    """Sizes that steps are drawn from: `[{size: 192, weight: 3}, {size: 384}]` trains three of four
    steps at 192 pixels. Drawn by seed and stream position, one size for all samples of a step. The
    largest is `image_size`, at which is evaluated and for which exports are. null: all steps at
    `image_size`.
    """
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the pixels, RGB from 0 to 1; subtracted."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixels; divided by."""
    augmentation: Augmentation = Augmentation()
    """Crops and colours."""
    workers: Annotated[int, Field(ge=0)] = 8
    """Reading processes of each rank; 0: the training process reads."""
    max_bad_rate: Fraction = 0.01
    """Share of replaced samples, among the last `bad_window` of a rank, above which the run stops.
    """
    bad_window: Count = 10_000
    """Samples over which `max_bad_rate` is measured."""
    max_pixels: Count = MAX_PIXELS
    """Larger images are replaced before they are decoded."""
    lanes: Count | None = None
    """Reading positions of each source, part of the order. null: `optimizer.global_batch_size`."""
    chunk_mebibytes: Positive = 4.0
    """Neighbouring bytes that the order keeps together; part of the order."""
    storage: Storage = Storage()
    """How shards are read."""

    @model_validator(mode="after")
    def _possible(self) -> Data:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) != all(weighted):
            raise ValueError(
                "some sources have a weight and some have not; give one to all of them or to none"
            )
        mixed = [one.size for one in self.mixed_sizes or []]
        if len(set(mixed)) < len(mixed):
            raise ValueError("mixed_sizes has a size twice; add their weights up")
        if mixed and max(mixed) != self.image_size:
            raise ValueError(
                f"mixed_sizes: the largest is to be image_size, which is {self.image_size}; set "
                f"image_size: {max(mixed)}, or add {self.image_size}"
            )
        return self

    @property
    def sizes(self) -> dict[int, float]:
        """Sides of the views in pixels, ascending, and their shares of the steps."""
        mixed = self.mixed_sizes or [MixedSize(size=self.image_size)]
        whole = sum(one.weight for one in mixed)
        return {one.size: one.weight / whole for one in sorted(mixed, key=lambda one: one.size)}
