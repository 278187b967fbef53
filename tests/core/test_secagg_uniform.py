"""What the server holds for one clinic, or for some of them, looks like uniform noise."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

Words = NDArray[np.uint32]
BINS = 256
SIGMAS = 6.5
"""Its tail is 4e-11: with some thousands of statistics a run, one run in ten million fails."""


def chi_square(counts: NDArray[np.int64]) -> float:
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2) / expected).sum())


def deviation(statistic: float, freedom: int) -> float:
    """Return a chi-square statistic in standard deviations (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def looks_uniform(words: Words, width: int) -> bool:
    """Test the high bits, the low bits and each bit of the words."""
    high = np.bincount(words >> np.uint32(width - 8), minlength=BINS)
    low = np.bincount(words & np.uint32(BINS - 1), minlength=BINS)
    found = [deviation(chi_square(counts), BINS - 1) for counts in (high, low)]
    for bit in range(width):
        ones = int((words >> np.uint32(bit) & np.uint32(1)).sum())
        found.append((2 * ones - words.size) / words.size**0.5)
    return all(abs(each) < SIGMAS for each in found)


VECTORS = {
    "zero": np.zeros(20_000, np.float32),
    "at the upper limit": np.full(20_000, 1e6, np.float32),
    "at the lower limit": np.full(20_000, -1e6, np.float32),
    "alternating": np.tile(np.array([-1e6, 1e6], np.float32), 10_000),
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_masked_words_of_one_clinic_are_uniform(make_world, kind: str, place: int):
    world = make_world(4, values=[VECTORS[kind]] * 4)
    world.until("check")
    update = world.updates[world.names[place]]
    assert looks_uniform(update.masked_words(), update.layout.width)


@pytest.mark.parametrize("kind", VECTORS)
def test_the_words_below_the_masks_are_not_uniform(make_world, kind: str):
    """So the test above can fail."""
    world = make_world(4, values=[VECTORS[kind]] * 4)
    world.until("check")
    update = world.updates["c000"]
    assert not looks_uniform(update.words(), update.layout.width)


def test_small_deviations_from_uniform_are_seen():
    random = np.random.default_rng(1)
    words = random.integers(0, 2**18, 20_000, dtype=np.uint32)
    assert looks_uniform(words, 18)
    words[:1000] = 2**17
    assert not looks_uniform(words, 18)


@pytest.mark.parametrize(
    ("sigmas", "normal_tail"), [(3.0, 1.35e-3), (4.75, 1.02e-6), (6.5, 4.0e-11)]
)
def test_the_approximation_is_good_where_it_is_used(sigmas: float, normal_tail: float):
    """Against the tail of the chi-square density, integrated."""
    freedom = BINS - 1
    grid = np.linspace(0, 2000, 1_000_001)[1:]
    log_density = (freedom / 2 - 1) * np.log(grid) - grid / 2
    density = np.exp(log_density - log_density.max())
    spread = 2 / (9 * freedom)
    bound = freedom * (1 - spread + sigmas * spread**0.5) ** 3
    assert deviation(bound, freedom) == pytest.approx(sigmas)
    assert density[grid > bound].sum() / density.sum() == pytest.approx(normal_tail, rel=0.2)


def test_two_sums_of_the_same_updates_are_masked_differently(make_world, make_session):
    first = make_world(4, values=[VECTORS["zero"]] * 4)
    first.until("check")
    session = make_session(attempt=2)
    second = make_world(
        4, identities=first.identities, session=session, values=[VECTORS["zero"]] * 4
    )
    second.until("check")
    words = [world.updates["c000"].masked_words() for world in (first, second)]
    width = first.updates["c000"].layout.width
    assert looks_uniform((words[0] - words[1]) & np.uint32(2**width - 1), width)


# what is left when all that others know is taken away


class View:
    """What the server and colluding clinics know after the sum was opened.

    All self-mask seeds of the survivors were opened, and the colluders know the mask
    that each honest clinic shares with them.
    """

    def __init__(self, world, colluders: set[str], mask_of):
        world.run()
        self.world = world
        self.width: int = world.server.result.width
        self.mask_of = mask_of
        known: set[bytes] = set()
        for name in colluders:
            known |= {*world.updates[name].add, *world.updates[name].subtract}
        known |= {update.add[0] for update in world.updates.values()}
        self.known = known

    def left(self, names) -> Words:
        """Return the sum of masked vectors less the updates and masks that are known."""
        total = np.zeros(1, np.uint32)
        for name in names:
            update = self.world.updates[name]
            words = update.masked_words() - update.words()
            for seed in self.known & set(update.add):
                words = words - self.mask_of(seed, words.size)
            for seed in self.known & set(update.subtract):
                words = words + self.mask_of(seed, words.size)
            total = total + words
        return total & np.uint32(2**self.width - 1)


@pytest.mark.parametrize("colluders", [set(), {"c000"}, {"c000", "c004"}])
def test_less_the_known_updates_any_proper_subset_is_noise(make_world, mask_of, colluders):
    world = make_world(6, coordinates=4000)
    view = View(world, colluders, mask_of)
    honest = [name for name in world.names if name not in colluders]
    for size in range(1, len(honest)):
        for names in combinations(honest, size):
            assert looks_uniform(view.left(names), view.width), names


@pytest.mark.parametrize("colluders", [set(), {"c000"}, {"c000", "c004"}])
def test_the_whole_sum_is_free_of_masks(make_world, mask_of, colluders):
    """So it is the masks between honest clinics that hide the subsets above."""
    world = make_world(6, coordinates=500)
    view = View(world, colluders, mask_of)
    assert not view.left([name for name in world.names if name not in colluders]).any()


def test_all_but_one_colluding_leaves_nothing_hidden(make_world, mask_of):
    """The limit of any secure sum, stated in the specification."""
    world = make_world(4, coordinates=500)
    assert not View(world, {"c000", "c001", "c002"}, mask_of).left(["c003"]).any()
