"""URLs as they are shown without a login: a plan or an error may quote one with a key in it."""

import re

ADDRESS = re.compile(r"""://[^\s"'<>\\\]]+""")
PASSWORD = re.compile(r"(://[^/@:]*):[^/@]*@")


def without_credentials(text: str) -> str:
    """Return the text with dots for the password and the query string of each URL."""
    return ADDRESS.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    address, _, query = match[0].partition("?")
    # Without an equals sign it is a pattern of file names.
    shown = f"{address}?…" if "=" in query else match[0]
    return PASSWORD.sub(r"\1:…@", shown)
