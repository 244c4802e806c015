"""The exceptions of samples: damaged bytes, and invalid classes."""

SKIP, USE = "skip", "use"  # what may be done with pictures that are partly lost


class BrokenData(Exception):
    """Bytes that are not what they claim to be: an image, a tar member, a class id.

    Readers catch it per sample and report it; tools turn it into a `UserError` naming the file.
    """


class LostData(BrokenData):
    """Part of the picture data is lost; the rest can be decoded, see `encoded.Encoded.rest`."""


class BrokenClass(Exception):
    """A sample's class cannot be used although classes were requested.

    Unlike a damaged image, the sample is not replaced: a wrong class usually means that many are
    wrong. The caller that knows the shard turns it into a `UserError`.
    """
