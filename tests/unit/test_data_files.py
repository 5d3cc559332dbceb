"""Data files that cannot be read are named, with what is wrong in them."""

import gzip

import pandas as pd
import pytest

from distprune.errors import UserError


def test_files_that_cannot_be_used(build, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"sentence": "a"\n')
    (tmp_path / "blank.json.gz").write_bytes(gzip.compress(b"\n \n"))
    (tmp_path / "late.jsonl").write_text("\n" + '{"sentence": "a long sentence", "label": 0}\n' * 300_000 + "{\n")
    (tmp_path / "array.json").write_text('[\n{"sentence": "a"\n]')
    (tmp_path / "header.csv").write_text("sentence,label\n")
    (tmp_path / "plain.jsonl.gz").write_text("not compressed")
    row = b'{"sentence": "a b", "label": 1}\n'
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(row * 99)[:-9])
    (tmp_path / "spoilt.jsonl.gz").write_bytes(gzip.compress(row)[:10] + b"\xff" * 40)
    (tmp_path / "null.jsonl").write_text("\nnull\n" + row.decode())
    (tmp_path / "twice.csv").write_text("sentence,label,label\na b,1,0\n")
    (tmp_path / "twice.tsv").write_text("sentence\tlabel\tsentence\na b\t1\ta\n")
    (tmp_path / "wide.tsv").write_text("sentence\tlabel\n" + "a b\t1\tmore\n" * 9)
    (tmp_path / "wide.csv").write_text("sentence,label\n" + "a b,1,more\n" * 9)
    pd.DataFrame({"sentence": ["a"], "label": [0]})[:0].to_parquet(tmp_path / "none.parquet")
    for options, message in [
        ({"train": "trian.jsonl"}, "file trian.jsonl does not exist"),
        ({"train": "train.doc"}, r"train.doc has an unknown suffix; allowed: \.jsonl, .*task\.hub"),
        ({"train": "train"}, "unknown suffix"),
        ({"train": "empty.jsonl"}, "empty.jsonl is empty$"),
        ({"train": "blank.json.gz"}, r"blank.json.gz is empty$"),
        ({"train": "late.jsonl"}, "late.jsonl cannot be read: line 300002 is no JSON"),
        ({"train": "array.json"}, "array.json cannot be read, or is empty: "),
        ({"train": "header.csv"}, "header.csv cannot be read, or is empty"),
        ({"train": "wide.tsv"}, "wide.tsv cannot be read, or is empty: the rows have more fields than the header"),
        ({"train": "wide.csv"}, "wide.csv cannot be read, or is empty: the rows have more fields than the header"),
        ({"train": "broken.jsonl"}, "broken.jsonl cannot be read: line 1 is no JSON"),
        ({"train": "plain.jsonl.gz"}, "plain.jsonl.gz cannot be read"),
        ({"train": "cut.jsonl.gz"}, "cut.jsonl.gz cannot be read, or is empty: Compressed file ended"),
        ({"train": "spoilt.jsonl.gz"}, "spoilt.jsonl.gz cannot be read, or is empty: Error -3"),
        ({"train": "null.jsonl"}, "null.jsonl begins with no row; allowed: an object in each line, or an array"),
        ({"train": "twice.csv"}, "twice.csv has two columns 'label'; allowed: a name for each"),
        ({"train": "twice.tsv"}, "twice.tsv has two columns 'sentence'; allowed: a name for each"),
        ({"train": "none.parquet"}, "none.parquet cannot be read, or is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**options)
