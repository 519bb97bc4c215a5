"""The samples of a WebDataset archive: members that lie beside each other and share a key.

A member's key is its path up to the first dot of its name, and the rest is what it is of the sample: `a/7.png`, `a/7.cls`,
`a/7.mask.png`. Where no member of a key is the image itself, the names have dots of their own (`7.5.png`), and the key reaches
to the last one. Nothing is ever unpacked, no link is followed, and what is hidden is left out, as in folders.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import NamedTuple, Self

from genscale.data.folders import is_hidden
from genscale.errors import UserError

LABELS = ("cls", "json")
FIELDS = 16
"""Images of one key at most that are told apart by what follows its first dot; more are samples of their own."""
MEMBERS = 1000
"""Images and labels with one key at most."""
HEADER_BYTES = LABEL_BYTES = 2**20
"""Most bytes of a name or an extended header (tarfile reads it as a whole), and of a label."""
LONG_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class CheckedInfo(tarfile.TarInfo):
    """Headers of tarfile that end in an error where they are damaged, not in the end of the archive, or are far too long."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from None

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in LONG_HEADERS and self.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes at byte {self.offset:,}")
        return super()._proc_member(archive)  # type: ignore[misc]


class Member(NamedTuple):
    """A file of an archive; its content where the archive is streamed, for what was stepped over is gone there."""

    info: tarfile.TarInfo
    content: bytes | None


class Left:
    """Files that belong to no image: how many, and the first one's name."""

    count, first = 0, ""

    def add(self, name: str, count: int = 1) -> None:
        self.first = self.first or name
        self.count += count


class Group:
    """Images and labels that share a key, by what they are (lower case).

    Attributes:
        offset: the byte of the first one.
        others: what else has the key.
    """

    def __init__(self, key: str, offset: int, members: dict[str, Member] | None = None) -> None:
        self.key, self.offset, self.members, self.others = key, offset, members or {}, Left()

    @property
    def image(self) -> str | None:
        """What the image is; None where there is none."""
        return next((what for what in self.members if "." not in what and what not in LABELS), None)

    @property
    def dotted(self) -> int:
        """Images of names with further dots."""
        return sum("." in what and what.rpartition(".")[2] not in LABELS for what in self.members)


class Archive:
    """Reads the groups of an open archive.

    Args:
        endings: of images.
        limit: bytes of an image that are read, and one more.
        where: the source and the archive, for messages.
        streamed: it cannot be read backwards.

    Attributes:
        left: what belonged to no image, so far.
    """

    def __init__(self, archive: tarfile.TarFile, endings: tuple[str, ...], limit: int, where: str, streamed: bool) -> None:
        self._archive, self._limit, self._where, self._streamed = archive, limit, where, streamed
        self._wanted = {*(ending.removeprefix(".") for ending in endings), *LABELS}
        self.left = Left()

    def groups(self) -> Iterator[tuple[int, list[Group]]]:
        """(byte at which they start, samples with one key). Raises UserError for two members of the same name."""
        group = Group("", 0)
        for info in self._archive:
            self._archive.members = []  # type: ignore[attr-defined]  # tarfile keeps a list of all it has seen
            folder, _, base = info.name.rpartition("/")
            stem, _, what = base.partition(".")
            if info.isdir():
                continue
            if not stem or any(is_hidden(part) for part in folder.split("/") if part.strip(".")):
                self.left.add(info.name)
                continue
            key = f"{folder}/{stem}" if folder else stem
            if group.key != key:
                yield group.offset, self._samples(group)
                group = Group(key, info.offset)
            elif len(group.members) > FIELDS and not group.image and group.dotted > FIELDS:
                rest = self._last(group)
                yield group.offset, self._samples(group)
                group = rest
            self._add(group, what.lower(), info)
        yield group.offset, self._samples(group)

    def _add(self, group: Group, what: str, info: tarfile.TarInfo) -> None:
        if not info.isfile() or what.rpartition(".")[2] not in self._wanted:
            group.others.add(info.name)
            return
        if what in group.members:
            raise UserError(f"{self._where} has {info.name} twice, or in another case; give every image a name of its own")
        if len(group.members) >= MEMBERS:
            raise UserError(f"{self._where} has more than {MEMBERS:,} images and labels of the name {group.key}; give every "
                            "image a name of its own")
        group.members[what] = Member(info, self._content(info) if self._streamed else None)

    def read(self, member: Member) -> bytes:
        """What is in it, up to the limit and one byte more."""
        return self._content(member.info) if member.content is None else member.content

    def _content(self, info: tarfile.TarInfo) -> bytes:
        limit = LABEL_BYTES if info.name.lower().endswith(LABELS) else self._limit
        file = self._archive.extractfile(info)
        assert file is not None  # a link and a folder are passed over
        return file.read(min(info.size, limit + 1))

    def _last(self, group: Group) -> Group:
        """The last of many samples whose names have dots, taken out of the group, for more of it may follow."""
        name = next(reversed(group.members)).rpartition(".")[0]
        taken = {what: group.members.pop(what) for what in list(group.members) if what.rpartition(".")[0] == name}
        return Group(group.key, next(iter(taken.values())).info.offset, taken)

    def _samples(self, group: Group) -> list[Group]:
        if group.image:
            for what, member in group.members.items():
                if what != group.image and what.rpartition(".")[2] not in LABELS:
                    self.left.add(member.info.name)
            return [group]
        parts: dict[str, Group] = {}
        for what, member in group.members.items():
            name, _, last = what.rpartition(".")
            parts.setdefault(name, Group(f"{group.key}.{name}", group.offset)).members[last] = member
        shared = parts.pop("", Group("", 0)).members
        samples = [part for part in parts.values() if part.image]
        unused = [] if samples else list(shared.values())
        for part in parts.values():
            unused += part.members.values() if not part.image else ()
            part.members = {**shared, **part.members}  # of `a.left.png`, `a.right.png` and `a.cls`, the label is of both
        for name in [member.info.name for member in unused]:
            self.left.add(name)
        if not samples and group.others.count:
            self.left.add(group.others.first, group.others.count)
        return samples
