"""Tar shards to micro-batches: index, order, storage, decoding, views, stream.

Start reading at `stream.py`; the guarantees of the order are in `order.py`.
"""

from m3i_scale.data.batch import Batch
from m3i_scale.data.sequential import Labelled, load_labelled
from m3i_scale.data.source import Source
from m3i_scale.data.storage import Storage
from m3i_scale.data.stream import Loader, Stream, TooManyBadSamples
from m3i_scale.data.views import NO_PHOTOMETRIC, Augmentation, Photometric

__all__ = [
    "NO_PHOTOMETRIC",
    "Augmentation",
    "Batch",
    "Labelled",
    "Loader",
    "Photometric",
    "Source",
    "Storage",
    "Stream",
    "TooManyBadSamples",
    "load_labelled",
]
