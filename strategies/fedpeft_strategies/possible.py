"""Which strategies can be run under which settings, said before anything is trained.

Knows the declarations and the settings, no strategy's code. Every refusal is one sentence
with its reason and the nearest choice that is possible.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches

from fedpeft.config import FederationSettings, StrategySettings
from fedpeft.errors import ConfigError
from fedpeft_strategies.declaration import Declaration

_LEAST_CLINICS: dict[str, Callable[[int], int]] = {
    "median": lambda _: 3,
    "trimmed-mean": lambda byzantine: 2 * byzantine + 1,
    "multi-krum": lambda byzantine: 2 * byzantine + 3,
}
"""Clinics in a round below which a robust strategy tolerates nothing, by strategy.byzantine."""


_OPTIMISERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
_USED_BY: dict[str, tuple[str, ...]] = {
    "byzantine": ("trimmed-mean", "multi-krum"),
    "max_norm": ("norm-bound",),
    "server_learning_rate": _OPTIMISERS,
    "beta_1": _OPTIMISERS[:3],
    "beta_2": ("fedadam", "fedyogi"),
    "tau": _OPTIMISERS[1:],
}
"""The strategies that read a setting; under others it would have no effect."""


def require_possible(settings: FederationSettings, known: Mapping[str, Declaration]) -> Declaration:
    """Return what the chosen strategy, around what it wraps, needs and gives.

    Raises:
        ConfigError: it is unknown, or cannot be run under these settings.
    """
    _require_known(settings.strategy, known)
    declaration = declaration_of(settings.strategy, known)
    for refusal in _refusals(settings, declaration, known):
        raise ConfigError(refusal)
    return declaration


def declaration_of(strategy: StrategySettings, known: Mapping[str, Declaration]) -> Declaration:
    """Return a strategy's declaration; a wrapper has most of it from what it wraps."""
    own = known[strategy.name]
    if not own.wraps:
        return own
    inner = known[strategy.inner or own.wraps[0]]
    return replace(
        own,
        linear=inner.linear,
        up=inner.up,
        down=inner.down,
        ranks=inner.ranks,
        mechanisms=inner.mechanisms,
    )


def _require_known(strategy: StrategySettings, known: Mapping[str, Declaration]) -> None:
    if strategy.name not in known:
        near = get_close_matches(strategy.name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"strategy.name = {strategy.name!r} is unknown, and the nearest name is {near!r}; "
            "list all of them with `fedpeft strategies`"
        )
    if strategy.inner is None:
        return
    wraps = known[strategy.name].wraps
    if not wraps:
        wrappers = ", ".join(name for name, each in known.items() if each.wraps)
        raise ConfigError(
            f"strategy.inner = {strategy.inner!r} is set, but {strategy.name!r} is not laid around "
            f"another strategy; remove it, or choose one of {wrappers} as strategy.name"
        )
    if strategy.inner not in wraps:
        near = get_close_matches(strategy.inner, wraps, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"strategy.inner = {strategy.inner!r} cannot be used, as {strategy.name!r} is defined "
            f"around {' or '.join(wraps)} only; set it to {near!r}"
        )


def _refusals(
    settings: FederationSettings, declaration: Declaration, known: Mapping[str, Declaration]
) -> Iterator[str]:
    """Yield what is in the way, the most fundamental first."""
    nearest = _Nearest(settings, known)
    for check in (_sum, _base, _mechanism, _ranks):
        if reason := check(settings, declaration):
            yield f"{reason}; {nearest.choice(declaration)}"
    yield from _mixed_ranks_under_noise(settings)
    yield from _missing_settings(settings)


def _sum(settings: FederationSettings, declaration: Declaration) -> str | None:
    if declaration.linear or settings.aggregation.confidentiality != "secagg":
        return None
    return (
        f"strategy.name = {declaration.name!r} needs single updates, and "
        'aggregation.confidentiality = "secagg" shows the server only their sum'
    )


def _base(settings: FederationSettings, declaration: Declaration) -> str | None:
    if not declaration.changes_base or settings.model.quantization != "nf4":
        return None
    return (
        f"strategy.name = {declaration.name!r} adds what is learnt to the base model's weights, "
        'and with model.quantization = "nf4" so small a change alters no 4-bit code and is lost'
    )


def _mechanism(settings: FederationSettings, declaration: Declaration) -> str | None:
    if settings.privacy is None or settings.privacy.mechanism in declaration.mechanisms:
        return None
    kept = " or ".join(f'"{name}"' for name in sorted(declaration.mechanisms))
    return (
        f'privacy.mechanism = "{settings.privacy.mechanism}" does not protect what clinics send '
        f"under strategy.name = {declaration.name!r}, where only {kept} does"
    )


