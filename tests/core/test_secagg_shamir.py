"""Secret sharing: the threshold's number of shares restore a secret, whichever they are."""

import itertools
import random
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import BadShare
from fedpeft.secagg import shamir
from fedpeft.secagg.shamir import PRIME, Interpolation, combine, split

SECRET = bytes(range(32))


def is_probably_prime(number: int, rounds: int = 40) -> bool:
    """Miller and Rabin, with the small primes as witnesses first, then random ones."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    witnesses = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]
    witnesses += [2 + secrets.randbelow(number - 4) for _ in range(rounds)]
    for witness in witnesses:
        power = pow(witness, odd, number)
        squares = [pow(power, 2**times, number) for times in range(twos)]
        if power != 1 and number - 1 not in squares:
            return False
    return True


def test_the_modulus_of_the_field_is_prime():
    assert PRIME == 2**256 + 297
    assert is_probably_prime(PRIME)


def test_no_smaller_prime_above_2_to_256_exists():
    assert not any(is_probably_prime(number, rounds=1) for number in range(2**256 + 1, PRIME, 2))


# https://en.wikipedia.org/wiki/Shamir%27s_secret_sharing, computations modulo 1613
PUBLISHED = {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}


@pytest.mark.parametrize(("point", "value"), PUBLISHED.items())
def test_the_published_polynomial_has_the_published_shares(point: int, value: int):
    assert shamir.evaluate([1234, 166, 94], point, 1613) == value


@pytest.mark.parametrize("points", list(itertools.combinations(PUBLISHED, 3)))
def test_any_three_published_shares_give_the_published_secret(points: tuple[int, ...]):
    weights = shamir.lagrange_at_zero(points, 1613)
    assert sum(weights[point] * PUBLISHED[point] for point in points) % 1613 == 1234


@given(secret=st.binary(min_size=32, max_size=32), data=st.data())
def test_any_threshold_of_the_shares_restores_the_secret(secret: bytes, data: st.DataObject):
    points = data.draw(st.lists(st.integers(1, 2**16), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points)
    chosen = data.draw(st.permutations(points))[:threshold]
    assert combine({point: shares[point] for point in chosen}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_extreme_secrets_are_restored(secret: bytes):
    shares = split(secret, 2, [1, 2, 3])
    assert combine({1: shares[1], 3: shares[3]}) == secret


def test_every_share_has_33_bytes():
    assert {len(share) for share in split(bytes(32), 3, range(1, 101)).values()} == {33}


def test_fewer_shares_than_the_threshold_give_another_secret():
    shares = split(SECRET, 3, [1, 2, 3])
    assert combine({1: shares[1], 2: shares[2]}) != SECRET


def test_two_sharings_of_one_secret_have_no_share_in_common():
    first, second = split(SECRET, 2, range(1, 51)), split(SECRET, 2, range(1, 51))
    assert all(first[point] != second[point] for point in first)


def test_one_interpolation_restores_many_secrets():
    interpolation = Interpolation([2, 5, 9])
    for _ in range(5):
        secret = secrets.token_bytes(32)
        assert interpolation.combine(split(secret, 3, [2, 5, 9])) == secret


def test_a_changed_share_never_gives_the_secret():
    shares = split(SECRET, 2, [1, 2])
    changed = int.from_bytes(shares[1], "big") ^ 1
    assert combine({**shares, 1: changed.to_bytes(33, "big")}) != SECRET


@pytest.mark.parametrize(
    "share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33]
)
def test_a_malformed_share_is_refused(share: bytes):
    shares = split(SECRET, 2, [1, 2])
    with pytest.raises(BadShare, match="point 1"):
        combine({**shares, 1: share})


def test_a_result_that_is_no_32_byte_secret_is_refused():
    with pytest.raises(BadShare, match="do not combine"):
        combine({1: (2**256).to_bytes(33, "big")})


@pytest.mark.parametrize("points", [[], [0], [-1], [2**16 + 1], [1, 1]])
def test_points_that_cannot_hold_shares_are_refused(points: list[int]):
    with pytest.raises(BadShare):
        split(SECRET, 1, points)
    with pytest.raises(BadShare):
        Interpolation(points)


@pytest.mark.parametrize("threshold", [0, -1, 4])
def test_a_threshold_that_nobody_or_anybody_meets_is_refused(threshold: int):
    with pytest.raises(BadShare, match="threshold"):
        split(SECRET, threshold, [1, 2, 3])


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_secret_of_another_length_is_refused(size: int):
    with pytest.raises(BadShare, match="32 bytes"):
        split(bytes(size), 1, [1])


def test_shares_of_other_points_are_refused():
    with pytest.raises(BadShare, match="points"):
        Interpolation([1, 2]).combine(split(SECRET, 2, [1, 3]))


def test_a_hundred_clinics_share_a_secret_two_thirds_of_them_restore():
    shares = split(SECRET, 67, range(1, 101))
    chosen = random.Random(7).sample(list(shares), 67)
    assert combine({point: shares[point] for point in chosen}) == SECRET
