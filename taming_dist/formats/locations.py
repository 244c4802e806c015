"""Where a file lies: a local path or a URL, as a string; nothing is opened here."""

from pathlib import Path
from urllib.parse import quote

from taming_dist.errors import UserError

WEB = ("http", "https")
# What brings each scheme of fsspec; None: fsspec itself, or a dependency of this package.
OBJECT_STORES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "hf": None,
    "memory": None,
}
SCHEMES = (*WEB, *OBJECT_STORES)


def is_url(location: str) -> bool:
    """Whether a location is a URL, of any scheme."""
    return "://" in location or location.startswith("pipe:")


def is_web(location: str) -> bool:
    """Whether a location is on a web server."""
    return location.startswith(("http://", "https://"))


def shown(location: str) -> str:
    """A location as it may stand in logs: without user, password and query (signatures)."""
    if not is_url(location) or location.startswith("pipe:"):
        return location
    scheme, _, rest = _split_query(location)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _split_query(location: str) -> tuple[str, str]:
    """A location without its query, and the query; names in stores may hold question marks."""
    if not is_web(location):
        return location, ""
    base, mark, query = location.partition("?")
    return base, mark + query


def file_name(location: str) -> str:
    """The last part of a location's path."""
    return _split_query(location)[0].rpartition("/")[2]


def folder_of(location: str) -> str:
    """The folder that a file lies in, as a location."""
    if not is_url(location):
        return str(Path(location).parent)
    base, query = _split_query(location)
    return base.rpartition("/")[0] + query


def beside(folder: str, name: str) -> str:
    """The location of the file `name`, a plain file name, in a folder."""
    if not is_url(folder):
        return str(Path(folder) / name)
    base, query = _split_query(folder)
    if is_web(folder):
        name = quote(name)
    return f"{base.rstrip('/')}/{name}{query}"


def check_scheme(location: str) -> None:
    """Raise `UserError` for a URL that cannot be read by ranges."""
    if location.startswith("pipe:"):
        raise UserError(
            f"{location!r}: a pipe has no byte ranges; it can be read with data.streaming=true "
            f"data.allow_pipe=true only"
        )
    if not is_url(location):
        return
    scheme = location.partition("://")[0]
    # fsspec takes a double colon for the mark of a chain, whose end may be any file system.
    if scheme not in SCHEMES or (scheme in OBJECT_STORES and "::" in location):
        raise UserError(
            f"{shown(location)}: cannot read {scheme}://; give a local path or one of "
            f"{', '.join(f'{known}://' for known in SCHEMES)}"
        )
