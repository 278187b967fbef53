"""The specification of parcels says what the code does: its vectors are read by the page alone."""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, Mixing, TensorSpec, to_bytes
from fedpeft.protocol.parcel import MAGIC, Held, Increment, change, opened, whole

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "spec" / "parcel.md").read_text("utf-8")
FIRST_DIGEST, FIRST, SECOND_DIGEST, SECOND = (
    re.sub(r"\s", "", block) for block in re.findall(r"(?:^    [0-9a-f]+\n)+", PAGE, re.MULTILINE)
)
ROW = re.compile(r"^\| (first|second) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
HEADER_BYTES = 52
"""Of the wire format of an adapter."""
Adapter = dict[str, np.ndarray]


class Reader:
    """Reads parcels by the page. It knows two-dimensional float32 tensors, and no fedpeft."""

    def __init__(self) -> None:
        self.adapter: Adapter = {}
        self.products: list[bytes] = []
        self.wire = b""

    def read(self, parcel: bytes) -> None:
        assert parcel[:8] == b"FPPARC\x00\x01"
        (length,) = struct.unpack_from("<I", parcel, 8)
        header, rest = json.loads(parcel[12 : 12 + length]), parcel[12 + length :]
        assert header["basis"] in ("", self.digest())
        factors = [each for each in header["tensors"] if each[0][-8] in header["replaced"]]
        size = HEADER_BYTES + 4 * sum(rows * columns for _, rows, columns in factors)
        if factors:
            part, rest = np.frombuffer(rest[HEADER_BYTES:size], "<f4"), rest[size:]
            for name, rows, columns in factors:
                values, part = np.split(part, [rows * columns])
                self.adapter[name] = values.reshape(rows, columns)
        for name in sorted(self.adapter):
            if name[-8] == header["mixed"]:
                rank = self.adapter[name].shape[0 if name[-8] == "A" else 1]
                matrix, rest = np.frombuffer(rest[: 8 * rank**2], "<f8"), rest[8 * rank**2 :]
                pair = [matrix.reshape(rank, rank), self.adapter[name].astype("<f8")]
                left, right = pair if name[-8] == "A" else pair[::-1]
                self.adapter[name] = (left @ right).astype("<f4")
        self.products = self.products[: header["kept_products"]]
        for product in header["products"]:
            one, rest = rest[: product["length"]], rest[product["length"] :]
            self.products.append(one)
        assert rest == b""
        self.wire = self.written(header)

    def written(self, header: dict[str, Any]) -> bytes:
        keys = ("dtype", "fingerprint", "tensors")
        text = json.dumps({key: header[key] for key in keys}, separators=(",", ":"))
        values = b"".join(self.adapter[name].tobytes() for name, _, _ in header["tensors"])
        schema = hashlib.sha256(text.encode()).digest()
        return struct.pack("<8sHH32sQ", b"FPADAPT", 1, 1, schema, len(values) // 4) + values

    def digest(self) -> str:
        products = b"".join(hashlib.sha256(one).digest() for one in self.products)
        return hashlib.sha256(self.wire + products).hexdigest()

    def values(self) -> list[list[float]]:
        return [self.adapter[name].ravel().tolist() for name in sorted(self.adapter)]


def documented(which: str) -> tuple[list[list[float]], list[list[float]]]:
    """Return A and B, and the A and B of each product that is written out."""
    ((_, a, b, products),) = [row for row in ROW.findall(PAGE) if row[0] == which]
    pairs = [text for text in products.split("; ") if text != "the same"]
    return [numbers(a), numbers(b)], [numbers(pair.replace(" and ", ", ")) for pair in pairs]


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def test_the_vectors_are_read_by_the_page_alone():
    reader = Reader()
    for which, digest, parcel in (
        ("first", FIRST_DIGEST, FIRST),
        ("second", SECOND_DIGEST, SECOND),
    ):
        reader.read(bytes.fromhex(parcel))
        adapter, products = documented(which)
        assert reader.digest() == digest
        assert reader.values() == adapter
        found = [np.frombuffer(one[HEADER_BYTES:], "<f4").tolist() for one in reader.products]
        assert found[-len(products) :] == products


def held(which: str) -> Held:
    """Build what the page describes with the code."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    specs = TensorSpec(f"{name}.lora_A.weight", (1, 3)), TensorSpec(f"{name}.lora_B.weight", (2, 1))
    schema = AdapterSchema(specs, f"{0xFF:064x}")
    increments: list[Increment] = []
    for product in documented("first")[1] + (documented("second")[1] if which == "second" else []):
        rank = len(product) // 5
        state = AdapterState(schema.of_rank(rank), torch.tensor(product))
        increments.append(Increment(rank, to_bytes(state, "update")))
    a, b = documented(which)[0]
    return Held(AdapterState(schema, torch.tensor(a + b)), tuple(increments))


def test_the_vectors_are_what_the_code_writes_and_reads():
    first, second = held("first"), held("second")
    assert (first.digest, second.digest) == (FIRST_DIGEST, SECOND_DIGEST)
    assert whole(first).hex() == FIRST
    found = change(first, second, Mixing("A", np.full((1, 1, 1), 1.5)))
    assert found is not None and found.hex() == SECOND
    begun = opened(bytes.fromhex(FIRST), None, FIRST_DIGEST)
    assert opened(found, begun, SECOND_DIGEST).to_bytes() == second.to_bytes()


def test_the_vectors_show_every_part_of_a_header():
    for parcel, keys in ((FIRST, {"AB", ""}), (SECOND, {"B", "A"})):
        data = bytes.fromhex(parcel)
        assert data.startswith(MAGIC)
        (length,) = struct.unpack_from("<I", data, 8)
        header = json.loads(data[12 : 12 + length])
        assert {header["replaced"], header["mixed"]} == keys
        assert all(f"`{key}`" in PAGE for key in header)
