"""List the files of a data set while it is fetched, and write `manifest.json`."""

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import sqlite3
import threading
import unicodedata
from itertools import accumulate
from pathlib import Path
from typing import IO

from adfm.errors import AdfmError

MANIFEST = "manifest.json"
STATE = ".fetch"  # folder of the ledger and of unfinished downloads; removed at the end


class Ledger:
    """The finished files of a folder, listed on disk, so that a fetch that was killed can be resumed.

    Threads may share it. The files of another `source` are removed.
    """

    def __init__(self, folder: Path, source: str) -> None:
        # SQLite: memory does not grow with the number of files.
        self.folder = folder
        self._lock = threading.Lock()
        self._claimed_folder = ""
        try:
            self._database = self._open(source)
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from error
        except sqlite3.DatabaseError:  # of another source, or the machine went down while it was written
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._database = self._open(source)
        self._ignores_case = ignores_case(folder / STATE)
        # The paths that are claimed: of use to this process only, so in one transaction.
        (folder / STATE / "names.sqlite").unlink(missing_ok=True)
        self._names = self._connect("names.sqlite", "OFF", one_thread=True)
        self._names.execute("CREATE TABLE names (key PRIMARY KEY, path, origin, folder) WITHOUT ROWID")
        self._names.execute("BEGIN")

    def _connect(self, name: str, journal: str, one_thread: bool) -> sqlite3.Connection:
        # Network file systems often have no locks; one process alone works in this folder.
        uri = f"{(self.folder / STATE / name).resolve().as_uri()}?nolock=1"
        with contextlib.ExitStack() as stack:
            database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=one_thread)
            stack.callback(database.close)
            # No waiting for the disk: if the machine goes down and damages the file, the fetch starts over.
            database.execute("PRAGMA synchronous = OFF")
            database.execute(f"PRAGMA journal_mode = {journal}")
            stack.pop_all()
        return database

    def _open(self, source: str) -> sqlite3.Connection:
        (self.folder / STATE).mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            database = self._connect("ledger.sqlite", "TRUNCATE", one_thread=False)
            stack.callback(database.close)
            database.execute("CREATE TABLE IF NOT EXISTS source (name PRIMARY KEY)")
            columns = "path PRIMARY KEY, size, sha256, tag, version, current"
            database.execute(f"CREATE TABLE IF NOT EXISTS files ({columns}) WITHOUT ROWID")
            database.execute("INSERT OR IGNORE INTO source VALUES (?)", (source,))
            if database.execute("SELECT count(*) FROM source").fetchone() != (1,):
                raise sqlite3.DatabaseError(f"not of {source}")
            database.execute("UPDATE files SET current = 0")
            stack.pop_all()
        return database

    def close(self) -> None:
        """Close the ledger; the same folder and source open it again."""
        self._database.close()
        self._names.close()

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        with self._lock:
            try:
                return self._database.execute(statement, values)
            except sqlite3.OperationalError as error:
                raise self._unwritable(error) from error

    def _unwritable(self, error: sqlite3.Error) -> AdfmError:
        return AdfmError(f"{self.folder}: cannot be written ({error}); free some space or choose another folder.")

    def claim(self, path: str, origin: str) -> str | None:
        """Reserve a path for a file of the source, so that no two files become one. Call it from one thread only.

        Args:
            path: Relative to the folder, with `/`, normalised.
            origin: What the source calls the file.

        Returns:
            The problem that another file of the source has that place; `None` if it is free.
        """
        # Files come folder by folder: the folders above one are claimed once.
        if (folder := posixpath.dirname(path)) != self._claimed_folder:
            for above in accumulate(folder.split("/"), posixpath.join):
                if taken := self._taken(above, origin, folder=True):
                    return taken
            self._claimed_folder = folder
        return self._taken(path, origin, folder=False)

    def _taken(self, path: str, origin: str, folder: bool) -> str | None:
        if not path:
            return None
        # Disks that people copy data sets to have one name for both normalisations, if this one has two.
        key = unicodedata.normalize("NFC", path)
        if self._ignores_case:
            key = unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())
        try:
            row = self._names.execute("SELECT path, origin, folder FROM names WHERE key = ?", (key,)).fetchone()
            if not row:
                self._names.execute("INSERT INTO names VALUES (?, ?, ?, ?)", (key, path, origin, folder))
                return None
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from error
        other_path, other, other_folder = row
        if folder and other_folder and other_path == path:
            return None
        if other_folder != folder:
            return f"is both a file and a folder, because of {other!r}; rename one"
        if other == origin:
            return "is there twice; remove one"
        if other_path == path:
            return f"becomes the same file as {other!r}; rename one"
        if unicodedata.normalize("NFC", other_path) == unicodedata.normalize("NFC", path):
            return (
                f"has the same name as {other!r} but for its Unicode normalisation ({path!a} and "
                f"{other_path!a}), which is one name on many disks; rename one"
            )
        return f"differs from {other!r} only in case, and the disk of {self.folder} ignores case; rename one"

    def holds(self, path: str, tag: str) -> bool:
        """Return whether an earlier attempt has left that file whole; if so, enter it for this attempt."""
        row = self._execute("SELECT size FROM files WHERE (path, tag) = (?, ?)", path, tag).fetchone()
        if row and (file := self.folder / path).is_file() and file.stat().st_size == row[0]:
            self._execute("UPDATE files SET current = 1 WHERE path = ?", path)
            return True
        return False

    def add(self, path: str, size: int, sha256: str, tag: str = "", version: str = "") -> None:
        """Enter a file that is whole and in its place, instead of an earlier entry.

        The source names its content by `tag`, an ETag or an MD5, and this version of the file by `version`.
        """
        self._execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, 1)", path, size, sha256, tag, version)

    def store(self, path: str, content: IO[bytes]) -> None:
        """Write a file and enter it.

        Raises:
            FileExistsError: There is one of that name.
        """
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        sha256 = hashlib.sha256()
        with target.open("xb") as file:
            while chunk := content.read(2**20):
                file.write(chunk)
                sha256.update(chunk)
            size = file.tell()
        self.add(path, size, sha256.hexdigest())

    def sweep(self) -> None:
        """Remove files of earlier attempts that the source no longer has."""
        for root, _, names in os.walk(self.folder, topdown=False):
            folder = Path(root)
            if self.folder / STATE in (folder, *folder.parents):
                continue
            for name in names:
                path = (folder / name).relative_to(self.folder).as_posix()
                if not self._execute("SELECT 1 FROM files WHERE path = ? AND current", path).fetchone():
                    (folder / name).unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty
        self._execute("DELETE FROM files WHERE NOT current")

    def finish(self, source: dict[str, str], tag: str = "etag") -> tuple[int, int]:
        """Write `manifest.json`: facts about the source, and path, size, SHA-256 and, as `tag`, the tag of each file.

        Returns:
            The number of files, and of their bytes.

        Raises:
            AdfmError: The source holds no file, or one that has the name of the manifest.
        """
        self._execute("DELETE FROM files WHERE path LIKE ?", f"{STATE}/%")
        own = self.folder / MANIFEST
        if own.exists():
            with own.open("rb") as file:
                if file.read(13) != b'{\n "source": ':
                    raise AdfmError(f"{source['source']}: holds a {MANIFEST}, which adfm writes itself; rename it.")
            self._execute("DELETE FROM files WHERE path = ?", MANIFEST)
        rows = self._execute("SELECT path, size, sha256, tag, version FROM files ORDER BY path")
        # Row by row: memory does not grow with the number of files.
        with own.open("w", encoding="utf-8") as file:
            facts = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in source.items())
            file.write(f'{{\n{facts} "files": [')
            separator = "\n"
            for path, size, sha256, its_tag, version in rows:
                entry = {"path": path, "size": size, "sha256": sha256, tag: its_tag, "version": version}
                file.write(f"{separator}  {json.dumps({key: value for key, value in entry.items() if value != ''})}")
                separator = ",\n"
            file.write("\n ]\n}\n")
        if separator == "\n":
            own.unlink()
            raise AdfmError(f"{source['source']}: holds no file; give a folder, archive or prefix with a data set.")
        count, total = self._execute("SELECT count(*), sum(size) FROM files").fetchone()
        self.close()
        shutil.rmtree(self.folder / STATE)
        return count, total


def ignores_case(path: Path) -> bool:
    """Return whether the disk of a path that exists, with letters in its name, ignores case."""
    return path.with_name(path.name.swapcase()).exists()
