"""Secure aggregation of 3,000,000 parameters: what masking costs beyond the keystreams.

One process, one thread. All contestants take turns, so that noise of the machine
meets them alike; seconds are medians, ratios are medians of each turn's ratio.

- ``limit_mask_s``: n + 1 ChaCha20 streams of the vector's length and the uint32 adds,
  in the best of several chunk sizes, nothing else. The streams are n masks and the
  rounding noise.
- ``mask_s``: a clinic's whole work on the vector: quantise, encode the integers, one
  self mask and n - 1 pairwise masks, reduce and pack.
- ``flower_mask_s``: the same with the functions that Flower's SecAgg+ calls in its
  masking stage, with its default ranges, serialised as it does. Its masks come from
  a Mersenne Twister of a 32-bit seed.
- ``limit_unmask_s`` and ``unmask_s``: a server that lost one of n clinics takes off
  n - 1 self masks and n - 1 pairwise masks; ours also reduces and restores the sums.
- ``share_s`` and ``flower_share_s``: a clinic's two secrets shared among n clinics.
- ``server_peak_mb``: what a server holds at most while it folds 100 (or 10) packed
  vectors one after the other, read from a file one at a time.

- ``control_bytes_n100``: everything else that one of 100 clinics sends and gets in a
  whole sum, each message sealed.

    python benchmarks/secagg.py
"""

import argparse
import secrets
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes
from numpy.typing import NDArray
from report import bar, emit

from fedpeft.protocol import Payload
from fedpeft.protocol.sums import INTEGERS as SUMMED
from fedpeft.sealing import SERVER, Context, Identity, clinic_role, seal
from fedpeft.secagg import STAGES, Aggregation, ClinicSession, Session, Terms
from fedpeft.secagg.masked_vector import CLIPPED, masked_vector
from fedpeft.secagg.masking import apply_masks, reduce_width
from fedpeft.secagg.packing import unpack_add
from fedpeft.secagg.quantise import Quantiser
from fedpeft.secagg.shamir import split
from fedpeft.secagg.vector import Layout

TENSORS, TENSOR_SHAPE = 100, (8, 3750)
PARAMETERS = 3_000_000
CLINICS = 10
WEIGHT = 700
QUANTISER = Quantiser(bits=16, limit=8.0 * WEIGHT)
INTEGERS = {"weight": WEIGHT, "steps": 100}
LIMIT_CHUNKS = (16 * 1024, 32 * 1024, 64 * 1024)

# Defaults of flwr.server.workflow.SecAggPlusWorkflow
FLOWER_CLIPPING_RANGE = 8.0
FLOWER_TARGET_RANGE = 2**22
FLOWER_MOD_RANGE = 2**32
FLOWER_MAX_WEIGHT = 1000.0

Figures = dict[str, Any]
Bars = dict[str, dict[str, Any]]


def main() -> None:
    """Run every measurement and print their figures as one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    results: Figures = {"parameters": PARAMETERS, "clinics": CLINICS, "turns": options.turns}
    bars: Bars = {}
    for measure in MEASUREMENTS:
        figures, compared = measure(options.turns)
        results |= figures
        bars |= compared
    emit("secagg", results, bars)


def masking(turns: int) -> tuple[Figures, Bars]:
    """Time a clinic's masking beside the limit and Flower, and weigh what each sends."""
    values = _update()
    tensors = list(values.reshape(TENSORS, *TENSOR_SHAPE))
    seeds = _seeds(CLINICS)
    layout = _layout(CLINICS)

    def ours() -> int:
        half = CLINICS // 2
        packed, _ = masked_vector(
            values, WEIGHT, INTEGERS, QUANTISER, layout, seeds[:half], seeds[half:]
        )
        return len(packed)

    def flower() -> int:
        return sum(len(part) for part in _flower_masked(tensors, seeds))

    limits = _limits(CLINICS + 1)
    seconds = _interleaved({**limits, "mask_s": ours, "flower_mask_s": flower}, turns)
    limit = _best(seconds, limits)
    figures = {
        "limit_mask_s": _median(limit),
        "limit_chunk": min(limits, key=lambda name: statistics.median(seconds[name])),
        "mask_s": _median(seconds["mask_s"]),
        "flower_mask_s": _median(seconds["flower_mask_s"]),
        "bytes_per_coordinate": round(ours() / PARAMETERS, 4),
        "flower_bytes_per_coordinate": round(flower() / PARAMETERS, 4),
    }
    return figures, {
        "mask_over_limit": bar(_ratio(seconds["mask_s"], limit), "<=", 1.6),
        "flower_mask_over_mask": bar(
            _ratio(seconds["flower_mask_s"], seconds["mask_s"]), ">=", 5.0
        ),
    }


