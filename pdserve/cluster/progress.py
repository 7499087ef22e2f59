"""What the owner of a cluster tells whoever watches it start, run and stop."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Steps may overlap; each is named by a key. Called from several threads."""

    def begin(self, key: str, text: str) -> None:
        """A step started."""
        ...

    def update(self, key: str, text: str, fraction: float | None = None) -> None:
        """The step goes on; ``fraction`` (0 to 1) is None where nobody knows."""
        ...

    def end(self, key: str, text: str) -> None:
        """The step is done, and this is what came of it."""
        ...

    def note(self, text: str) -> None:
        """One line on a change of state outside any step."""
        ...


class Silent:
    """Tells nobody."""

    def begin(self, key: str, text: str) -> None:
        pass

    def update(self, key: str, text: str, fraction: float | None = None) -> None:
        pass

    def end(self, key: str, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass
