"""Fetch the raw material of the embedded model: Debian packages and Debian's package descriptions.

Everything comes from the Debian archive (bookworm, main) through apt, into a cache folder of its own, so that neither
root nor the machine's own apt state is needed. `docs/embedded.md` lists what each package is, and its licence.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("en", "da", "de", "fr", "it", "sk")

PYTHON_PACKAGES = ("libpython3.11-stdlib", "python3-networkx", "python3-django", "python3-numpy", "python3-sympy")
MANUAL_PACKAGES = ("manpages", "manpages-dev", "git-man", "coreutils", "util-linux", "openssl", "perl-doc")
PACKAGES = (*PYTHON_PACKAGES, *MANUAL_PACKAGES, "wordnet-base", "bible-kjv", "bible-kjv-text", "mandoc")


@dataclass(frozen=True)
class Sources:
    """Where the fetched material lies: the package index, the translated descriptions, and unpacked packages."""

    packages_index: Path
    descriptions: dict[str, Path]
    unpacked: dict[str, Path]


def _apt(cache: Path) -> list[str]:
    state, archives = cache / "apt" / "state", cache / "apt" / "cache"
    for folder in (state / "lists" / "partial", archives / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State": state,
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": archives,
        "Debug::NoLocking": "1",
        "Acquire::GzipIndexes": "false",
        "Acquire::Languages": ",".join(LANGUAGES),
        "APT::Sandbox::User": "",
    }
    return ["apt-get", "-q", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]


def _index(lists: Path, ending: str) -> Path:
    found = sorted(lists.glob(f"*_debian_dists_bookworm_main_{ending}"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{lists}: expected one index ending in 'bookworm_main_{ending}', got {len(found)}; "
            "the recipe needs Debian bookworm in apt's sources"
        )
    return found[0]


def fetch(cache: Path) -> Sources:
    """Download what is missing below `cache` and unpack it; a second call finds everything in place."""
    apt, debs, unpacked = _apt(cache), cache / "debs", cache / "unpacked"
    lists = cache / "apt" / "state" / "lists"
    if not list(lists.glob("*_i18n_Translation-sk")):
        subprocess.run([*apt, "update"], check=True)
    debs.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(exist_ok=True)
    for package in PACKAGES:
        if (unpacked / package).exists():
            continue
        if not list(debs.glob(f"{package}_*.deb")):
            subprocess.run([*apt, "download", package], check=True, cwd=debs)
        (deb,) = debs.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, unpacked / package], check=True)
    return Sources(
        packages_index=_index(lists, "binary-amd64_Packages"),
        descriptions={language: _index(lists, f"i18n_Translation-{language}") for language in LANGUAGES},
        unpacked={package: unpacked / package for package in PACKAGES},
    )
