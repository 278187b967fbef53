"""Say who signed this bundle; exit 1 if nobody did. Needs Python alone, and writes nothing.

usage: python3 check_signature.py DIRECTORY

Ed25519 as in RFC 8032, section 5.1.7, for the machine where no library is installed yet.
It is slow and not for signing: nothing secret passes through it. It runs from a bundle
that is being checked, so it imports nothing of fedpeft.
"""

import base64
import hashlib
import sys
from pathlib import Path

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)
DOMAIN = b"fedpeft offline bundle, version 1\0"
IDENTITY_BYTES = 1249
Point = tuple[int, int, int, int]
"""X, Y, Z, T: extended coordinates, RFC 8032, section 5.1.4."""
NEUTRAL: Point = (0, 1, 1, 0)


def add(p: Point, q: Point) -> Point:
    """Return p + q."""
    a = (p[1] - p[0]) * (q[1] - q[0]) % P
    b = (p[1] + p[0]) * (q[1] + q[0]) % P
    c = 2 * p[3] * q[3] * D % P
    d = 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return (e * f % P, g * h % P, f * g % P, e * h % P)


def times(scalar: int, point: Point) -> Point:
    """Return scalar * point."""
    total = NEUTRAL
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point = add(point, point)
        scalar >>= 1
    return total


def same(p: Point, q: Point) -> bool:
    """Say whether two points are one."""
    return (p[0] * q[2] - q[0] * p[2]) % P == 0 == (p[1] * q[2] - q[1] * p[2]) % P


def point_of(data: bytes) -> Point | None:
    """Return the point that 32 bytes encode, or None."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (1 << 255) - 1
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * ROOT_OF_MINUS_ONE % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return (x, y, 1, x * y % P)


def verifies(key: bytes, signature: bytes, message: bytes) -> bool:
    """Say whether the holder of ``key`` (32 bytes) signed ``message`` (64 bytes signature)."""
    if len(key) != 32 or len(signature) != 64:
        return False
    a, r = point_of(key), point_of(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    # Under a key of small order anybody can sign.
    if a is None or r is None or s >= L or same(times(8, a), NEUTRAL):
        return False
    digest = hashlib.sha512(signature[:32] + key + message).digest()
    h = int.from_bytes(digest, "little") % L
    base = point_of((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))
    return base is not None and same(times(s, base), add(r, times(h, a)))


def signer_of(directory: Path) -> str | None:
    """Return the fingerprint of the identity that signed the bundle, or None."""
    try:
        text = (directory / "signer.identity").read_text("ascii").strip()
        identity = base64.b64decode(text.encode(), altchars=b"-_", validate=True)
        signature = bytes.fromhex((directory / "SHA256SUMS.sig").read_text("ascii").strip())
        sums = (directory / "SHA256SUMS").read_bytes()
    except (OSError, ValueError):
        return None
    if len(identity) != IDENTITY_BYTES or identity[:1] != b"\1":
        return None
    message = DOMAIN + hashlib.sha256(sums).digest()
    if not verifies(identity[1:33], signature, message):
        return None
    digest = hashlib.sha256(identity).hexdigest()[:32]
    return "-".join(digest[at : at + 4] for at in range(0, 32, 4))


if __name__ == "__main__":
    signer = signer_of(Path(sys.argv[1]))
    if signer is None:
        sys.exit(1)
    sys.stdout.write(signer + "\n")