def _ranks(settings: FederationSettings, declaration: Declaration) -> str | None:
    lower = _of_lower_rank(settings)
    if declaration.ranks != "same" or not lower:
        return None
    return (
        f"clinic {lower[0]!r} has a max_rank below adapter.rank = {settings.adapter.rank}, and "
        f"under strategy.name = {declaration.name!r} all clinics train the same rank"
    )


def _mixed_ranks_under_noise(settings: FederationSettings) -> Iterator[str]:
    lower, privacy = _of_lower_rank(settings), settings.privacy
    if lower and privacy and privacy.mechanism != "local":
        yield (
            f"clinic {lower[0]!r} has a max_rank below adapter.rank = {settings.adapter.rank}, and "
            f'the noise of privacy.mechanism = "{privacy.mechanism}" is for updates of one rank; '
            f"set adapter.rank = {_least_rank(settings)}, or use "
            'privacy.mechanism = "local" to protect records or patients'
        )


def _missing_settings(settings: FederationSettings) -> Iterator[str]:
    strategy, minimum = settings.strategy, settings.rounds.minimum_clinics
    if strategy.name == "fedprox" and not settings.training.proximal_mu:
        yield (
            "strategy.name = 'fedprox' with training.proximal_mu = 0 is the strategy it is laid "
            f"around; set training.proximal_mu, for example to 0.01, or strategy.name = "
            f"{strategy.inner or 'fedavg'!r}"
        )
    turned = strategy.inner if strategy.name == "fedprox" else strategy.name
    if strategy.reorthonormalize and turned != "ffa":
        yield (
            "strategy.reorthonormalize = true gives the frozen A of strategy.name = 'ffa' anew, "
            f"and {strategy.name!r} has no such A; set it to false, or strategy.name = 'ffa'"
        )
    for key, users in sorted(_USED_BY.items()):
        changed = getattr(strategy, key) != StrategySettings.model_fields[key].default
        if changed and strategy.name not in users:
            yield (
                f"strategy.{key} is set, and strategy.name = {strategy.name!r} does not use it; "
                f"remove it, or choose {' or '.join(users)} as strategy.name"
            )
    least = _LEAST_CLINICS.get(strategy.name, lambda _: 1)(strategy.byzantine)
    if minimum < least:
        wrong = f" with strategy.byzantine = {strategy.byzantine}"
        yield (
            f"rounds.minimum_clinics = {minimum} is too few for strategy.name = {strategy.name!r}"
            f"{'' if strategy.name == 'median' else wrong}, which cannot tell wrong updates from "
            f"right ones among fewer than {least}; set rounds.minimum_clinics = {least}"
        )


class _Nearest:
    """What could be chosen instead, found from the declarations."""

    def __init__(self, settings: FederationSettings, known: Mapping[str, Declaration]) -> None:
        self._settings, self._known = settings, known

    def choice(self, refused: Declaration) -> str:
        """Return what to set: another strategy of those that fit, exact ones first."""
        names = refused.wraps or [name for name, each in self._known.items() if not each.wraps]
        fitting = [name for name in self._known if name in names and self._fits(name)]
        near = ([name for name in fitting if self._known[name].exact == "yes"] or fitting)[0]
        key = "strategy.inner" if refused.wraps else "strategy.name"
        choices = [f"{key} = {near!r}"]
        if self._blocked_by_sums_alone(refused):
            choices[0] += ", which needs only their sum"
            choices.append(
                'aggregation.confidentiality = "sealed" here and require_secagg = false on each box'
            )
        # Nothing else is robust, so whoever chose that is first told how to keep it.
        return "set " + ", or ".join(choices[::-1] if refused.tolerates else choices)

    def _fits(self, name: str) -> bool:
        checks = (_sum, _base, _mechanism, _ranks)
        return not any(check(self._settings, self._known[name]) for check in checks)

    def _blocked_by_sums_alone(self, refused: Declaration) -> bool:
        others = (_base, _mechanism, _ranks)
        alone = not any(check(self._settings, refused) for check in others)
        return alone and _sum(self._settings, refused) is not None


def _of_lower_rank(settings: FederationSettings) -> list[str]:
    rank = settings.adapter.rank
    return [clinic.name for clinic in settings.clinic if (clinic.max_rank or rank) < rank]


def _least_rank(settings: FederationSettings) -> int:
    rank = settings.adapter.rank
    return min(clinic.max_rank or rank for clinic in settings.clinic)
