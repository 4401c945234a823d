"""The real data of the benchmarks: scikit-learn's digits (bundled) and Bibtex (sparse ARFF)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BIBTEX_FEATURES = 1836
BIBTEX_LABELS = 159


class Split(NamedTuple):
    """Features and targets of a data set, cut into a training and a test part.

    Attributes:
        x_train, x_test: (rows, features) float32.
        y_train, y_test: (rows,) int64 classes, or (rows, labels) float32 zeros and ones.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class Arff(NamedTuple):
    """A sparse ARFF file, filled in: names of the attributes and (rows, attributes) float32."""

    names: list[str]
    values: Tensor


def load_digits(seed: int = 0) -> Split:
    """Scikit-learn's 1,797 digits, 64 features in [0, 1], 10 classes, 1,347 of them to train on."""
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    digits = bundled()
    parts = train_test_split(
        digits.data / 16.0, digits.target, test_size=0.25, random_state=seed, stratify=digits.target
    )
    x_train, x_test, y_train, y_test = parts
    return Split(
        torch.as_tensor(x_train, dtype=torch.float32),
        torch.as_tensor(y_train, dtype=torch.int64),
        torch.as_tensor(x_test, dtype=torch.float32),
        torch.as_tensor(y_test, dtype=torch.int64),
    )


def load_bibtex(data_dir: str | Path) -> Split:
    """The Mulan split of Bibtex: 4,880 and 2,515 rows of 1,836 binary features and 159 labels.

    Args:
        data_dir: the folder that holds `bibtex/`, or the `bibtex` folder itself.
    Raises:
        FileNotFoundError: neither folder holds bibtex-train.arff and bibtex-test.arff.
        ValueError: a file is not the sparse ARFF that is expected.
    Source:
        Katakis, Tsoumakas, Vlahavas, Multilabel Text Classification for Automated Tag
        Suggestion, ECML/PKDD Discovery Challenge 2008.
    """
    folder = find_bibtex(data_dir)
    x_train, y_train = _features_and_labels(folder / "bibtex-train.arff")
    x_test, y_test = _features_and_labels(folder / "bibtex-test.arff")
    return Split(x_train, y_train, x_test, y_test)


def find_bibtex(data_dir: str | Path) -> Path:
    """The folder with the two ARFF files: `data_dir/bibtex` or `data_dir` itself."""
    candidates = [Path(data_dir) / "bibtex", Path(data_dir)]
    files = ("bibtex-train.arff", "bibtex-test.arff")
    for folder in candidates:
        if all((folder / file).is_file() for file in files):
            return folder
    raise FileNotFoundError(
        f"load_bibtex: {files[0]} and {files[1]} must be in one of "
        f"{', '.join(str(folder) for folder in candidates)}. Pass the folder that holds bibtex/."
    )


def read_sparse_arff(path: str | Path) -> Arff:
    """Read a sparse ARFF file of numeric or {0,1} attributes; what a row omits is zero.

    Raises:
        ValueError: a row is not `{index value, ...}` or names an attribute that there is not.
    Source:
        Witten, Frank, Hall, Data Mining, section 2.4 (sparse data).
    """
    names: list[str] = []
    rows: list[tuple[list[int], list[float]]] = []
    in_data = False
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.strip()
            if not line or line.startswith("%"):
                continue
            if in_data:
                rows.append(_parse_row(line, len(names), f"{path}, line {number}"))
            elif line.lower().startswith("@attribute"):
                names.append(_attribute_name(line))
            elif line.lower().startswith("@data"):
                in_data = True
    if not in_data:
        raise ValueError(f"read_sparse_arff: {path} has no @data section. Is it an ARFF file?")
    values = torch.zeros(len(rows), len(names))
    for row, (columns, entries) in zip(values, rows, strict=True):
        row[columns] = torch.tensor(entries)
    return Arff(names, values)


def _attribute_name(line: str) -> str:
    rest = line[len("@attribute") :].strip()
    if rest[:1] in ("'", '"'):
        return rest[1 : rest.index(rest[0], 1)]
    return rest.split(None, 1)[0]


def _parse_row(line: str, num_attributes: int, where: str) -> tuple[list[int], list[float]]:
    if not (line.startswith("{") and line.endswith("}")):
        raise ValueError(
            f"read_sparse_arff: a row must be {{index value, ...}}, got {line[:40]!r} ({where})"
        )
    columns: list[int] = []
    entries: list[float] = []
    for pair in line[1:-1].split(","):
        if not pair.strip():
            continue
        try:
            column_text, value_text = pair.split()
            column, value = int(column_text), float(value_text)
        except ValueError:
            raise ValueError(
                f"read_sparse_arff: an entry must be `index value`, got {pair!r} ({where})"
            ) from None
        if not 0 <= column < num_attributes:
            raise ValueError(
                f"read_sparse_arff: index must be below {num_attributes}, got {column} ({where})"
            )
        columns.append(column)
        entries.append(value)
    return columns, entries


def _features_and_labels(path: Path) -> tuple[Tensor, Tensor]:
    names, values = read_sparse_arff(path)
    if len(names) != BIBTEX_FEATURES + BIBTEX_LABELS:
        raise ValueError(
            f"load_bibtex: {path} must have {BIBTEX_FEATURES} features and {BIBTEX_LABELS} labels, "
            f"got {len(names)} attributes"
        )
    return values[:, :BIBTEX_FEATURES].contiguous(), values[:, BIBTEX_FEATURES:].contiguous()