def unmasking(turns: int) -> tuple[Figures, Bars]:
    """Time a server's unmasking after one clinic of ten was lost, beside the limit."""
    layout = _layout(CLINICS)
    survivors = CLINICS - 1
    self_seeds, pair_seeds = _seeds(survivors), _seeds(survivors)
    half = survivors // 2
    apart = layout.coordinates
    # A sum of zero-valued updates, so that unmasking ends where a real one does.
    words = np.full(layout.words, survivors * QUANTISER.centre, np.uint32)
    words[apart:] = 0
    apply_masks(words, [*self_seeds, *pair_seeds[:half]], pair_seeds[half:])
    accumulator = np.empty_like(words)

    def ours() -> None:
        apply_masks(accumulator, pair_seeds[half:], [*self_seeds, *pair_seeds[:half]])
        reduce_width(accumulator, layout.width)
        QUANTISER.dequantise(accumulator[:apart], survivors)
        layout.decode_integers(accumulator[apart:])

    limits = _limits(2 * survivors)
    seconds = _interleaved(
        {**limits, "unmask_s": ours}, turns, before=lambda: np.copyto(accumulator, words)
    )
    limit = _best(seconds, limits)
    figures = {"limit_unmask_s": _median(limit), "unmask_s": _median(seconds["unmask_s"])}
    return figures, {"unmask_over_limit": bar(_ratio(seconds["unmask_s"], limit), "<=", 2.0)}


def sharing(turns: int) -> tuple[Figures, Bars]:
    """Time the sharing of a clinic's seed and private key, for 10 and 100 clinics."""
    figures: Figures = {}
    secret = secrets.token_bytes(32)
    flower_key = private_key_to_bytes(generate_key_pairs()[0])
    for clinics in (10, 100):
        threshold, points = 2 * clinics // 3 + 1, range(1, clinics + 1)

        def ours(threshold: int = threshold, points: range = points) -> None:
            for _ in range(2):
                split(secret, threshold, points)

        def flower(threshold: int = threshold, clinics: int = clinics) -> None:
            create_shares(secret, threshold, clinics)
            create_shares(flower_key, threshold, clinics)

        seconds = _interleaved({"share_s": ours, "flower_share_s": flower}, turns)
        figures |= {f"{name}_n{clinics}": _median(taken) for name, taken in seconds.items()}
    return figures, {}


