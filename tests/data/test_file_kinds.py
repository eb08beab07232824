"""Files that people give as data and that are no JSON are named in one line, with how to convert them."""

import bz2
import gzip
import lzma
import tarfile
import zipfile

import pytest

from lora.data.formats import read
from tests.data.test_data import PAIR, problems_of, written
from tests.mutation import mutation

ROW = b'{"prompt": "Hi", "completion": "Hello."}\n'
TABLE = 'instruction,output\n"Hi, you",Hello.\n'


FILES = {  # name -> (bytes, what the line says, what it says to do)
    "a.parquet": (b"PAR1\x15\x04\x15\x10", "a parquet file", "to_json"),
    "a.arrow": (b"ARROW1\0\0" + b"\0" * 99, "an Arrow file", "to_json"),
    "data-00000-of-00001.arrow": (b"\xff\xff\xff\xff\x10\x02\0\0", "an Arrow stream", "Dataset.from_file"),
    "a.feather": (b"FEA1\0\0", "a Feather file", "to_json"),
    "a.orc": (b"ORC\n\x0b", "an ORC file", "read_orc"),
    "a.avro": (b"Obj\x01\x02", "an Avro file", "fastavro"),
    "a.jsonl.xz": (lzma.compress(ROW), "packed with xz", "xz -d"),
    "a.jsonl.lzma": (lzma.compress(ROW, lzma.FORMAT_ALONE), "packed with lzma", "xz -d"),
    "a.jsonl.bz2": (bz2.compress(ROW), "packed with bzip2", "bzip2 -d"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04\x58", "packed with zstd", "zstd -d"),
    "a.jsonl.lz4": (b"\x04\x22\x4d\x18\x64", "packed with lz4", "lz4 -d"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive", "7z x"),
    "a.rar": (b"Rar!\x1a\x07", "a rar archive", "unrar"),
    "a.zip": (b"PK\x03\x04rest", "a zip archive", "Unpack it"),
    "a.xlsx": (b"PK\x03\x04rest", "a spreadsheet", "read_excel"),
    "a.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office document", "Save it"),
    "a.db": (b"SQLite format 3\0", "an SQLite database", "sqlite3 -json"),
    "a.h5": (b"\x89HDF\r\n", "an HDF5 file", "read_hdf"),
    "a.npy": (b"\x93NUMPY\x01", "a NumPy array", "JSON lines"),
    "a.pkl": (b"\x80\x04\x95\x10", "a pickle", "JSON lines"),
    "a.pdf": (b"%PDF-1.7\n", "a PDF", "pdftotext"),
    "a.gguf": (b"GGUF\x03\0\0\0", "a GGUF model", "--model"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", "git lfs pull"),
    "utf-16.jsonl": (ROW.decode().encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
    "utf-16-bare.jsonl": (ROW.decode().encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE"),
    "utf-16-be.jsonl": (ROW.decode().encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE"),
    "utf-32.jsonl": (ROW.decode().encode("utf-32"), "UTF-32", "iconv -f UTF-32"),
    "a.csv": (TABLE.encode(), "a CSV table", "read_csv"),
    "gbk.csv": ("问题,回答\n你好,您好\n".encode("gbk"), "a CSV table", "read_csv"),
    "numbers.csv": (b"1,2\n3,4\n", "a CSV table", "read_csv"),
    "a.csv.gz": (gzip.compress(TABLE.encode()), "a CSV table", "read_csv"),
    "table": (TABLE.encode(), "a CSV table", "read_csv"),
    "semicolons.data": (b"q;a\n1;2\n", "a CSV table", "read_csv"),
    "a.tsv": (b"q\ta\nHi\tHello.\n", "a table with tabs", "read_csv"),
    "tabs": (b"q\ta\nHi\tHello.\n", "a table with tabs", "read_csv"),
    "a.txt": (b"Once upon a time.\nThe end.\n", "plain text", '{"text": "..."}'),
    "5.txt": (b"5 apples\n", "plain text", '{"text": "..."}'),
    "latin.txt": ("Il était une fois".encode("latin-1"), "plain text", '{"text": "..."}'),
    "a.md": (b"# Title\n", "Markdown", '{"text": "..."}'),
    "a.yaml": (b"- prompt: Hi\n  completion: Hello.\n", "YAML", "yaml.safe_load"),
    "a.yml": (b"prompt: Hi\n", "YAML", "yaml.safe_load"),
    "rows": (b"---\nprompt: Hi\n", "YAML", "yaml.safe_load"),
    "a.toml": (b'rank = 4\n', "TOML", "--config"),
    "a.xml": (b"<rows><row/></rows>", "XML", "JSON"),
    "page.jsonl": (b"<!DOCTYPE html><html>", "a page of the web", "Download"),
    "a.py": (b"import json\n", "a Python program", "Run it"),
}  # fmt: skip


@mutation("lora/data/file_kinds.py", 'b"\\xfd7zXZ\\x00"', 'b"none"', case="a.jsonl.xz")
@mutation("lora/data/file_kinds.py", "what = TEXT.get(ends[-1]) if ends else None", "what = None", case="a.yml")
@mutation("lora/data/file_kinds.py", "0 < lines[0].count(mark) <= lines[1].count(mark)", "False", case="table")
@mutation("lora/data/jsonl.py", "else _is_plain(row[1])", "else False", case="5.txt")
@mutation("lora/data/jsonl.py", "stream.peek(file_kinds.START)", "raw.peek(4)", case="tar.gz")
@pytest.mark.parametrize("name", [*FILES, "tar.gz"])
def test_a_file_of_another_kind_is_named_in_one_line_with_how_to_convert_it(tmp_path, name):
    path = tmp_path / name
    if name == "tar.gz":
        (tmp_path / "rows.jsonl").write_bytes(ROW)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "rows.jsonl", "rows.jsonl")
        what, fix = "a tar archive", "tar -xf"
    else:
        raw, what, fix = FILES[name]
        path.write_bytes(raw)
    [problem] = problems_of(path)
    assert problem.startswith(("wrong file in ", "wrong encoding in ")) and f" in {path}: {what}" in problem
    assert fix in problem.partition(". ")[2] and len(problem) < 400


def test_a_real_zip_is_known(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("rows.jsonl", ROW)
    zipfile.ZipFile(tmp_path / "none.zip", "w").close()
    for name in ("a.zip", "none.zip"):
        assert "a zip archive" in problems_of(tmp_path / name)[0]


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.yaml", "a.parquet", "a", "a.xz", "a.html"])
def test_json_is_read_whatever_its_name(tmp_path, name):
    for raw in (ROW, gzip.compress(ROW), b"[" + ROW + b"]"):
        assert read([written(tmp_path / name, raw=raw)])[0].messages == PAIR


@pytest.mark.parametrize(
    "raw", [b"oops\n", b'{"q": "a" "a": "b"}\n', b'[{"q" "a"}', b"{'q': 'a', 'a': 'b'}\n{'q': 'c'}"]
)
def test_json_that_is_broken_is_still_named_by_its_line(tmp_path, raw):
    for name in ("a.jsonl", "a.json", "a"):
        problem = problems_of(written(tmp_path / name, raw=raw))[0]
        assert problem.startswith(f"broken JSON in {tmp_path / name}:1: ")
