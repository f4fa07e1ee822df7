"""What is put before the next question of a chat: a file, a directory, a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llamacli.commands.terminal import Notices
from llamacli.errors import UsageError

if TYPE_CHECKING:
    from llamacli.documents.document import Document


def documents_at(place: str, notices: Notices, *, is_offline: bool) -> Sequence[Document]:
    """Raises UsageError for what is not there or is no text, InputTooLong and RemoteError as -f does."""
    from llamacli.documents import reading

    if place == reading.STDIN:
        raise UsageError("- is what you type here: name a file")
    reading.check([place], is_offline=is_offline)
    return reading.Reading(notices, str).documents([place])
