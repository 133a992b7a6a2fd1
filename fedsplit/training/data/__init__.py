"""A site's data, from where it lies to a batch of tensors: source -> partition -> split -> transform -> batches.

Importing this loads torch and Pillow; scikit-learn, datasets, flwr-datasets and transformers only load in
the calls that need them, because a device starts a new process every round.
"""

from fedsplit.training.data.examples import Examples
from fedsplit.training.data.loader import CachedTransform, batches
from fedsplit.training.data.partition import Partition, parse_partition, partition
from fedsplit.training.data.source import SOURCES, load_source, stamp
from fedsplit.training.data.split import train_test_split
from fedsplit.training.data.transform import Batch, ImageTransform, TextTransform, Transform

__all__ = [
    "Batch",
    "CachedTransform",
    "Examples",
    "ImageTransform",
    "Partition",
    "SOURCES",
    "TextTransform",
    "Transform",
    "batches",
    "load_source",
    "parse_partition",
    "partition",
    "stamp",
    "train_test_split",
]
