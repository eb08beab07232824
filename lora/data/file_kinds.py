"""Files that people give as data and that are no JSON: each is named, with how to convert it.

What a file is, its first bytes say. A text is known by its name, or by its first lines, once it is no JSON.
"""

import re
from pathlib import Path

START = 4096  # bytes that are looked at
Kind = tuple[str, str]  # the code of the problem; what the file is, and what to do

_PANDAS = "Convert it, for example with pandas: {}, then to_json(FILE, orient='records', lines=True, force_ascii=False)"
_DATASETS = "Convert it with datasets: Dataset.from_file(FILE).to_json(NEW)"
_UTF8 = ("ENCODING", "Convert it to UTF-8, for example with iconv -f {} -t UTF-8")

# First bytes -> what the file is, and what to do.
BINARY = {
    b"PAR1": ("a parquet file", "Write it as JSON lines first, for example with pandas: read_parquet, then "
              "to_json(orient='records', lines=True)"),
    b"ARROW1": ("an Arrow file", _PANDAS.format("read_feather")),
    b"FEA1": ("a Feather file", _PANDAS.format("read_feather")),
    b"\xff\xff\xff\xff": ("an Arrow stream, as datasets keeps its tables", _DATASETS),
    b"ORC": ("an ORC file", _PANDAS.format("read_orc")),
    b"Obj\x01": ("an Avro file", "Convert it to JSON lines, for example with fastavro"),
    b"\xfd7zXZ\x00": ("packed with xz", "Unpack it: xz -d"),
    b"]\x00\x00": ("packed with lzma", "Unpack it: xz -d --format=lzma"),
    b"BZh": ("packed with bzip2", "Unpack it: bzip2 -d"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", "Unpack it: zstd -d"),
    b"\x04\x22\x4d\x18": ("packed with lz4", "Unpack it: lz4 -d"),
    b"\x1f\x9d": ("packed with compress", "Unpack it: uncompress"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it: 7z x"),
    b"Rar!": ("a rar archive", "Unpack it: unrar x"),
    b"SQLite format 3\x00": ("an SQLite database", "Write its rows as JSON lines: sqlite3 -json FILE 'select ...'"),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "Save it as JSON lines or plain text"),
    b"\x89HDF": ("an HDF5 file", _PANDAS.format("read_hdf")),
    b"\x93NUMPY": ("a NumPy array", "Write its rows as JSON lines"),
    b"%PDF": ("a PDF", 'Take out its text: pdftotext; a document is a line {"text": "..."}'),
    b"GGUF": ("a GGUF model", "Give it as --model, and a file of conversations as --data"),
    b"\x89PNG": ("a picture", "Give a file of conversations"),
    b"\xff\xd8\xff": ("a picture", "Give a file of conversations"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "Fetch it: git lfs pull"),
}  # fmt: skip
ZIP = ("a zip archive or a spreadsheet", "Unpack it, or save it as JSON lines")
SHEETS = (".xlsx", ".xlsm", ".ods")
PICKLE = re.compile(rb"\x80[\x02-\x05]")

# Ends of names -> the same, of a text that is no JSON
_TEXT = 'Write each document as a line {"text": "..."}, each pair as {"prompt": "...", "completion": "..."}'
_YAML = "Write each row as a line of JSON: json.dumps of each that yaml.safe_load reads"
_PAGE = ("a page of the web", "Download the file itself, by its raw or resolve address")
TEXT = {
    ".csv": ("a CSV table", _PANDAS.format("read_csv")),
    ".tsv": ("a table with tabs", _PANDAS.format("read_csv(FILE, sep='\\t')")),
    ".txt": ("plain text", _TEXT), ".text": ("plain text", _TEXT), ".md": ("Markdown", _TEXT),
    ".rst": ("plain text", _TEXT), ".tex": ("LaTeX", _TEXT), ".log": ("plain text", _TEXT),
    ".yaml": ("YAML", _YAML), ".yml": ("YAML", _YAML),
    ".toml": ("TOML", "Settings are given as --config; write each row as a line of JSON"),
    ".xml": ("XML", "Write each row as a line of JSON"), ".html": _PAGE, ".htm": _PAGE,
    ".py": ("a Python program", "Run it, and give the file that it writes"),
}  # fmt: skip


def of_bytes(start: bytes, name: str) -> Kind | None:
    """What a file is whose first bytes are no text; None for a text, and for gzip."""
    for magic, encoding in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"),
                            (b"\xfe\xff", "UTF-16")):  # fmt: skip
        if start.startswith(magic):
            return _UTF8[0], f"{encoding}. {_UTF8[1].format(encoding)}"
    if re.match(rb"[\t\r\n -~]\0[\t\r\n -~]\0", start) or re.match(rb"\0[\t\r\n -~]\0[\t\r\n -~]", start):
        encoding = "UTF-16BE" if start[:1] == b"\0" else "UTF-16LE"
        return _UTF8[0], f"{encoding}. {_UTF8[1].format(encoding)}"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        sheet = name.lower().endswith(SHEETS)
        what, fix = ("a spreadsheet", _PANDAS.format("read_excel")) if sheet else ZIP
        return "FILE", f"{what}. {fix}"
    for magic, (what, fix) in BINARY.items():
        if start.startswith(magic):
            return "FILE", f"{what}. {fix}"
    if PICKLE.match(start):
        return "FILE", "a pickle, which can run code and is not opened here. Write its rows as JSON lines"
    if start[257:262] == b"ustar":
        return "FILE", "a tar archive. Unpack it: tar -xf"
    return None


def of_text(start: bytes, name: str) -> Kind | None:
    """What a text is that is no JSON; None where nothing but broken JSON can be said."""
    ends = [end.lower() for end in Path(name).suffixes if end.lower() != ".gz"]
    what = TEXT.get(ends[-1]) if ends else None
    text = start.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text[:1] not in ("{", "["):
        lines = text.splitlines()[:2]
        if re.match(r"<(!doctype|html)", text, re.IGNORECASE):
            what = _PAGE
        elif what is None and text.startswith(("---\n", "- ")):
            what = TEXT[".yaml"]
        elif what is None:
            for mark, end in (("\t", ".tsv"), (",", ".csv"), (";", ".csv")):
                if len(lines) == 2 and 0 < lines[0].count(mark) <= lines[1].count(mark):
                    what = TEXT[end]
                    break
    return ("FILE", ". ".join(what)) if what else None
