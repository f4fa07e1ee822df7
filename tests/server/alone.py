"""A server that shares nothing with this machine's own llamacli, for a whole test file."""

from __future__ import annotations

import os
from pathlib import Path


def environment_at(home: Path, **more: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    return ours | {"LLAMACLI_HOME": str(home), "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"} | more
