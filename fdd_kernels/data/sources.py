"""Open the documents to read: files, or a data set of Hugging Face `datasets`, given by name, by
folder or as an object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdd_kernels.common.errors import UserError
from fdd_kernels.data.files import SUFFIXES, data_files, file_digest
from fdd_kernels.data.records import Record, read_records, record_of_row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Files that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write beside the data.
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """Documents that can be read several times.

    Attributes:
        name: its name in errors and reports.
        files: the files to read; empty for a data set.
        dataset: the data set to read, if there are no files.
    """

    name: str
    files: tuple[Path, ...] = ()
    dataset: Dataset | IterableDataset | None = None

    @property
    def size(self) -> int | None:
        """Bytes of the files, or rows of the data set; None for a streamed one."""
        if self.dataset is None:
            return sum(file.stat().st_size for file in self.files)
        return len(self.dataset) if hasattr(self.dataset, "__len__") else None

    def records(self, advance: Callable[[int], None] = lambda amount: None) -> Iterator[Record]:
        """Yield every document, and call `advance` with the amount read, in the units of `size`.

        Raises:
            UserError: see `read_records`.
        """
        for file in self.files:
            yield from read_records(file)
            advance(file.stat().st_size)
        for number, row in enumerate(self.dataset if self.dataset is not None else (), start=1):
            yield record_of_row(row, f"{self.name}, row {number}")
            advance(1)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the content by name: of each file, by its path below the given folder, or of
        all rows.
        """
        if self.dataset is None:
            root = Path(self.name) if Path(self.name).is_dir() else Path(self.name).parent
            return {str(file.relative_to(root)): file_digest(file) for file in self.files}
        digest = hashlib.sha256()
        for row in self.dataset:
            digest.update(json.dumps(row, sort_keys=True, default=_text_of).encode() + b"\n")
        return {Path(self.name).name: digest.hexdigest()}

    def names(self) -> list[str]:
        """The names for a model card: the last part of paths, the whole name on the hub."""
        return [file.name for file in self.files] or [
            Path(self.name).name if Path(self.name).exists() else self.name
        ]


def _text_of(value: Any) -> str:
    """An object of a row as text; its type alone if the text has an address, as that of a decoded
    image has.
    """
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def open_source(data: str | Path | Dataset | IterableDataset | Source) -> Source:
    """Open the documents that `data` names.

    Args:
        data: a file or a directory of files (see `data_files`); a directory written by
            `save_to_disk`; NAME[,CONFIG][:SPLIT] of a data set on the hub or in a directory of its
            layout, as `datasets.load_dataset` takes them; or a data set. Of several splits "train"
            is read unless another is named. Code that comes with a data set is never run.

    Raises:
        UserError: there is no such data, or it cannot be read.
    """
    if isinstance(data, Source):
        return data
    if not isinstance(data, str | Path):
        return _of_dataset(data, f"a {type(data).__name__}")
    path = Path(data)
    if path.is_dir() and any((path / name).exists() for name in _SAVED):
        return _saved(path, None)
    if path.exists():
        return Source(str(path), tuple(data_files(path)))
    name, _, split = str(data).partition(":")
    name, _, config = name.partition(",")
    if Path(name).is_dir() and any((Path(name) / saved).exists() for saved in _SAVED):
        return _saved(Path(name), split or None)
    named_as_path = (
        str(data).startswith((".", "/", "~"))
        or name.count("/") > 1
        or Path(name).suffix in SUFFIXES
    )
    if named_as_path and not Path(name).is_dir():
        data_files(path)  # raises: there is no such file
    return _loaded(str(data), name, config or None, split or None)


def import_datasets(name: str):
    """Import Hugging Face `datasets`.

    Raises:
        UserError: it is not installed; begins with `name`.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f'{name}: data sets need datasets: pip install "fdd_kernels[hf]"') from None
    return datasets


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _saved(path: Path, split: str | None) -> Source:
    try:
        return _of_dataset(import_datasets(str(path)).load_from_disk(str(path)), str(path), split)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable data set: {_first_line(error)}") from None


def _loaded(shown: str, name: str, config: str | None, split: str | None) -> Source:
    try:
        return _of_dataset(import_datasets(shown).load_dataset(name, config, split=split), shown)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{shown}: no such file, and no data set that can be loaded: {_first_line(error)}"
        ) from None


def _of_dataset(dataset: Any, name: str, split: str | None = None) -> Source:
    datasets = import_datasets(name)
    if isinstance(dataset, dict):
        split = split or ("train" if len(dataset) > 1 else next(iter(dataset), ""))
        if split not in dataset:
            raise UserError(
                f"{name}: has no split {split!r}: name one of {', '.join(dataset)}, as in "
                "NAME:SPLIT"
            )
        dataset = dataset[split]
    elif split is not None:
        raise UserError(f"{name}: has no splits, but {split!r} was asked for")
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise UserError(f"{name}: expected a path, a name, or a data set of Hugging Face datasets")
    return Source(
        name,
        dataset=dataset.with_format(None) if isinstance(dataset, datasets.Dataset) else dataset,
    )
