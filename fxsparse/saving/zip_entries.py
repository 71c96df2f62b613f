"""Read the zip file that torch writes, and nothing that two readers could read in two ways.

The check of a file is worth nothing if torch then reads another file: Python's zipfile and torch's reader (miniz) find
the central directory in different ways, trust different copies of a size, and differ over bytes that belong to no
entry, over duplicate names and over upper and lower case. So this reader takes only what `fxsparse.save` lays out:
entries stored without compression one right after the other from the first byte on, each with a local header that says
what the central directory says, then the central directory, then one end record, and nothing before, between or after
them. That limits a file to 4 GiB.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import BinaryIO, NamedTuple

from fxsparse.errors import FxsparseError

REMEDY = "Get the file again from where it was saved, or save the model again."

_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = struct.Struct("<4s3I")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_UTF8, _WITH_DESCRIPTOR = 0x0800, 0x0008
# By torch and by Python's zipfile: version made by, version needed; internal and external attributes.
_VERSIONS = ((0, 0), (0x0014, 20), (0x0314, 20))
_ATTRIBUTES = ((0, 0), (0, 0o600 << 16))
_CHUNK = 1 << 20


class Entry(NamedTuple):
    """One stored file: its name below the archive's root folder and where its bytes are."""

    name: str
    offset: int
    size: int
    crc: int


class Archive:
    """The entries of a zip file that torch wrote."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        """Read the central directory, and compare every local header with it; no content is read.

        Args:
            file: open for reading bytes.
            path: names the file in errors.

        Raises:
            FxsparseError: this is no zip file, or not one as torch lays it out.
        """
        self.path = path
        self._file = file
        self.entries = {entry.name: entry for entry in self._read_directory()}

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of an entry.

        Args:
            name: of an entry that exists.
            limit: the most bytes that it may have.

        Raises:
            FxsparseError: it is longer, or its checksum is wrong.
        """
        entry = self.entries[name]
        if entry.size > limit:
            raise self.broken(f"the entry '{name}' has {entry.size} bytes; at most {limit} can be meant")
        content = self._at(entry.offset, entry.size)
        if zlib.crc32(content) != entry.crc:
            raise self.broken(f"the checksum of the entry '{name}' is wrong")
        return content

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of an entry's content in hexadecimal; memory does not grow with the entry.

        Raises:
            FxsparseError: its checksum is wrong.
        """
        entry = self.entries[name]
        digest, crc = hashlib.sha256(), 0
        for start in range(0, entry.size, _CHUNK):
            chunk = self._at(entry.offset + start, min(_CHUNK, entry.size - start))
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
        if crc != entry.crc:
            raise self.broken(f"the checksum of the entry '{name}' is wrong")
        return digest.hexdigest()

    def broken(self, what: str) -> FxsparseError:
        """Return the error for a damaged file."""
        return FxsparseError(f"'{self.path}' is damaged or was changed: {what}. {REMEDY}")

    def _foreign(self) -> FxsparseError:
        return FxsparseError(
            f"'{self.path}' is no file that fxsparse.save wrote, or it is cut off or over 4 GiB: it does not end as "
            f"one. {REMEDY}"
        )

    def _at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        content = self._file.read(size)
        if len(content) != size:
            raise self.broken(f"it ends before byte {offset + size}")
        return content

    def _read_directory(self) -> list[Entry]:
        size = self._file.seek(0, 2)
        if size < _END.size:
            raise self._foreign()
        at = size - _END.size
        end = _END.unpack(self._at(at, _END.size))
        count, length, start = end[4:7]
        if end != (b"PK\x05\x06", 0, 0, count, count, length, start, 0) or start + length != at:
            raise self._foreign()
        directory = self._at(start, length)
        found, roots, cursor, offset = [], set(), 0, 0
        for number in range(count):
            if cursor + _CENTRAL.size > length:
                raise self.broken(f"its directory ends before entry {number} of {count}")
            fields = _CENTRAL.unpack_from(directory, cursor)
            (_, _, _, flags, _, *date, crc, _, size, name_length, _, _, _, _, _, _) = fields
            cursor += _CENTRAL.size + name_length
            name = directory[cursor - name_length : cursor]
            # No compression, extra fields, comments or other disks.
            start_of_entry = (b"PK\x01\x02", *fields[1:3], flags, 0, *date, crc, size, size, name_length, 0, 0, 0)
            known = (
                fields[1:3] in _VERSIONS and fields[14:16] in _ATTRIBUTES and not flags & ~(_UTF8 | _WITH_DESCRIPTOR)
            )
            if fields != (*start_of_entry, *fields[14:16], offset) or not known:
                raise self.broken(f"entry {number} of its directory is not as it was saved")
            root, text = self._split_name(name, number)
            roots.add(root)
            data = self._check_local(offset, name, fields[2:4], date, crc, size)
            found.append(Entry(text, data, size, crc))
            offset = data + size + (_DESCRIPTOR.size if flags & _WITH_DESCRIPTOR else 0)
        if offset != start or cursor != length:
            raise self.broken("bytes in it belong to no entry")
        if len(roots) > 1:
            raise self.broken("its entries are not in one folder")
        if len({entry.name.lower() for entry in found}) != len(found):  # torch's reader ignores case
            raise self.broken("two of its entries have one name")
        return found

    def _split_name(self, name: bytes, number: int) -> tuple[bytes, str]:
        root, _, text = name.partition(b"/")
        if b"\0" in root or root in (b"", b".", b"..") or not text.isascii():
            raise self.broken(f"the name of entry {number} is none that is saved")
        return root, text.decode("ascii")

    def _check_local(
        self, offset: int, name: bytes, version_and_flags: tuple[int, int], date: list[int], crc: int, size: int
    ) -> int:
        """Compare an entry's local header and descriptor with the directory; return where its bytes begin."""
        fields = _LOCAL.unpack(self._at(offset, _LOCAL.size))
        name_length, extra_length = fields[9:]
        later = version_and_flags[1] & _WITH_DESCRIPTOR  # then the descriptor after the data has them
        numbers = (0, 0, 0) if later else (crc, size, size)
        wanted = (b"PK\x03\x04", *version_and_flags, 0, *date, *numbers, len(name), extra_length)
        here = self._at(offset + _LOCAL.size, name_length + extra_length) if fields == wanted else b""
        extra = here[name_length:]
        padding = b"FB" + struct.pack("<H", max(len(extra) - 4, 0)) + b"Z" * (len(extra) - 4)
        if not here or here[:name_length] != name or extra not in (padding, b""):
            raise self.broken(f"the header at byte {offset} is not that of its entry")
        data = offset + _LOCAL.size + len(here)
        if later and _DESCRIPTOR.unpack(self._at(data + size, _DESCRIPTOR.size)) != (b"PK\x07\x08", crc, size, size):
            raise self.broken(f"the sizes after byte {data + size} are not those of its entry")
        return data
