"""The exceptions of samples: of bytes that are damaged, and of a class that is none."""

SKIP, USE = "skip", "use"  # what may be done with pictures of which a part is lost


class BrokenData(Exception):
    """Bytes that are not what they claim to be: an image, a tar member, a class id.

    Readers catch it per sample and report it; tools turn it into a `UserError` naming the file.
    """


class LostData(BrokenData):
    """Picture data are lost, but not all: the rest can be decoded, see `encoded.Encoded.rest`."""


class BrokenClass(Exception):
    """The class of a sample that cannot be used, where classes were asked for.

    No other sample takes its place, as for a damaged image: wrong classes come from a mistake that
    concerns many. Whoever knows the shard turns it into a `UserError`.
    """
