"""The data of the benchmark: sparse ARFF, bibtex and the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the bench extra is not installed")

from bench.data import BIBTEX_FEATURES, BIBTEX_LABELS, load_bibtex, load_digits, read_sparse_arff

ARFF = """% a comment
@relation made_up

@attribute plain {0,1}
@attribute 'with space' {0,1}
@ATTRIBUTE "quoted" numeric
@data
{0 1,2 2.5}
{}
{1 1}
"""


def test_sparse_arff_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "tiny.arff"
    path.write_text(ARFF)
    names, values = read_sparse_arff(path)
    assert names == ["plain", "with space", "quoted"]
    expected = torch.tensor([[1.0, 0.0, 2.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("0 1", r"a row must be \{index value, ...\}, got '0 1' .*line 11"),
        ("{0}", "an entry must be `index value`, got '0'"),
        ("{3 1}", "index must be below 3, got 3"),
        ("{-1 1}", "index must be below 3, got -1"),
    ],
)
def test_broken_arff_row_is_named(tmp_path: Path, row: str, complaint: str) -> None:
    path = tmp_path / "broken.arff"
    path.write_text(ARFF + row + "\n")
    with pytest.raises(ValueError, match=complaint):
        read_sparse_arff(path)


def test_arff_without_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.arff"
    path.write_text("@relation nothing\n")
    with pytest.raises(ValueError, match="has no @data section"):
        read_sparse_arff(path)


def test_bibtex_is_found_from_either_folder(tmp_path: Path) -> None:
    folder = tmp_path / "bibtex"
    folder.mkdir()
    attributes = [f"@attribute a{i} {{0,1}}" for i in range(BIBTEX_FEATURES + BIBTEX_LABELS)]
    for part, row in (("train", f"{{0 1,{BIBTEX_FEATURES} 1}}"), ("test", "{1 1}")):
        (folder / f"bibtex-{part}.arff").write_text("\n".join([*attributes, "@data", row, ""]))
    for given in (tmp_path, folder):
        split = load_bibtex(given)
        assert split.x_train.shape == (1, BIBTEX_FEATURES)
        assert split.y_test.shape == (1, BIBTEX_LABELS)
        assert float(split.x_train[0, 0]) == float(split.y_train[0, 0]) == 1.0
        assert float(split.x_train.sum()) == float(split.y_train.sum()) == 1.0


def test_missing_bibtex_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Pass the folder that holds bibtex/"):
        load_bibtex(tmp_path)


def test_digits_split_is_fixed_and_scaled() -> None:
    first, second = load_digits(), load_digits()
    assert torch.equal(first.x_train, second.x_train)
    assert len(first.x_train) + len(first.x_test) == 1797
    assert float(first.x_train.min()) == 0.0
    assert float(first.x_train.max()) == 1.0
    assert first.y_train.unique().tolist() == list(range(10))