def server_memory(turns: int) -> tuple[Figures, Bars]:
    """Trace what a server holds while it folds vectors; the same at each turn, so done once."""
    del turns
    peaks, least = {clinics: _folding_peak(clinics) for clinics in (10, 100)}, {}
    for clinics in peaks:
        layout = _layout(clinics)
        least[clinics] = 4 * layout.words + 4 * layout.width * -(-layout.words // 32)
    figures = {
        "server_peak_mb_n10": round(peaks[10] / 1e6, 2),
        "server_peak_mb_n100": round(peaks[100] / 1e6, 2),
        "accumulator_and_one_vector_mb_n100": round(least[100] / 1e6, 2),
    }
    return figures, {
        "server_peak_over_accumulator_and_one_vector_n100": bar(
            round(peaks[100] / least[100], 3), "<=", 1.1
        ),
        "server_peak_n100_over_n10": bar(round(peaks[100] / peaks[10], 3), "<=", 1.15),
    }


def control_traffic(turns: int) -> tuple[Figures, Bars]:
    """Run a whole sum of 100 clinics and count what one sends and gets beside its vector."""
    identities = {f"clinic-{number:03d}": Identity.generate() for number in range(100)}
    session = Session(federation="f", run=1, round=1, attempt=1, kind="train", model=bytes(32))
    terms = Terms(
        identities={name: each.public.signing_bytes for name, each in identities.items()},
        adversary="active",
        threshold=None,
        minimum=3,
        coordinates=0,
        integers=SUMMED,
        quantiser=QUANTISER,
    )
    clinics = {
        name: ClinicSession(
            session, name, each, _Nothing(), adversary="active", admit=lambda _peers: None
        )
        for name, each in identities.items()
    }
    server, watched, traffic = Aggregation(session, terms), "clinic-050", 0
    began = time.perf_counter()
    for stage in STAGES:
        for name, request in server.requests().items():
            answer = clinics[name].receive(stage, request)
            server.receive(name, answer)
            if name == watched:
                # The answer to "masked" is the vector itself; every message is sealed.
                traffic += _sealed(request) + _sealed(answer if stage != "masked" else b"")
        server.close()
    seconds = time.perf_counter() - began
    figures = {
        "control_bytes_n100": traffic,
        "whole_sum_without_vector_s_n100": round(seconds, 3),
    }
    return figures, {"control_bytes_n100": bar(traffic, "<=", 64 * 1024)}


def _sealed(data: bytes) -> int:
    """Return how many bytes such a message has on the wire, without Flower's own."""
    one, other = Identity.generate(), Identity.generate()
    place = Context(
        federation="federation",
        run=2**63,
        round=1,
        attempt=1,
        sender=SERVER,
        receiver=clinic_role("clinic-050"),
        purpose="train.masked/reply",
        schema="00" * 32,
    )
    return len(seal(Payload(blob=data).to_bytes(), place, sender=one, receiver=other.public))


class _Nothing:
    """A contribution without coordinates."""

    def masked(self, clinics: int, add: Sequence[bytes], subtract: Sequence[bytes]) -> bytes:
        layout = Layout(0, SUMMED, QUANTISER.bits, clinics)
        integers = {name: 1 for name in SUMMED if name != CLIPPED}
        empty = np.zeros(0, np.float32)
        return masked_vector(empty, 1, integers, QUANTISER, layout, add, subtract)[0]


MEASUREMENTS: tuple[Callable[[int], tuple[Figures, Bars]], ...] = (
    masking,
    unmasking,
    sharing,
    server_memory,
    control_traffic,
)
"""Each takes the number of turns and returns its figures and bars; names must not clash."""


def _flower_masked(tensors: list[NDArray[np.float32]], seeds: list[bytes]) -> list[bytes]:
    """Mask as ``_collect_masked_vectors`` of Flower 1.41 does, from its weighting on.

    The half of the peers with smaller ids has its masks added, as there.
    """
    q_ratio = round(WEIGHT / FLOWER_MAX_WEIGHT * FLOWER_TARGET_RANGE)
    parameters = parameters_multiply(list(tensors), q_ratio / FLOWER_TARGET_RANGE)
    quantised: list[NDArray[Any]] = list(
        quantize(parameters, FLOWER_CLIPPING_RANGE, FLOWER_TARGET_RANGE)
    )
    quantised = factor_combine(q_ratio, quantised)
    dimensions: list[tuple[int, ...]] = [array.shape for array in quantised]
    own, *pairwise = seeds
    quantised = parameters_addition(quantised, _flower_mask(own, dimensions))
    for number, seed in enumerate(pairwise):
        combine = parameters_addition if number < len(seeds) // 2 else parameters_subtraction
        quantised = combine(quantised, _flower_mask(seed, dimensions))
    return [ndarray_to_bytes(array) for array in parameters_mod(quantised, FLOWER_MOD_RANGE)]


def _flower_mask(seed: bytes, dimensions: list[tuple[int, ...]]) -> list[NDArray[Any]]:
    return list(pseudo_rand_gen(seed, FLOWER_MOD_RANGE, dimensions))


def _limits(streams: int) -> dict[str, Callable[[], None]]:
    """One contestant for each chunk size; which is best differs by machine."""
    words = np.zeros(_layout(CLINICS).words, np.uint32)

    def contestant(chunk: int) -> Callable[[], None]:
        return lambda: _keystreams_and_adds(words, streams, chunk)

    return {f"{4 * chunk // 1024} KiB": contestant(chunk) for chunk in LIMIT_CHUNKS}


def _keystreams_and_adds(words: NDArray[np.uint32], streams: int, chunk: int) -> None:
    """Do the least that masks take, with nothing of fedpeft in it."""
    ciphers = [
        Cipher(algorithms.ChaCha20(secrets.token_bytes(32), bytes(16)), None).encryptor()
        for _ in range(streams)
    ]
    zeros, mask = memoryview(bytes(4 * chunk)), np.empty(chunk, np.uint32)
    for start in range(0, words.size, chunk):
        part = words[start : start + chunk]
        drawn = mask[: part.size]
        for cipher in ciphers:
            cipher.update_into(zeros[: part.nbytes], drawn.view(np.uint8).data)
            np.add(part, drawn, out=part)


def _interleaved(
    contestants: dict[str, Callable[[], object]],
    turns: int,
    before: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Return each contestant's seconds, one a turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, contestant in contestants.items():
            if before:
                before()
            began = time.perf_counter()
            contestant()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _best(seconds: dict[str, list[float]], names: dict[str, Any]) -> list[float]:
    return min((seconds[name] for name in names), key=statistics.median)


def _median(seconds: list[float]) -> float:
    return round(statistics.median(seconds), 5)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def _folding_peak(clinics: int) -> int:
    layout = _layout(clinics)
    packed, _ = masked_vector(_update(), WEIGHT, INTEGERS, QUANTISER, layout, _seeds(1), [])
    with tempfile.TemporaryDirectory() as place:
        received = Path(place) / "vector"
        received.write_bytes(packed)
        del packed
        tracemalloc.start()
        accumulator = np.zeros(layout.words, np.uint32)
        for _ in range(clinics):
            unpack_add(received.read_bytes(), accumulator, layout.width)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


def _update() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.01, PARAMETERS).astype(np.float32)


def _layout(clinics: int) -> Layout:
    return Layout(PARAMETERS, (*INTEGERS, "clipped"), QUANTISER.bits, clinics)


def _seeds(count: int) -> list[bytes]:
    return [secrets.token_bytes(32) for _ in range(count)]


if __name__ == "__main__":
    main()
