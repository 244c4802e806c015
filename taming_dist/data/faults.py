"""The exception of damaged bytes, which are reported and replaced, unlike a user's mistake."""


class BrokenData(Exception):
    """Bytes that are not what they claim to be: an image, a tar member, a class id.

    Readers catch it per sample and report it; tools turn it into a `UserError` naming the file.
    """
