"""The exception of damaged bytes, which are reported and replaced, unlike a user's mistake."""

SKIP, USE = "skip", "use"  # what may be done with pictures of which a part is lost


class BrokenData(Exception):
    """Bytes that are not what they claim to be: an image, a tar member, a class id.

    Readers catch it per sample and report it; tools turn it into a `UserError` naming the file.
    """


class LostData(BrokenData):
    """Picture data are lost, but not all: the rest can be decoded, see `encoded.Encoded.pixels`."""
