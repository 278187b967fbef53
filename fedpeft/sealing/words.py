"""A federation's fingerprint as ten words, which two people compare by telephone.

The words stand for 80 bits of a SHA-256 over all that an invitation makes a clinic trust:
the federation's name, its certificate authority and the server's identity. Whoever wants
to be taken for that server has to find a second federation with the same words.
"""

import hashlib
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedpeft.errors import EnrolmentError
from fedpeft.sealing.identity import PublicIdentity

COUNT: Final = 10
_DOMAIN: Final = b"fedpeft federation words, version 1\x00"
# No two differ in one letter only, so that a misheard word is no other word.
_LIST: Final = """
    acorn actor adobe after agent album alert alpha amber anchor angle apple april apron arena
    armor arrow artist aspen atlas attic autumn award bacon badge baker bamboo banjo barrel
    basil basket beach beaver beetle berry bishop blanket blossom bonus border bottle branch
    brick bridge bronze bucket butter button cabin cactus camel candle canoe carbon carpet
    castle cedar cello chalk cherry chess chimney cider circle citrus clover cobalt cocoa
    coffee comet copper coral cotton cradle crayon cricket crown crystal cuckoo curtain daisy
    dancer debate decade delta desert diamond dinner doctor dolphin donkey dragon drummer
    eagle early easel echo eight elbow elder elephant emerald empire engine envelope equator
    estate evening fabric falcon farmer feather fiddle figure filter flag flute forest fossil
    fountain friday frost funnel galaxy garden garlic ginger giraffe glacier goblet gospel
    granite gravel guitar hammer harbor harvest hazel helmet hermit hockey honey hotel humble
    iceberg igloo index iris island ivory jacket jasmine jelly jigsaw journal jumper jungle
    kernel kettle king kitchen koala ladder lagoon lantern lemon leopard lettuce library
    lizard lobster lumber magnet maple marble meadow melon mirror mohair mosaic muffin museum
    napkin nectar needle nickel noodle nutmeg oasis ocean olive onion opal orange orchid otter
    oven oxygen palace panda parcel parrot pebble pencil pepper piano pigeon pilot planet
    pocket polar pony potato prism pumpkin puzzle quartz quilt rabbit radar raisin raven
    ribbon river robin rubber saddle saffron salmon sandal scarf school shadow silver sister
    sketch spider stable sugar tablet tango thunder tiger tomato tractor trumpet tulip turtle
    umbrella uncle valley vanilla velvet violin walnut zebra
"""
WORDS: Final = tuple(_LIST.split())


def federation_words(federation: str, ca_pem: str, server: PublicIdentity) -> str:
    """Return the words of a federation, separated by spaces; both sides find the same.

    Raises:
        EnrolmentError: ``ca_pem`` is no certificate.
    """
    try:
        authority = x509.load_pem_x509_certificate(ca_pem.encode())
    except ValueError:
        raise EnrolmentError(
            "the CA certificate is damaged: use a fresh copy of the invitation"
        ) from None
    parts = (federation.encode(), authority.public_bytes(Encoding.DER), server.data)
    framed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    digest = hashlib.sha256(_DOMAIN + framed).digest()
    return " ".join(WORDS[byte] for byte in digest[:COUNT])


def same_words(one: str, other: str) -> bool:
    """Say whether two people mean the same words, whatever their case and spaces."""
    return one.lower().split() == other.lower().split()
