"""Arrays as npy files of version 1.0 in C order, written and read without copying."""

import io
import tokenize

import numpy as np

from taming_dist.formats.faults import BrokenData

MAX_HEADER = 2**12
# what parsing damaged bytes as the header of an npy file, a Python literal, can raise
DAMAGE = (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError, RecursionError)
STORED_TYPES = tuple(
    map(np.dtype, (np.uint8, np.uint16, np.int32, np.int64, np.float16, np.float32))
)


def to_npy(array: np.ndarray) -> bytes:
    """The npy file of an array."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def from_npy(data: memoryview) -> np.ndarray:
    """The array in an npy file, as a view of it.

    Raises:
        BrokenData: it is damaged, or of another version, type or order.
    """
    file = io.BytesIO(data[:MAX_HEADER])
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise BrokenData("an unsupported npy version")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if is_fortran or dtype not in STORED_TYPES:
            raise BrokenData(f"an npy of unsupported type or order ({dtype})")
        count = int(np.prod(shape))
        return np.frombuffer(data, dtype, count, file.tell()).reshape(shape)
    except DAMAGE as error:
        raise BrokenData(str(error) or type(error).__name__) from error
