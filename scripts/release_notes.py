"""Print a release's section of the change log, for the release workflow.

It needs only Python, because the workflow has installed nothing yet.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "plugins/polars_remote/__init__.py"


def main(tag: str, files: str) -> None:
    """Print the section.

    Parameters
    ----------
    tag
        The library's version after a `v`.
    files
        Address of the repository's files at this tag, for relative links.

    Raises
    ------
    SystemExit
        The tag is not the library's version, or the change log has no section for it.
    """
    [version] = re.findall(r'^__version__ = "(.*)"$', (ROOT / PACKAGE).read_text(), re.MULTILINE)
    if tag != f"v{version}":
        sys.exit(f"The tag is {tag}, but the version in {PACKAGE} is {version}: tag v{version}")
    _, *parts = re.split(r"^## (.*)\n", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    if not (section := sections.get(version, "").strip()):
        sys.exit(f"CHANGELOG.md has nothing below '## {version}': write what has changed")
    print(re.sub(r"\]\((?!https?:)", f"]({files}/", section))


if __name__ == "__main__":
    main(*sys.argv[1:])
