"""Documents on disk: ArrayRecord files of token ids, each document with a checksum, that TFDS reads as a dataset.

A file is written and read by itself. A description, written when all files of a folder are there, makes them splits of
one TFDS dataset; this program never reads it, because TFDS imports what a description names.
"""

import contextlib
import functools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

VERSION = "1.0.0"
RECORDS = ".array_record"
"""What the names of the files of documents have in them."""


class SplitFiles(NamedTuple):
    """The files of one split, in their order."""

    documents: Sequence[int]
    """Documents of each file; none is empty."""
    bytes: int
    """Of all files together."""


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict({"tokens": tokens, "response_start": np.int32, "checksum": np.uint32})


def example(tokens: Sequence[int] | np.ndarray, response_start: int) -> dict[str, Any]:
    """A document as it is stored."""
    stored = np.asarray(tokens, np.int32)
    return {"tokens": stored, "response_start": response_start, "checksum": _checksum(stored, response_start)}


def ids_and_answers(tokens: Sequence[int] | np.ndarray, response_start: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a stored document, and which of them are to be produced: the eos after a response is, too.

    A token that is given within the response, in a further turn, is stored as its complement, a negative number.
    """
    stored = np.asarray(tokens)
    is_given = stored < 0
    return np.where(is_given, ~stored, stored), ~is_given & (np.arange(len(stored)) >= response_start)


def is_whole(stored: dict[str, Any]) -> bool:
    """Whether a document is the one that was written."""
    return _checksum(stored["tokens"], stored["response_start"]) == stored["checksum"]


def _checksum(tokens: np.ndarray, response_start: int) -> int:
    return zlib.crc32(tokens.data, int(response_start))


def records_name(name: str, split: str, file: int, files: int) -> str:
    """Name of one of the files of a split, as TFDS expects it."""
    return f"{name}-{split}{RECORDS}-{file:05d}-of-{files:05d}"


def write_documents(path: Path, documents: Iterable[tuple[Sequence[int] | np.ndarray, int]]) -> None:
    """Write a file of (tokens, response_start), which `ids_and_answers` reads; the same documents give the same bytes.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    with _disk_errors():
        # One document can be read without its neighbours. Stronger compression takes as long as tokenizing.
        writer = ArrayRecordWriter(str(path), "group_size:1,snappy")
        for tokens, response_start in documents:
            writer.write(_serialized(example(tokens, response_start)))
        writer.close()


def _serialized(stored: dict[str, Any]) -> bytes:
    """The bytes of a document, with its fields in an order that is the same in every process.

    TFDS reads them as its own. Its writer checks each field of each document, which takes as long as tokenizing it.
    """
    message = tf_example_pb2.Example()
    features = message.features.feature
    features["tokens"].bytes_list.value.append(stored["tokens"].astype("<i4", copy=False).tobytes())
    features["response_start"].int64_list.value.append(int(stored["response_start"]))
    features["checksum"].int64_list.value.append(stored["checksum"])
    return bytes(message.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Make an OSError of what ArrayRecord says of a system call that failed."""
    try:
        yield
    except RuntimeError as error:
        refused = re.search(r"\w+\(\) failed: ([^;]+)", str(error))
        if refused is None:
            raise
        raise OSError(refused[1]) from error


class Documents:
    """The documents of one file by index. The library keeps some ten bytes for each as long as this lives."""

    def __init__(self, path: Path):
        options = "readahead_buffer_size:0,footer_prefetch_bytes:0"  # single documents, far apart
        self._reader = ArrayRecordReader(str(path), options=options, file_reader_buffer_size=1 << 15)

    def __len__(self) -> int:
        return int(self._reader.num_records())

    def __getitem__(self, index: int) -> dict[str, Any]:
        [record] = self._reader.read([index])
        stored: dict[str, Any] = _features().deserialize_example_np(record)
        return stored


def write_description(folder: Path, splits: Mapping[str, SplitFiles]) -> None:
    """Describe the files in a folder to TFDS, which finds the dataset's name in theirs.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        version=VERSION,
        split_infos=[
            tfds.core.SplitInfo(name=split, shard_lengths=list(files.documents), num_bytes=files.bytes)
            for split, files in splits.items()
        ],
        check_data=False,
        description="Tokenized documents: [bos] prompt response [eos]. The response is tokens[response_start:].",
        disable_shuffling=True,
    )
