"""llama.cpp's own quantisation, called in the library that will run the files.

The functions are exported by the extension of ``xllamacpp``, which has no Python names for
them. Knows nothing of models or files.
"""

import ctypes
import functools
import importlib.util

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from fedpeft.errors import NotConvertible

_EXTENSION = "xllamacpp.xllamacpp"


def quantise(rows: NDArray[np.float32], encoding: GGMLQuantizationType) -> bytes:
    """Return ``rows`` (count, width) as llama.cpp encodes them without an importance matrix.

    Raises:
        NotConvertible: the library is not here, or is of another release.
    """
    library = _library()
    source = np.ascontiguousarray(rows, dtype=np.float32)
    count, width = source.shape
    size = library.ggml_row_size(encoding, width) * count
    target = ctypes.create_string_buffer(size)
    written = library.ggml_quantize_chunk(
        encoding, source.ctypes.data, target, 0, count, width, None
    )
    if written != size:
        raise NotConvertible(
            f"llama.cpp wrote {written} bytes of {encoding.name} where {size} were expected; "
            "install the release of xllamacpp that fedpeft asks for"
        )
    return target.raw


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        found = importlib.util.find_spec(_EXTENSION)
        if found is None or found.origin is None:
            raise OSError  # put into words below
        library = ctypes.CDLL(found.origin)
        row_size, chunk = library.ggml_row_size, library.ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        raise NotConvertible(
            "the library of llama.cpp that quantises weights is not here; install the release of "
            "xllamacpp that fedpeft asks for, or use a base model of 16 bits"
        ) from None
    row_size.restype = chunk.restype = ctypes.c_size_t
    row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    chunk.argtypes = [
        ctypes.c_int,
        *(ctypes.c_void_p,) * 2,
        *(ctypes.c_int64,) * 3,
        ctypes.c_void_p,
    ]
    return library
