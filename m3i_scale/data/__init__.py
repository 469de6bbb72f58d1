"""Tar shards to micro-batches: index, order, storage, decoding, views, stream.

Start reading at `stream.py`; the guarantees of the order are in `order.py`. The settings are those
of the configuration (`m3i_scale.config.Data` and what is below it).
"""

from m3i_scale.data.batch import Batch
from m3i_scale.data.make import TooManyBadSamples
from m3i_scale.data.sequential import Labelled, load_labelled
from m3i_scale.data.storage import StorageClient
from m3i_scale.data.stream import Loader, Stream

__all__ = [
    "Batch",
    "Labelled",
    "Loader",
    "StorageClient",
    "Stream",
    "TooManyBadSamples",
    "load_labelled",
]
