"""What an adapter may give away, before it is handed on: the ``[release]`` table."""

from pydantic import Field

from fedpeft.config.settings import Settings


class ReleaseSettings(Settings):
    """What an audit may find at most; None: not asked."""

    max_auc: float | None = Field(default=None, ge=0.5, le=1)
    """Area under the ROC curve of the better membership attack; 0.5 is guessing."""
    max_exposure: float | None = Field(default=None, gt=0)
    """Bits by which any planted secret is easier to guess than chance."""
