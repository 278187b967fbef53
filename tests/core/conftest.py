"""Fixtures of the core's tests: the clinics and the server of one secure sum."""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fedpeft.errors import FedpeftError, OutOfOrder, UnknownPeer
from fedpeft.sealing import Identity
from fedpeft.secagg import (
    STAGES,
    Aggregation,
    ClinicSession,
    Layout,
    Quantiser,
    Session,
    State,
    Terms,
)
from fedpeft.secagg.masked_vector import masked_vector
from fedpeft.secagg.packing import unpack

INTEGERS = ("weight", "loss", "clipped")
Words = NDArray[np.uint32]


SESSION = Session(federation="north", run=7, round=3, attempt=1, kind="train", model=b"m" * 32)


def session_of(**changes: Any) -> Session:
    """Return the session that worlds are in, with some fields changed."""
    return replace(SESSION, **changes)


def keystream(seed: bytes, words: int) -> Words:
    """Return a mask, made here without the code that is tested."""
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * words)), "<u4")


class Update:
    """What a clinic adds, through the real ``masked_vector``; keeps what it was asked for."""

    def __init__(self, values: NDArray[np.float32], weight: int, loss: int, quantiser: Quantiser):
        self.values = values
        self.integers = {"weight": weight, "loss": loss}
        self.quantiser = quantiser
        self.add: Sequence[bytes] = ()
        self.subtract: Sequence[bytes] = ()
        self.packed = b""
        self.clipped = 0
        self.layout = Layout(values.size, INTEGERS, quantiser.bits, 1)

    def masked(self, clinics: int, add: Sequence[bytes], subtract: Sequence[bytes]) -> bytes:
        self.layout = Layout(self.values.size, INTEGERS, self.quantiser.bits, clinics)
        self.add, self.subtract = add, subtract
        self.packed, self.clipped = masked_vector(
            self.values,
            self.integers["weight"],
            self.integers,
            self.quantiser,
            self.layout,
            add,
            subtract,
        )
        return self.packed

    def masked_words(self) -> Words:
        """Return what the server sees of this clinic."""
        return unpack(self.packed, self.layout.words, self.layout.width)

    def words(self) -> Words:
        """Return the words below the masks, which the clinic itself never holds as a whole."""
        words = self.masked_words()
        for seed in self.add:
            words = words - keystream(seed, words.size)
        for seed in self.subtract:
            words = words + keystream(seed, words.size)
        return words & np.uint32(2**self.layout.width - 1)


class World:
    """The clinics and the server of one sum; tests carry, change and lose the messages."""

    def __init__(
        self,
        clinics: int,
        *,
        adversary: Any = "active",
        threshold: int | None = None,
        minimum: int = 3,
        session: Session | None = None,
        identities: Mapping[str, Identity] | None = None,
        values: Sequence[NDArray[np.float32]] | None = None,
        coordinates: int = 9,
        bits: int = 16,
    ) -> None:
        self.session = session or SESSION
        self.names = [f"c{number:03d}" for number in range(clinics)]
        self.identities = dict(identities or {name: Identity.generate() for name in self.names})
        self.pinned = {name: it.public.signing_bytes for name, it in self.identities.items()}
        self.quantiser = Quantiser(bits, 40.0)
        if values is None:
            random = np.random.default_rng(clinics)
            values = [random.normal(size=coordinates).astype(np.float32) for _ in self.names]
        self.updates = {
            name: Update(values[at], at % 7 + 1, secrets.randbelow(2**40), self.quantiser)
            for at, name in enumerate(self.names)
        }
        self.clinics = {
            name: ClinicSession(
                self.session,
                name,
                self.identities[name],
                self.updates[name],
                adversary=adversary,
                admit=self.admit,
            )
            for name in self.names
        }
        self.secrets = {name: clinic._secrets for name, clinic in self.clinics.items()}
        self.terms = Terms(
            identities=self.pinned,
            adversary=adversary,
            threshold=threshold,
            minimum=minimum,
            coordinates=values[0].size,
            integers=INTEGERS,
            quantiser=self.quantiser,
        )
        self.server = Aggregation(self.session, self.terms)
        self.answers: dict[str, dict[str, bytes]] = {stage: {} for stage in STAGES}

    def admit(self, peers: Mapping[str, bytes]) -> None:
        for name, key in peers.items():
            if self.pinned.get(name) != key:
                raise UnknownPeer(f"clinic {name} has another key")

    def step(self, *, absent: Collection[str] = (), lost: Collection[str] = ()) -> None:
        """Carry one stage: the absent get no request, the answers of the lost never arrive."""
        stage = self.server.stage
        for name, request in self.server.requests().items():
            if name not in absent:
                answer = self.clinics[name].receive(stage, request)
                if name not in lost:
                    self.server.receive(name, answer)
                    self.answers[stage][name] = answer
        self.server.close()

    def until(self, stage: str) -> dict[str, bytes]:
        """Carry all stages before ``stage`` and return its requests."""
        while self.server.stage != stage:
            self.step()
        return self.server.requests()

    def assert_refused(self, name: str, stage: str, data: bytes, error: type[FedpeftError]) -> None:
        """The request ends the clinic's session with exactly this error and no other answer."""
        self.assert_refuses(self.clinics[name], stage, data, error)

    @classmethod
    def assert_refuses(
        cls, clinic: ClinicSession, stage: str, data: bytes, error: type[FedpeftError]
    ) -> None:
        with pytest.raises(FedpeftError) as caught:
            clinic.receive(stage, data)
        assert type(caught.value) is error
        cls.assert_over(clinic)

    @staticmethod
    def assert_over(clinic: ClinicSession) -> None:
        """The session has forgotten its secrets, and nothing is ever answered again."""
        assert clinic.state is State.ENDED
        assert clinic._secrets is None
        assert clinic._contribution is None
        for stage in STAGES:
            with pytest.raises(OutOfOrder):
                clinic.receive(stage, b"")

    def run(self) -> Any:
        """Carry what is left and return the result."""
        self.until("done")
        return self.server.result


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    """Build the clinics and the server of a secure sum: ``make_world(clinics, ...)``."""
    return World


@pytest.fixture(scope="session")
def make_session():
    """Build a session that differs in the given fields: ``make_session(round=4)``."""
    return session_of


@pytest.fixture(scope="session")
def mask_of():
    """Return the words of a mask: ``mask_of(seed, words)``."""
    return keystream
