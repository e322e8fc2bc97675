"""Removal of credentials from URLs in texts that pages show without a login."""

import re

ADDRESS = re.compile(r"""://[^\s"'<>\\\]]+""")
# The second alternative is a password at which a text was cut.
PASSWORD = re.compile(r"(://[^/@:]*):(?:[^/@]*(?=@)|[^/@]*…$)")


def without_credentials(text: str) -> str:
    """Return the text with an ellipsis for the password and the query string of each URL."""
    return ADDRESS.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    address, _, query = match[0].partition("?")
    # Without an equals sign, the question mark is part of a file name pattern.
    shown = f"{address}?…" if "=" in query else match[0]
    return PASSWORD.sub(r"\1:…", shown)
