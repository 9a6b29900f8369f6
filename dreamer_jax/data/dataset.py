"""Documents on disk: TFDS datasets of token ids in ArrayRecord files, each document with a checksum."""

import contextlib
import functools
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format

from dreamer_jax.data.files import DataError

VERSION = "1.0.0"
RECORDS = ".array_record-"
"""What the names of the files of documents have in them."""


# TFDS comes without types: mypy does not know the keyword.
class TokenizedDocuments(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS dataset of token ids, in the order in which they are given."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # there are no checksums of downloads beside the code; looking for them needs importlib_resources

    def __init__(self, name: str, splits: Mapping[Any, Iterable[dict[str, Any]]], data_dir: Path):
        self.name = name
        self._documents = splits
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tokenized documents: [bos] prompt response [eos]. The response is tokens[response_start:].",
            features=_features(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(examples) for split, examples in self._documents.items()}

    def _generate_examples(self, examples: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(examples)


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    return tfds.features.FeaturesDict({"tokens": tokens, "response_start": np.int32, "checksum": np.uint32})


def example(tokens: Sequence[int], response_start: int) -> dict[str, Any]:
    """A document as it is stored."""
    stored = np.asarray(tokens, np.int32)
    return {"tokens": stored, "response_start": response_start, "checksum": _checksum(stored, response_start)}


def is_whole(stored: dict[str, Any]) -> bool:
    """Whether a document is the one that was written."""
    return _checksum(stored["tokens"], stored["response_start"]) == stored["checksum"]


def _checksum(tokens: np.ndarray, response_start: int) -> int:
    return zlib.crc32(tokens.data, int(response_start))


def write_dataset(name: str, splits: Mapping[Any, Iterable[dict[str, Any]]], directory: Path) -> None:
    """Write a dataset into `directory`/`name`; no split may be empty.

    TFDS prints to the standard output and looks for its own catalogue online unless told not to.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    tfds.disable_progress_bar()
    builder = TokenizedDocuments(name, splits, directory)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except RuntimeError as error:
        refused = re.search(r"\w+\(\) failed: ([^;]+)", str(error))  # ArrayRecord, of a system call
        if refused is None:
            raise
        raise OSError(refused[1]) from error


def open_dataset(directory: Path, name: str, split: str) -> Any:
    """The documents of a split by index.

    Raises:
        DataError: the dataset is not of the kind that `write_dataset` writes.
        OSError, ValueError: it is damaged.
    """
    folder = directory / name / VERSION
    # TFDS imports the modules that this file names, so one of a stranger could run any code.
    if json.loads((folder / "features.json").read_bytes()) != json_format.MessageToDict(_features().to_proto()):
        raise DataError(
            f"'{folder / 'features.json'}' is not what this program writes; delete the folder '{directory}' and start "
            f"again"
        )
    return tfds.builder_from_directory(folder).as_data_source(split=split)
